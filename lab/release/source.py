"""From a record to the models that it speaks of: which one, its weights in the cache, and what it
started from.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from eval.report.words import ENDED_EARLY
from lab.core.cache import StageCache
from lab.core.data import ScenarioData
from lab.core.errors import UserError, nearest
from lab.core.options import choice, local
from lab.core.record import Record
from lab.core.sources import PACKAGES
from lab.core.types import BASELINE, AnyCase, Backbone, Model, clone
from lab.release.delta import state_hash
from lab.runner.assemble import Parts, assemble
from lab.runner.pipeline import Pipeline

_GROUPS = ("scenario", "backbone", "erase")  # what the original model is made of


@dataclass(frozen=True)
class Choice:
    """One immunized model of a record: its model, case and seed, the key of its stage and the hash
    of what that made.
    """

    model_name: str
    case: str
    seed: int
    key: str
    weights: str | None = None  # None before 1.3

    @property
    def title(self) -> str:
        return f"{self.model_name}, case {self.case}, seed {self.seed}"


@dataclass(frozen=True)
class Models:
    """``published``: what the backbone loads; ``original``: the same after ``erase``; ``released``:
    the model's.
    """

    published: Model
    original: Model
    released: Model
    case: AnyCase
    data: ScenarioData


def target(cfg: DictConfig, name: str) -> Path:
    """Where an export goes: ``path``, or ``name`` below the outputs.

    Raises:
        UserError: something is there, or nothing can be written there; told before any work.
    """
    folder = (
        local("path", cfg.path)
        if cfg.path is not None
        else Path(cfg.paths.outputs) / "export" / name
    )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            "path", folder, "exists and is not empty; choose another folder, or remove it."
        )
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            "path", folder, f"cannot be written ({error.strerror}); choose another folder."
        ) from error
    return folder


def choose(record: Record, options: Any) -> Choice:
    """The model that ``options`` (``model_name``, ``case``, ``seed``; None where there is one only)
    select.

    Raises:
        UserError: nothing that can be exported, or several and no choice; lists them.
    """
    model_name = record["immunizer"] if options.model_name is None else str(options.model_name)
    choice("export.model", model_name, dict.fromkeys((record["immunizer"], BASELINE)))
    cells = [c for c in record["cells"] if c["stage"] == "immunize" and c["model"] == model_name]
    fine = [
        Choice(model_name, c["case"], c["seed"], c["key"], c.get("weights"))
        for c in cells
        if c["status"] == "ok"
    ]
    if not fine:
        states = (
            ", ".join(f"case {c['case']} seed {c['seed']} {c['status']}" for c in cells)
            or "no such stage"
        )
        raise UserError(
            "records", record["name"], f"holds no weights of {model_name} to export: {states}."
        )
    for option, known in (("case", {c.case for c in fine}), ("seed", {c.seed for c in fine})):
        given = options[option]
        if given is not None and given not in known:
            raise UserError(f"export.{option}", given, nearest(str(given), map(str, known)))
        fine = [c for c in fine if given is None or getattr(c, option) == given]
    if len(fine) != 1:
        told = (
            "; ".join(f"export.case='{c.case}' export.seed={c.seed}" for c in fine)
            or "none with both"
        )
        raise UserError("export", f"{len(fine)} models", f"choose one: {told}.")
    return fine[0]


def own_classes(cfg: DictConfig) -> frozenset[str]:
    """Classes that the user's command names by its choice of scenario, backbone and eraser: theirs,
    so a record may.
    """

    def found(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("_target_"), str):
                yield node["_target_"]
            node = list(node.values())
        if isinstance(node, list):
            for value in node:
                yield from found(value)

    groups = (OmegaConf.to_container(cfg[g]) for g in _GROUPS if OmegaConf.is_config(cfg.get(g)))
    return frozenset(target for group in groups for target in found(group))


def trusted(config: Any, where: str, also: frozenset[str] = frozenset()) -> None:
    """A record is data: it may build classes of this project and those in ``also``, and nothing
    else.

    Raises:
        UserError: a ``_target_`` that is neither, or a text that would be interpolated.
    """
    if isinstance(config, dict):
        target = config.get("_target_")
        if target is not None and target not in also and not _ours(target):
            told = (
                "is no class of this project, and a record must not run other code. If it "
                "is your own, choose it on "
            )
            told += (
                f"the command line as the run did: {where.partition('.')[0]}=NAME, with "
                "its --config-dir."
            )
            raise UserError(f"records: {where}._target_", target, told)
        for key, value in config.items():
            trusted(value, f"{where}.{key}", also)
    elif isinstance(config, list):
        for i, value in enumerate(config):
            trusted(value, f"{where}[{i}]", also)
    elif isinstance(config, str) and "${" in config:
        raise UserError(f"records: {where}", config, "a record holds resolved values only.")


def _ours(target: object) -> bool:
    if not isinstance(target, str) or target.split(".")[0] not in PACKAGES:
        return False
    try:
        found = get_object(target)
    except Exception:  # whatever importing or looking up raises: it is not there
        return False
    return isinstance(found, type) and found.__module__.split(".")[0] in PACKAGES


def parts_of(record: Record, also: frozenset[str] = frozenset()) -> Parts:
    """Scenario, backbone and eraser of a record, built anew; no immunizer, attacker or metric.

    ``also``: see `own_classes`.

    Raises:
        UserError: see `trusted` and `lab.runner.assemble.assemble`.
    """
    config = {**record["config"], "attacks": {}, "eval": {}, "scorers": {}}
    config["immunize"] = {"_target_": "immunize.none.NoImmunization", "name": BASELINE}
    for group in _GROUPS:
        trusted(config.get(group), group, also)
    return assemble(OmegaConf.create(config))


def backbone_of(record: Record, **changes: Any) -> Backbone:
    """The record's backbone with some options changed.

    Raises:
        UserError: the weights are not there, or an option that cannot work.
    """
    node = dict(record["config"]["backbone"])
    trusted(node, "backbone")
    try:
        built: Backbone = instantiate(OmegaConf.create({**node, **changes}))
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError("backbone", record["backbone"], f"could not be built: {error}") from error
    return built


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads as the record's run had: the last bit of a sum can depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rebuild(record: Record, chosen: Choice, cfg: DictConfig) -> Models:
    """The models of ``chosen``; the original ones are computed again and compared with the record's
    hashes.

    Raises:
        UserError: other data or original weights than the run had; weights that are not in the
            cache.
    """
    store = StageCache(cfg.paths.cache)
    tensors = _tensors(record, chosen, store)
    with threads(int(record["provenance"]["threads"])):
        parts = parts_of(record, own_classes(cfg))
        pipeline = Pipeline(parts, store)
        data = pipeline.data(chosen.seed)
        known = record["provenance"]["data_hash"].get(str(chosen.seed))
        if known != data.data_hash:
            told = "the scenario's data are not those of the record; put them back where they were."
            raise UserError("scenario", record["scenario"], told)
        case = next((c for c in data.cases if c.name == chosen.case), None)
        if case is None:
            raise UserError("export.case", chosen.case, "is no case of the scenario any more.")
        _same_original(record, chosen.seed, pipeline, data)
        published = clone(parts.backbone.build(case, chosen.seed))
        original = pipeline.original(case, chosen.seed)
    released = clone(original)
    released.load_state_dict({**released.state_dict(), **tensors})
    return Models(published, original, released, case, data)


def _same_original(record: Record, seed: int, pipeline: Pipeline, data: ScenarioData) -> None:
    used = {c["case"] for c in record["cells"] if c["stage"] == "immunize" and c["seed"] == seed}
    for case in data.cases:
        if case.name in used:
            pipeline.identity(case, seed)
    known = record["provenance"]["weight_hash"].get(str(seed))
    if known is None and record["status"] in ENDED_EARLY:
        raise UserError(
            "records", record["name"], "ended before its original weights were known; run it again."
        )
    if known != pipeline.weight_hash()[str(seed)]:
        told = (
            "the original weights computed here are not those of the record: other weights "
            "at backbone.path, another "
            "device, or other versions of torch. Export where the record was made, or run it again."
        )
        raise UserError("backbone", record["backbone"], told)


def _tensors(record: Record, chosen: Choice, store: StageCache) -> dict[str, torch.Tensor]:
    """What the immunizer changed (nothing in the baseline model)."""
    if chosen.model_name == BASELINE:
        return {}
    found = store.read("immunize", chosen.key)
    if found is None:
        told = (
            f"holds no whole weights of this record's {chosen.title} (stage immunize "
            f"{chosen.key[:12]}…). "
        )
        told += (
            f"Set paths.cache to the cache of that run, or compute them again: {command_of(record)}"
        )
        raise UserError("paths.cache", store.root, told)
    if found.values["error"] is not None:
        raise UserError(
            "records",
            record["name"],
            f"{chosen.title} diverged: {found.values['error']['message']}",
        )
    if chosen.weights not in (None, state_hash(found.tensors)):
        told = (
            f"holds other weights of this record's {chosen.title} than were measured: "
            "they were computed again "
        )
        told += (
            "since, elsewhere or with another number of threads. Measure those: "
            f"{command_of(record)}"
        )
        raise UserError("paths.cache", store.root, told)
    return found.tensors


def command_of(record: Record) -> str:
    """The command that made a record, where Hydra's notes lie beside it."""
    folder = getattr(record, "folder", None)
    notes = None if folder is None else Path(folder) / ".hydra" / "overrides.yaml"
    if notes is None or not notes.is_file():
        return f"the command of {record['name']}."
    overrides = OmegaConf.to_container(OmegaConf.load(notes)) or []
    return f"`{shlex.join(['python', 'run.py', *map(str, overrides)])}`"
