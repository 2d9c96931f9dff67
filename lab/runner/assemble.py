"""From a composed config to built objects, and the check that they fit, before anything runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from pydantic import ValidationError

from eval.stats.verdict_rule import VALUES
from immunize.none import NoImmunization
from lab.core.config import bind, user_error
from lab.core.data import ConceptCase
from lab.core.errors import UserError, call_all, missing_package, nearest
from lab.core.hashing import stage_key
from lab.core.prompts import check_case, refuse_special
from lab.core.sources import ROOT, source_hash
from lab.core.types import (
    BASELINE,
    IMMUNIZED,
    AnyCase,
    Attacker,
    Backbone,
    Budget,
    Eraser,
    Immunizer,
    Method,
    RunMetric,
    Scenario,
)
from lab.models.erase import NoErasure

log = logging.getLogger(__name__)
_SINGLE = ("scenario", "backbone", "erase", "immunize")  # groups of one choice


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
    backbone_identity: dict[str, Any]  # weights do not say what a network does with its inputs
    eraser: Part
    immunizer: Part
    baseline: Part
    attacks: dict[str, Part]
    metrics: dict[str, Part]
    budget: Budget
    seeds: tuple[int, ...]

    @property
    def model_names(self) -> dict[str, Part]:
        """Model name → immunizer; the baseline first, and alone for ``immunize=none``."""
        if isinstance(self.immunizer.obj, NoImmunization):
            return {BASELINE: self.immunizer}
        return {BASELINE: self.baseline, IMMUNIZED: self.immunizer}


def _build(config: Any, key: str, scorers: dict[str, Any]) -> Part:
    """Build the object that ``config`` describes.

    Args:
        scorers: those that were built so far, by config; metrics with equal ones share them.
    """
    _group(config, key)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    target = plain.get("_target_")
    if not isinstance(target, str):
        fix = "must be the import path of a class, e.g. immunize.kappa.method.Kappa."
        raise UserError(f"{key}._target_", target, fix)
    try:
        shared = _shared(config, scorers)
        obj = instantiate(config, _convert_="all", **shared)
    except InstantiationException as error:
        raise _refused(error, config, key) from error.__cause__
    if isinstance(obj, Method) and "." in key and obj.name != key.partition(".")[2]:
        fix = "is not the key that its options stand under; give both the same name."
        raise UserError(f"{key}.name", obj.name, fix)
    sources = {name: source_hash(name.rpartition(".")[0]) for name in find_targets(plain)}
    joined = next(iter(sources.values())) if len(sources) == 1 else stage_key(**sources)
    if shared:  # retrained scorers give other results
        joined = stage_key(sources=joined, scorers=shared["scorers"].fingerprint())
    if isinstance(obj, Method) and (read := obj.fingerprint()):
        joined = stage_key(sources=joined, read=read)
    return Part(obj, {str(k): v for k, v in plain.items()}, joined)


def _refused(error: InstantiationException, config: DictConfig, key: str) -> UserError:
    """Return why the object of the config key ``key`` could not be built."""
    cause, target = error.__cause__, config["_target_"]
    if isinstance(cause, UserError):
        return cause
    if isinstance(cause, ValidationError):  # of the object itself or of one inside it
        nested = re.search(r"full_key: (\S+)", str(error))
        outer = str(config._get_full_key(None))  # Hydra gives the key from the root of the config
        place = nested[1].removeprefix(outer).lstrip(".") if nested else ""
        node = OmegaConf.select(config, place) if place else config
        return user_error(cause, f"{key}.{place}" if place else key, get_class(node["_target_"]))
    missing = _missing_module(error)
    if missing is not None:
        own = str(missing.name).partition(".")[0] == target.partition(".")[0]
        absent = "there is no such class; put the folder that holds its module on PYTHONPATH."
        return UserError(key, target, (not own and missing_package(missing)) or absent)
    reason = str(error).splitlines()[-1] if cause is None else f"{type(cause).__name__}: {cause}"
    return UserError(key, target, f"could not be built: {reason}")


def _missing_module(error: BaseException | None) -> ModuleNotFoundError | None:
    """Return the missing module from the chain of causes: Hydra wraps what it meets."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    return error


