"""From a composed config to built objects, and the check that they fit, before anything runs."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import ValidationError

from immunize.none import NoImmunization
from lab.core.cache import stage_key
from lab.core.config import user_error
from lab.core.data import ConceptCase
from lab.core.errors import UserError, nearest
from lab.core.options import count, unread
from lab.core.prompts import check_case, refuse_special
from lab.core.sources import source_hash
from lab.core.types import (
    BASELINE,
    AnyCase,
    Attacker,
    Backbone,
    Budget,
    Eraser,
    Immunizer,
    RunMetric,
    Scenario,
)
from lab.models.erase import NoErasure
from lab.runner.failures import missing_package


@dataclass(frozen=True)
class Part:
    """A built object with the config slice and the source hash that determine what it computes."""

    obj: Any
    config: dict[str, Any]
    sources: str

    @property
    def identity(self) -> dict[str, Any]:
        return {"config": self.config, "sources": self.sources}


@dataclass(frozen=True)
class Parts:
    """Everything that a run is made of; ``baseline`` is the model without immunization."""

    scenario: Scenario
    backbone: Backbone
    backbone_identity: dict[
        str, Any
    ]  # weights alone do not say what a network does with its inputs
    eraser: Part
    immunizer: Part
    baseline: Part
    attacks: dict[str, Part]
    metrics: dict[str, Part]
    budget: Budget
    seeds: tuple[int, ...]

    @property
    def model_names(self) -> dict[str, Part]:
        """Arm name → immunizer; the baseline model first, and alone for ``immunize=none``."""
        model_names = {BASELINE: self.baseline}
        model_names[self.immunizer.obj.name] = self.immunizer
        return model_names


def _build(config: Any, key: str, scorers: dict[str, Any] | None = None) -> Part:
    """``scorers``: those that were built so far, by config; completed here, so that metrics share
    what these load.
    """
    _group(config, key)
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    target = plain.get("_target_")
    if not isinstance(target, str):
        raise UserError(
            f"{key}._target_",
            target,
            "must be the import path of a class, e.g. immunize.kappa.method.Kappa.",
        )
    try:
        shared = _shared(config, {} if scorers is None else scorers)
        obj = instantiate(config, _convert_="all", **shared)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, ValidationError):
            raise _refused(cause, error, config, key) from None
        if absent := _absent(error):
            own = (absent.name or "").partition(".")[0] == target.partition(".")[0]
            told = None if own else missing_package(absent)
            told = (
                told
                or f"there is no module {absent.name}; put the folder that holds it on PYTHONPATH."
            )
            if absent.name == target:  # Hydra tries it as a module last
                told = "module {} has no {}; name a class of it.".format(*target.rsplit(".", 1))
            raise UserError(key, target, told) from cause
        if isinstance(cause, TypeError) and (
            unknown := re.search(r"unexpected keyword argument '(\w+)'", str(cause))
        ):
            raise _unknown(key, unknown[1], plain) from None
        reason = (
            str(error).splitlines()[-1] if cause is None else f"{type(cause).__name__}: {cause}"
        )
        raise UserError(key, target, f"could not be built: {reason}") from error
    sources = {name: source_hash(name.rsplit(".", 1)[0]) for name in _targets(plain)}
    joined = next(iter(sources.values())) if len(sources) == 1 else stage_key(**sources)
    if hasattr(obj, "scorers"):  # retrained scorers see other things
        joined = stage_key(sources=joined, scorers=obj.scorers.fingerprint())
    return Part(obj, {str(k): v for k, v in plain.items()}, joined)


def _refused(
    cause: ValidationError, error: InstantiationException, config: DictConfig, key: str
) -> UserError:
    """Return what a config class refused, by the config key of the object that Hydra was
    building.
    """
    nested = re.search(r"full_key: (\S+)", str(error))
    place = nested[1].removeprefix(key).lstrip(".") if nested else ""  # full keys start at the root
    node = OmegaConf.select(config, place) if place else config
    where = f"{key}.{place}" if place else key
    return user_error(cause, where, get_class(node["_target_"]))


def _unknown(key: str, name: str, given: dict[Any, Any]) -> UserError:
    known = [f"{key}.{option}" for option in given if option not in (name, "_target_", "name")]
    return UserError(
        f"{key}.{name}", given.get(name), f"there is no such key; {nearest(f'{key}.{name}', known)}"
    )


def _absent(error: BaseException | None) -> ModuleNotFoundError | None:
    """The module that was missing, wherever in the chain of causes: Hydra wraps what it meets while
    importing.
    """
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    return error


def _shared(config: DictConfig, built: dict[str, Any]) -> dict[str, Any]:
    """The argument ``scorers`` of a metric: one object for all metrics whose config of it is the
    same.
    """
    node = config.get("scorers")
    if not isinstance(node, DictConfig):
        return {}
    key = stage_key(scorers=OmegaConf.to_container(node, resolve=True))
    if key not in built:
        built[key] = instantiate(node)
    return {"scorers": built[key]}


def _targets(node: Any) -> list[str]:
    """Import paths of every object that a config builds, the objects inside others included."""
    if isinstance(node, dict):
        own = [node["_target_"]] if isinstance(node.get("_target_"), str) else []
        return [*own, *(target for value in node.values() for target in _targets(value))]
    return (
        [target for value in node for target in _targets(value)] if isinstance(node, list) else []
    )


def _seeds(values: Any) -> tuple[int, ...]:
    seeds = (
        tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
    )
    if not seeds or any(type(s) is not int or s < 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(
            "seeds",
            list(seeds),
            "must be a list of different whole numbers ≥ 0, e.g. seeds=[0,1,2].",
        )
    return seeds


def _group(config: Any, key: str) -> dict[str, Any]:
    """The entries of the group ``key``, which may have been replaced by a value on the command
    line.
    """
    if not isinstance(config, DictConfig):
        raise UserError(key, config, f"must be a group of options; set {key}.OPTION=VALUE.")
    if key in ("attacks", "eval") and "_target_" in config:
        told = (
            "stands without a name; a file of this group holds its options under one: "
            "NAME: {_target_: …, name: NAME}."
        )
        raise UserError(f"{key}._target_", config["_target_"], told)
    return {str(name): value for name, value in config.items()}


def _budget(config: Any) -> Budget:
    given, known = _group(config, "budget"), [field.name for field in fields(Budget)]
    for name, value in given.items():
        if name not in known:
            told = nearest(f"budget.{name}", [f"budget.{option}" for option in known])
            raise UserError(f"budget.{name}", value, f"there is no such key; {told}")
        if name != "at":
            count(f"budget.{name}", value, 2 if name == "points" else 1)
    if "horizon" not in given:
        raise UserError("budget.horizon", None, "needs a value, e.g. budget.horizon=20.")
    budget = Budget(**{**given, "at": None})
    if given.get("at") is None:
        return budget
    unread("budget.points", budget.points, Budget.points, False, "budget.at=null")
    told = f"must be a list of steps from 0 to horizon × multiple = {budget.steps}, e.g. [0,20,40]."
    if not isinstance(given["at"], ListConfig) or any(
        type(s) is not int or not 0 <= s <= budget.steps for s in given["at"]
    ):
        raise UserError("budget.at", given["at"], told)
    return dataclasses.replace(budget, at=tuple(given["at"]))


def check_groups(cfg: DictConfig) -> None:
    """Raises `UserError` where a list of choices is empty, which leaves no trace of its group in
    the config, and for a name that no folder can have.
    """
    for key in ("name", "immunize.name"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, str) or not re.fullmatch(r"\w[\w .+-]*", value):
            told = (
                "names a folder of its results: letters, digits and . + - _, a letter or "
                "digit first."
            )
            raise UserError(key, value, told)
    for key, instead in (("attacks", "attacks=none"), ("eval", "eval=[conditioning]")):
        if key not in cfg:
            raise UserError(key, "[]", f"names no choice; take {instead}, or other names.")


def assemble(cfg: DictConfig) -> Parts:
    """Build every part that ``cfg`` selects.

    Raises:
        UserError: an option that cannot work, or parts that do not fit together.
    """
    baseline = _build(
        OmegaConf.create({"_target_": "immunize.none.NoImmunization", "name": BASELINE}), "immunize"
    )
    assert isinstance(baseline.obj, NoImmunization)
    backbone = _build(cfg.backbone, "backbone")
    scorers: dict[str, Any] = {}
    parts = Parts(
        scenario=_build(cfg.scenario, "scenario").obj,
        backbone=backbone.obj,
        backbone_identity=backbone.identity,
        eraser=_build(cfg.erase, "erase"),
        immunizer=_build(cfg.immunize, "immunize"),
        baseline=baseline,
        attacks={
            str(name): _build(sub, f"attacks.{name}")
            for name, sub in _group(cfg.attacks, "attacks").items()
        },
        metrics={
            str(name): _build(sub, f"eval.{name}", scorers)
            for name, sub in _group(cfg.eval, "eval").items()
        },
        budget=_budget(cfg.budget),
        seeds=_seeds(cfg.seeds),
    )
    check_fit(parts)
    return parts


_CURVE = ("step", "x", "y", "log")  # what a curve holds beside the models (`lab.core.types.Scores`)


def check_fit(parts: Parts) -> None:
    """Every part must take the backbone's kind.

    Raises:
        UserError: names the part that does not fit and what would.
    """
    kind = parts.backbone.kind
    if kind not in parts.scenario.provides:
        fits = " or ".join(sorted(parts.scenario.provides))
        raise UserError(
            "backbone",
            parts.backbone.name,
            f"is {kind}, scenario={parts.scenario.name} needs one that is {fits}.",
        )
    if getattr(parts.immunizer.obj, "name", "") in _CURVE:
        told = f"is a word of every curve ({', '.join(_CURVE)}): choose another name."
        raise UserError("immunize.name", parts.immunizer.obj.name, told)
    if getattr(parts.immunizer.obj, "name", "") == BASELINE and not isinstance(
        parts.immunizer.obj, NoImmunization
    ):
        raise UserError(
            "immunize.name", BASELINE, "is the name of the baseline model: choose another one."
        )
    asked = getattr(parts.scenario, "asks_erasure", lambda: None)()
    released = any(getattr(metric.obj, "released", False) for metric in parts.metrics.values())
    if asked is not None and isinstance(parts.eraser.obj, NoErasure) and not released:
        raise UserError(
            "erase", "none", f"takes nothing out, but {asked} has erase: true; set erase=uce."
        )
    contracts: list[tuple[str, Any, Any]] = [("erase", parts.eraser.obj, Eraser)]
    contracts += [("immunize", parts.immunizer.obj, Immunizer)]
    contracts += [(f"attacks.{name}", part.obj, Attacker) for name, part in parts.attacks.items()]
    contracts += [(f"eval.{name}", part.obj, RunMetric) for name, part in parts.metrics.items()]
    for key, obj, contract in contracts:
        if not isinstance(obj, contract):
            missing = [m for m in (*contract.__annotations__, "__call__") if not hasattr(obj, m)]
            told = (
                f"does not meet the contract {contract.__name__} of lab/core/types.py: it "
                f"has no {', '.join(missing)}."
            )
            raise UserError(key, type(obj).__name__, told)
        obj = typing.cast(Any, obj)
        if key.startswith(("attacks.", "eval.")) and obj.name != key.partition(".")[2]:
            told = "is not the key that its options stand under; give both the same name."
            raise UserError(f"{key}.name", obj.name, told)
        if kind not in obj.accepts:
            fits = " or ".join(sorted(obj.accepts))
            raise UserError(
                key, obj.name, f"takes {fits} models, backbone={parts.backbone.name} is {kind}."
            )


def check_cases(parts: Parts, cases: tuple[AnyCase, ...]) -> None:
    """Calls the optional hook ``check(cases)`` of the immunizer, the attackers and the metrics that
    will run. Where the backbone has ``tokenizers()``, no text of the cases and none that the
    optional hook ``texts()`` of these parts or of the eraser gives (config key → text) may hold a
    special token of theirs. Attackers with a hook ``dry_open(model, task)`` are given the model and
    one task.

    Raises:
        UserError: from a part that cannot work on these data, or a text with a special token.
    """
    metrics = [part.obj for part in parts.metrics.values()]
    used = [
        m
        for m in metrics
        if m.needs_models <= len(parts.model_names) and (parts.attacks or not m.needs_attack)
    ]
    working = [parts.immunizer.obj, *(part.obj for part in parts.attacks.values()), *used]
    for obj in working:
        hook = getattr(obj, "check", None)
        if hook is not None:
            hook(cases)
    if not hasattr(parts.backbone, "tokenizers"):
        return
    tokenizers = (
        parts.backbone.tokenizers()
    )  # loads the model, which the keys of all stages need next
    for case in cases:
        if isinstance(case, ConceptCase):
            check_case(case, tokenizers)
    for obj in [parts.eraser.obj, *working]:
        for key, text in getattr(obj, "texts", dict)().items():
            refuse_special(key, [text], tokenizers)
    hooks = [part.obj.dry_open for part in parts.attacks.values() if hasattr(part.obj, "try_out")]
    model = parts.backbone.build(cases[0], parts.seeds[0]) if hooks else None
    for hook in hooks:
        hook(model, cases[0].tasks[0])
