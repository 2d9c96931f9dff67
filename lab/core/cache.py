"""Stages addressed by content: computed once, written once, checked on every read.

An artifact is a folder ``ROOT/STAGE/KEY`` with ``values.json``, ``tensors.safetensors`` and
``meta.json`` (the SHA-256 of the other two, the seconds that they took, and digests of the
artifacts that it was made from). KEY is the hash of everything that determines the result, sources
included. If the same key gives another result later (other hardware, other threads), artifacts that
were made from the earlier result are computed again. The folder appears in one rename, so a reader
sees all of it or nothing. A file lock lets one of several processes compute while the others wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lab.core.errors import UserError, nearest
from lab.core.hashing import stage_key, whole_folder, write_atomically

log = logging.getLogger(__name__)

STAGES = ("immunize", "attack", "eval", "train")
_FILES = ("values.json", "tensors.safetensors")
_SPENT = "_seconds_spent"  # in a checkpoint's values: seconds computed before it was written
_FROM = "_made_from"  # in a checkpoint's values: digests of what the stage is computed from

Place = tuple[str, str]  # stage and key of an artifact


@dataclass
class Artifact:
    """JSON-able ``values`` (nan and inf allowed) and named ``tensors``.

    ``seconds``: wall time that it took to compute, over all processes that continued one another;
        None: not known.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seconds: float | None = field(default=None, compare=False)


def _packed(tensors: dict[str, Tensor]) -> bytes:
    return save_tensors({name: t.detach().contiguous() for name, t in tensors.items()})


def _agree(before: dict[str, str], now: dict[str, str]) -> bool:
    """Return whether every digest of ``now`` is the same in ``before``."""
    return all(before.get(place) == digest for place, digest in now.items())