def _shared(config: DictConfig, built: dict[str, Any]) -> dict[str, Any]:
    """Return the argument ``scorers`` of a metric: one object for all equal configs of it."""
    node = config.get("scorers")
    if not isinstance(node, DictConfig):
        return {}
    key = stage_key(scorers=OmegaConf.to_container(node, resolve=True))
    if key not in built:
        built[key] = instantiate(node)
    return {"scorers": built[key]}


def find_targets(node: Any) -> list[str]:
    """Return the import paths of all objects that a config builds, those inside others included."""
    if isinstance(node, list):
        return [target for value in node for target in find_targets(value)]
    if not isinstance(node, dict):
        return []
    own = [node["_target_"]] if isinstance(node.get("_target_"), str) else []
    return own + find_targets(list(node.values()))


def _seeds(values: Any) -> tuple[int, ...]:
    seeds = list(values) if isinstance(values, ListConfig) else [values]
    if not seeds or len(set(seeds)) < len(seeds) or any(type(s) is not int or s < 0 for s in seeds):
        fix = "must be a list of different whole numbers ≥ 0, e.g. seeds=[0,1,2]."
        raise UserError("seeds", seeds, fix)
    return tuple(seeds)


def _group(config: Any, key: str) -> dict[str, Any]:
    """Return the entries of the group ``key``; the command line may have set it to a value."""
    if not isinstance(config, DictConfig):
        raise UserError(key, config, f"must be a group of options; set {key}.OPTION=VALUE.")
    return {str(name): value for name, value in config.items()}


def as_list(value: Any) -> list[str]:
    """Return a config value that is a list, a single word or null."""
    return [value] if isinstance(value, str) else list(value or ())


def read_fail_on(cfg: DictConfig) -> list[str]:
    """Return the verdicts that end the command with an exit code of their own."""
    words = as_list(cfg.get("fail_on"))  # records of older schemas have none
    for word in words:
        if word not in VALUES:
            raise UserError("fail_on", word, nearest(str(word), VALUES))
    return words


def _check_groups(cfg: DictConfig) -> None:
    """Check the names of folders, and that attacks and metrics are chosen."""
    for key in ("name", "immunize.name"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, str) or not re.fullmatch(r"\w[\w .+-]*", value):
            fix = "names a folder: letters, digits and . + - _, a letter or digit first."
            raise UserError(key, value, fix)
    for key in ("attacks", "eval"):
        if key not in cfg:
            names = sorted(path.stem for path in (ROOT / "conf" / key).glob("*.yaml"))
            raise UserError(key, "[]", f"names no choice; choose from {', '.join(names)}.")


def _drop_unselected(cfg: DictConfig) -> None:
    """Drop options of attacks and metrics that are not selected: a sweep has options of its own,
    and the command line may select others.
    """
    for group in ("attacks", "eval"):
        for name, node in (_group(cfg[group], group) if group in cfg else {}).items():
            known = (ROOT / "conf" / group / f"{name}.yaml").is_file()
            if known and isinstance(node, DictConfig) and "_target_" not in node:
                log.info("options of %s.%s are left out: it is not selected", group, name)
                with open_dict(cfg):
                    del cfg[group][name]
                    if not cfg[group]:
                        del cfg[group]


def assemble(cfg: DictConfig) -> Parts:
    """Build every part that ``cfg`` selects.

    Raises:
        UserError: options that cannot work, all of them at once, or parts that do not fit together.
    """
    _drop_unselected(cfg)
    _check_groups(cfg)
    none = OmegaConf.create({"_target_": "immunize.none.NoImmunization"})
    nodes = {"immunize=none": none} | {key: cfg[key] for key in _SINGLE}
    for group in ("attacks", "eval"):
        nodes |= {f"{group}.{name}": node for name, node in _group(cfg[group], group).items()}
    scorers: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {
        "fail_on": partial(read_fail_on, cfg),
        "budget": lambda: bind(Budget, _group(cfg.get("budget"), "budget"), "budget"),
        "seeds": partial(_seeds, cfg.seeds),
        **{key: partial(_build, node, key, scorers) for key, node in nodes.items()},
    }
    built: dict[str, Any] = dict(zip(calls, call_all(calls.values()), strict=True))
    parts = Parts(
        scenario=built["scenario"].obj,
        backbone=built["backbone"].obj,
        backbone_identity=built["backbone"].identity,
        eraser=built["erase"],
        immunizer=built["immunize"],
        baseline=built["immunize=none"],
        attacks=_attacks({str(name): built[f"attacks.{name}"] for name in cfg.attacks}),
        metrics={str(name): built[f"eval.{name}"] for name in cfg.eval},
        budget=built["budget"],
        seeds=built["seeds"],
    )
    check_fit(parts)
    return parts


