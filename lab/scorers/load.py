"""The scorers of a run, as one object that a config builds and every metric shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lab.core.errors import UserError
from lab.core.options import local
from lab.core.sources import source_hash
from lab.scorers.clip import OpenClip
from lab.scorers.detector import Detector, load_detector
from lab.scorers.features import FeatureScorer
from lab.scorers.lpips import Lpips
from lab.scorers.networks import CLIP_CONFIG, CLIP_WEIGHTS, DETECTOR_CONFIG, DETECTOR_WEIGHTS, TRAIN
from lab.scorers.nudenet import NudeNet

SHIPPED = Path(__file__).resolve().parent.parent / "minisd" / "weights" / "scorers"
"""Where the scorers of MiniSD lie in the repository: ``clip`` and ``detector``."""


class Scorers:
    """Each network is loaded at its first use, once.

    Args:
        name: of the set, for records.
        clip, features, detector, lpips: callables that build the scorers (``_partial_`` in YAML);
            None: there is no such scorer.

    Raises:
        UserError: NudeNet is asked for and not installed; at first use, what the builders raise.
    """

    def __init__(
        self,
        name: str,
        clip: Callable[[], OpenClip],
        features: Callable[[], FeatureScorer],
        detector: Callable[[], Detector | NudeNet] | None = None,
        lpips: Callable[[], Lpips] | None = None,
    ) -> None:
        if (
            getattr(detector, "func", detector) is NudeNet and find_spec("nudenet") is None
        ):  # not after hours of training
            raise UserError(
                "scorers.detector",
                "NudeNet",
                "needs its package: `pip install 'immunization-bench[nudenet]'`.",
            )
        self.name = name
        self._clip, self._features, self._detector, self._lpips = clip, features, detector, lpips

    def fingerprint(self) -> str:
        """What decides what these scorers see, as `_fingerprint`; files are read once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """SHA-256 over the builders, their options and sources, and the files that they read,
        shipped or named by a
        path: a retrained scorer must not meet older figures in the cache.
        """
        sha = hashlib.sha256()
        for builder in (self._clip, self._features, self._detector, self._lpips):
            made = getattr(builder, "func", builder)
            options = sorted(getattr(builder, "keywords", {}).items())
            sha.update(f"{getattr(made, '__qualname__', made)} {options}".encode())
            sha.update(source_hash(made.__module__).encode() if made is not None else b"")
            for path in _files(builder):
                sha.update(path.name.encode() + b"\0" + path.read_bytes())
        return sha.hexdigest()

    @cached_property
    def clip(self) -> OpenClip:
        return self._clip()

    @cached_property
    def features(self) -> FeatureScorer:
        return self._features()

    @cached_property
    def detector(self) -> Detector | NudeNet | None:
        return self._detector() if self._detector is not None else None

    @cached_property
    def lpips(self) -> Lpips | None:
        return self._lpips() if self._lpips is not None else None


def _files(builder: Any) -> list[Path]:
    """Files that a builder of a config (a partial) reads, as far as they are on this machine."""
    part = {shipped_clip: "clip", shipped_detector: "detector"}.get(
        getattr(builder, "func", builder)
    )
    named = [
        value
        for value in getattr(builder, "keywords", {}).values()
        if isinstance(value, str) and value
    ]
    given = [local("scorers", value.removeprefix("local-dir:")) for value in named]
    found = [SHIPPED / part] if part is not None else [path for path in given if path.exists()]
    inside = [p for path in found for p in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [p for p in inside if p.is_file()]


def shipped_clip(*, device: str = "cpu", batch: int = 128) -> OpenClip:
    """MiniSD's CLIP. Raises `lab.core.errors.UserError` with the training command where it is
    missing.
    """
    _require("clip", CLIP_CONFIG, CLIP_WEIGHTS)
    return OpenClip(f"local-dir:{SHIPPED / 'clip'}", device=device, batch=batch)


def shipped_detector(*, device: str = "cpu", batch: int = 256) -> Detector:
    """MiniSD's detector. Raises `lab.core.errors.UserError` with the training command where it is
    missing.
    """
    _require("detector", DETECTOR_CONFIG, DETECTOR_WEIGHTS)
    return load_detector(SHIPPED / "detector", device=device, batch=batch)


def _require(part: str, *names: str) -> None:
    missing = next((name for name in names if not (SHIPPED / part / name).is_file()), None)
    if missing is not None:
        shown = Path("lab", "minisd", "weights", "scorers", part, missing)
        raise UserError(
            f"scorers.{part}",
            shown,
            f"MiniSD's scorers are not there; {TRAIN}, or choose scorers=real.",
        )
