"""Names as parts of metric names."""

import re


def slug(name: str) -> str:
    """``name`` as a part of a metric name: lower case, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