def _attacks(parts: dict[str, Part]) -> dict[str, Part]:
    """Return the attacks, those that stand for several ones replaced by these."""
    attacks: dict[str, Part] = {}
    for name, part in parts.items():
        variants = part.obj.variants() if isinstance(part.obj, Attacker) else {}
        attacks |= {
            key: Part(attack, part.config | options, part.sources)
            for key, (attack, options) in variants.items()
        } or {name: part}
    return attacks


# kind of model → an experiment on such models, for an error message
_EXPERIMENTS = {"linear": "house_price", "deep": "deep_probe", "diffusion": "relearn"}


def check_fit(parts: Parts) -> None:
    """Check that every part meets its contract and takes the backbone's kind of model.

    Raises:
        UserError: names the part that does not fit and what would.
    """
    scenario, backbone, immunizer = parts.scenario, parts.backbone, parts.immunizer.obj
    contracts: list[tuple[str, Any, type]] = [
        ("scenario", scenario, Scenario),
        ("backbone", backbone, Backbone),
        ("erase", parts.eraser.obj, Eraser),
        ("immunize", immunizer, Immunizer),
        *((f"attacks.{name}", part.obj, Attacker) for name, part in parts.attacks.items()),
        *((f"eval.{name}", part.obj, RunMetric) for name, part in parts.metrics.items()),
    ]
    for key, obj, contract in contracts:
        if not isinstance(obj, contract):
            fix = f"must be a subclass of lab.core.types.{contract.__name__}."
            raise UserError(key, type(obj).__name__, fix)
    if backbone.kind not in scenario.provides:
        fix = f"is {backbone.kind}, scenario={scenario.name} needs one that is "
        raise UserError(
            "backbone", backbone.name, f"{fix}{' or '.join(sorted(scenario.provides))}."
        )
    for key, method, _ in contracts[2:]:
        if backbone.kind not in method.accepts:
            fix = (
                f"takes {' or '.join(sorted(method.accepts))} models, "
                f"backbone={backbone.name} is {backbone.kind}; "
                f"experiment={_EXPERIMENTS[min(method.accepts)]} has parts that fit."
            )
            raise UserError(key, method.name, fix)
    for part in parts.attacks.values():
        part.obj.check_budget(parts.budget)
    to_erase = scenario.asks_erasure()
    released = any(metric.obj.released for metric in parts.metrics.values())
    if to_erase is not None and isinstance(parts.eraser.obj, NoErasure) and not released:
        fix = f"takes nothing out, but {to_erase} has erase: true; set erase=uce."
        raise UserError("erase", "none", fix)


def check_cases(parts: Parts, cases: tuple[AnyCase, ...]) -> None:
    """Let every part that will run check the cases of a seed, and check all texts.

    Raises:
        UserError: from a part that cannot work on these data, or a text with a special token of
            the backbone's tokenizers.
    """
    attackers = [part.obj for part in parts.attacks.values()]
    metrics = [
        part.obj
        for part in parts.metrics.values()
        if part.obj.needs_models <= len(parts.model_names)
        and (attackers or not part.obj.needs_attack)
    ]
    methods: list[Method] = [parts.eraser.obj, parts.immunizer.obj, *attackers, *metrics]
    for method in methods:
        method.check(cases)
    tokenizers = parts.backbone.tokenizers()  # loads the model, which all stages need next
    if not tokenizers:
        return
    for case in cases:
        if isinstance(case, ConceptCase):
            check_case(case, tokenizers)
    for method in methods:
        for key, text in method.texts().items():
            refuse_special(key, [text], tokenizers)


def open_attacks(parts: Parts, case: AnyCase) -> None:
    """Set up every attack on a model and the first task of ``case``, so that options that do not
    suit the model are refused before anything runs.
    """
    if parts.attacks and parts.backbone.kind == "diffusion":
        model = parts.backbone.build(case, parts.seeds[0])
        for part in parts.attacks.values():
            part.obj.dry_open(model, case.tasks[0])
