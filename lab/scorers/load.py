"""The scorers of a run, as one object that a config builds and every metric shares."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from lab.core.hashing import digest
from lab.core.sources import source_hash
from lab.scorers.clip import SHIPPED, OpenClip
from lab.scorers.features import FeatureScorer, Lpips


class Scorers:
    """A set of scorers; their networks are loaded at their first use, once.

    It is no config class: Hydra would take a dataclass that is an argument for a config.

    Args:
        name: of the set, for records.
        clip, features, lpips: None means that there is no such scorer.
        detector: of concepts, `lab.scorers.detector`; None: there is none.
    """

    def __init__(
        self,
        name: str,
        clip: OpenClip,
        features: FeatureScorer,
        detector: Any = None,
        lpips: Lpips | None = None,
    ) -> None:
        self.name, self.clip, self.features = name, clip, features
        self.detector, self.lpips = detector, lpips

    @cache  # noqa: B019 (there are few sets of scorers)
    def fingerprint(self) -> str:
        """Return the SHA-256 of the scorers' options, sources, weights and the files that they
        read, which are read once: a retrained scorer must not meet older figures in the cache.
        """
        sha = hashlib.sha256()
        for scorer in (self.clip, self.features, self.detector, self.lpips):
            kind = type(scorer)
            sha.update(f"{kind.__qualname__}{source_hash(kind.__module__)}".encode())
            for name in getattr(scorer, "__dataclass_fields__", ()):
                sha.update(f"{name}={_identity(getattr(scorer, name))}".encode())
        return sha.hexdigest()


def _identity(value: Any) -> str:
    """Return the value of an option, with the contents of the weights or files that it names."""
    if isinstance(value, nn.Module):
        return digest(*value.state_dict().values())
    if not isinstance(value, str) or not value:
        return repr(value)
    path = SHIPPED if value == "minisd" else Path(value.removeprefix("local-dir:")).expanduser()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()]
    return f"{value} {hashes}"