class StageCheckpoint:
    """State of an unfinished stage, in one file beside the artifact: the SHA-256 of the rest, how
    long the values are, the values as JSON, and the tensors in the format of safetensors.
    """

    def __init__(self, path: Path, made_from: dict[str, str] | None = None) -> None:
        self.path, self._made_from = path, made_from or {}
        self._before, self._clock = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of this process and of those whose checkpoint it continues."""
        return self._before + time.monotonic() - self._clock

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self.path.is_file():
            return None
        data = self.path.read_bytes()
        digest, body = data[:64], data[64:]
        if hashlib.sha256(body).hexdigest().encode() != digest:
            log.warning("checkpoint %s is damaged and is ignored", self.path)
            return None
        size = int.from_bytes(body[:8], "little")
        values = json.loads(body[8 : 8 + size])
        spent, made_from = values.pop(_SPENT, 0.0), values.pop(_FROM, {})
        if not _agree(made_from, self._made_from):
            log.warning("checkpoint %s began at an earlier result and is ignored", self.path)
            return None
        self._before = spent
        return load_tensors(body[8 + size :]), values

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        head = json.dumps(values | {_SPENT: self.seconds, _FROM: self._made_from}).encode()
        body = len(head).to_bytes(8, "little") + head + _packed(tensors)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, hashlib.sha256(body).hexdigest().encode() + body)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


class StageCache:
    """The stage cache below ``root``.

    ``force`` names stages that are computed again, once per process. If the result differs, the
    stages that read it are computed again too. ``parents`` of a stage are the places of the
    artifacts that it reads.
    """

    def __init__(self, root: Path | str, force: str | Iterable[str] = ()) -> None:
        self.root = Path(root)
        self.force = frozenset([force] if isinstance(force, str) else force)
        for stage in self.force - {*STAGES}:
            raise UserError("force", stage, nearest(str(stage), STAGES))
        self._fresh: set[str] = set()

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key[:2] / key

    def has(self, stage: str, key: str, parents: Sequence[Place] = ()) -> bool:
        """Return whether the artifact is there, made from these ``parents``.

        Its bytes are checked when it is read.
        """
        return self._current(stage, key, parents) is not None

    def _current(self, stage: str, key: str, parents: Sequence[Place]) -> dict[str, Any] | None:
        """Return ``meta.json`` of an artifact; None where it has to be computed."""
        if stage in self.force and key not in self._fresh:
            return None
        meta = self._meta(stage, key)
        if meta is None or not _agree(meta.get("made_from", {}), self._digests(parents)):
            return None
        return meta

    def _meta(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return ``meta.json`` of an artifact; None where there is none, or it is damaged."""
        path = self.folder(stage, key) / "meta.json"
        try:
            meta = json.loads(path.read_text()) if path.is_file() else {}
        except (OSError, ValueError) as error:
            log.warning("%s %s is damaged (%s); it is computed again", stage, key[:12], error)
            return None
        return meta if meta.get("sha256", {}).keys() == set(_FILES) else None

    def _digests(self, parents: Sequence[Place]) -> dict[str, str]:
        """Return one hash over the bytes of each of ``parents`` that is there."""
        metas = {f"{stage}/{key}": self._meta(stage, key) for stage, key in parents}
        return {name: stage_key(sums=meta["sha256"]) for name, meta in metas.items() if meta}

    def checkpointed(self, stage: str, key: str) -> int | None:
        """Return the step from which an unfinished stage goes on; None without a checkpoint."""
        saved = StageCheckpoint(self.folder(stage, key).with_suffix(".ckpt")).load()
        return saved[1].get("step") if saved is not None else None

    def trust(self, keys: Iterable[str]) -> None:
        """Count artifacts of a forced stage as new that other processes of this run computed."""
        self._fresh.update(keys)

    def read(self, stage: str, key: str, parents: Sequence[Place] = ()) -> Artifact | None:
        """Return the artifact; None when it is absent, outdated or damaged (with a warning)."""
        meta = self._current(stage, key, parents)
        if meta is None:
            return None
        files = {name: self.folder(stage, key) / name for name in _FILES}
        data = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
        if {name: hashlib.sha256(d).hexdigest() for name, d in data.items()} != meta["sha256"]:
            log.warning("%s %s is damaged; it is computed again", stage, key[:12])
            return None
        values, tensors = (data[name] for name in _FILES)
        return Artifact(json.loads(values), load_tensors(tensors), meta.get("seconds"))

    def get(
        self,
        stage: str,
        key: str,
        compute: Callable[[StageCheckpoint], Artifact],
        parents: Sequence[Place] = (),
    ) -> tuple[Artifact, bool]:
        """Return the artifact and whether it was there; compute it under a lock otherwise."""
        artifact = self.read(stage, key, parents)
        if artifact is not None:
            return artifact, True
        folder = self.folder(stage, key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            log.warning("%s %s is computed by another process; waiting for it", stage, key[:12])
            held = lock.acquire()
        with held:
            artifact = self.read(stage, key, parents)  # the other process may have finished it
            if artifact is not None:
                return artifact, True
            made_from = self._digests(parents)
            checkpoint = StageCheckpoint(folder.with_suffix(".ckpt"), made_from)
            if stage in self.force:
                checkpoint.clear()
            elif checkpoint.path.is_file():
                log.info("%s %s goes on from its checkpoint", stage, key)
            artifact = compute(checkpoint)
            artifact.seconds = round(checkpoint.seconds, 3)
            self._commit(folder, artifact, self._digests(parents) | made_from)
            self._fresh.add(key)
            checkpoint.clear()
            return artifact, False

    def _commit(self, folder: Path, artifact: Artifact, made_from: dict[str, str]) -> None:
        """Write an artifact: all of it in one rename."""
        values = json.dumps(artifact.values, sort_keys=True).encode()
        files = dict(zip(_FILES, (values, _packed(artifact.tensors)), strict=True))
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        meta = {"sha256": sums, "seconds": artifact.seconds, "made_from": made_from}
        with whole_folder(folder) as partial:
            for name, data in (files | {"meta.json": json.dumps(meta).encode()}).items():
                write_atomically(partial / name, data)
