"""Names as parts of metric names."""

import re
import unicodedata


def slug(name: str) -> str:
    """Return ``name`` as a part of a metric name: a-z without accents, digits, underscores.

    That is what W&B takes.
    """
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", name.lower()) if not unicodedata.combining(c)
    )
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")
