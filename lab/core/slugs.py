"""Names of metrics and attacks, made of other names."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any


def slug(name: str) -> str:
    """Return ``name`` as a part of a metric name: a-z without accents, digits, underscores.

    That is what W&B takes.
    """
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", name.lower()) if not unicodedata.combining(c)
    )
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")


def setting_name(attack: str, setting: Mapping[str, Any]) -> str:
    """Return the name of ``attack`` with one setting of its options: ``lora (lr 0.004)``."""
    return f"{attack} ({', '.join(f'{key} {value}' for key, value in setting.items())})"


def searched_attack(name: str) -> str:
    """Return the attack of a `setting_name`."""
    return name.partition(" (")[0]
