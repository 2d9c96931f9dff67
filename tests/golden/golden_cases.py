"""The computations whose results `values.json` holds; every key in it names one of them.

A key is `GROUP/PRESET/KIND` with the names of files in `conf/`, so it outlives a move of a module.
Where keys of `conf/` get other names, change the tables below. Where modules move, change the
imports.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for folder in (ROOT, ROOT / "tests" / "helpers"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import fake_generations as pictures  # noqa: E402
import fake_run as probes  # noqa: E402
import tiny  # noqa: E402
from tiny_diffusion import tiny_case, tiny_diffusion  # noqa: E402

import run as entry  # noqa: E402
from lab.core.data import Case, Erasure  # noqa: E402
from lab.core.hashing import digest  # noqa: E402
from lab.core.types import BASELINE, IMMUNIZED, Budget  # noqa: E402
from lab.minisd.world import openmoji, scenes, world  # noqa: E402
from lab.minisd.world.dice import Dice  # noqa: E402
from lab.minisd.world.vocabulary import OBJECTS, PHOTO, STYLES, style  # noqa: E402
from lab.models.linear import LinearBackbone  # noqa: E402

# ---- tables to change when something gets another name

VALUES = HERE / "values.json"
RECORDS = ROOT / "outputs" / "records" / "house_price_table"  # committed results of the real table

# Options that make a case tiny. They apply where a preset has the key. No learning rate is changed,
# except where a preset diverges on the tiny data: see `OWN`.
SMALL: dict[str, dict[str, Any]] = {
    "immunize/linear": {"epochs": 2, "steps": 4, "batch_size": 16, "log_points": 3},
    "immunize/deep": {"epochs": 1, "steps": 3, "batch_size": 16, "log_points": 3},
    "immunize/diffusion": {
        "steps": 2,
        "batch_size": 2,
        "prior_batch_size": 2,
        "cap": None,
        "inner_batch_size": 2,
        "k_min": 1,
        "k_max": 2,
        "decoys": 4,
        "decoy_steps": 2,
    },
    "attacks/linear": {"lr_trials": 3, "batch_size": 16},
    "attacks/deep": {"lr_trials": 3, "batch_size": 16},
    "attacks/diffusion": {
        "batch_size": 2,
        "sampling": {"sampler": "ddim", "steps": 1, "guidance": 2.0, "count": 2, "negative": ""},
    },
    "eval/diffusion": {"count": 8},
}

# Options of single presets, beyond those of `SMALL`.
OWN: dict[str, dict[str, Any]] = {
    name: {"lr": 1e-9}  # with their own lr the weights leave the finite numbers
    for name in ("immunize/kappa_paper_house_price", "immunize/kappa_paper_mnist")
}

# Presets without a computation: there is nothing to compute.
LEFT_OUT = {"attacks/none"}

# Runs of the real program, compared with the committed record of the same immunizer, seed 0.
STUDIES = ("kappa", "kappa_closed_form", "kappa_pencil", "kappa_ill_only")
STUDY_WORDS = ("experiment=house_price", "seeds=[0]", "tracker=none", "immunize={name}")
OUTPUTS_KEY = "paths.outputs"


BUDGET = Budget(horizon=1, multiple=2, at=(0, 1, 2))  # two steps, a snapshot after each
SEED = 3

# ---- presets


def presets(group: str) -> list[str]:
    """List the choices of a group of `conf/`."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@cache
def _composed(group: str) -> dict[str, Any]:
    """Compose every preset of a group once."""
    GlobalHydra.instance().clear()
    names = [name for name in presets(group) if f"{group}/{name}" not in LEFT_OUT]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        if group in ("attacks", "eval"):
            found = compose("config", overrides=[f"{group}=[{','.join(names)}]"])[group]
            nodes = {name: found[name] for name in names}
        else:
            nodes = {name: compose(f"{group}/{name}")[group] for name in names}
    for node in nodes.values():
        OmegaConf.set_struct(node, False)
    return nodes


def build(group: str, name: str, kind: str = "", **objects: Any) -> Any:
    """Instantiate a preset with the small options of its group and kind."""
    node = _composed(group)[name]
    small = {**SMALL.get(f"{group}/{kind}", {}), **OWN.get(f"{group}/{name}", {})}
    kept = {key: value for key, value in small.items() if node.get(key) is not None}
    if node.get("attackers") is None:  # k_min and k_max belong to drawn attackers
        kept = {key: value for key, value in kept.items() if not key.startswith("k_")}
    if group == "attacks" and "lr_trials" in kept and not _searches(node):
        del kept["lr_trials"]
    merged = OmegaConf.merge(node, kept)
    if not objects:
        return instantiate(merged, _convert_="all")
    for key in objects:  # Hydra would turn the objects into options
        del merged[key]
    return instantiate(merged, _partial_=True, _convert_="all")(**objects)


def _searches(node: Any) -> bool:
    """Tell whether an attacker's optimizer has a learning rate to search for."""
    from attacks.probes.optimizers import OPTIMIZERS

    optimizer = OPTIMIZERS.get(node.optimizer)
    return optimizer is None or optimizer.uses_rate


def kinds(group: str, name: str) -> list[str]:
    """List the kinds of model that a preset takes."""
    accepted = build(group, name).accepts
    return [
        kind
        for kind in ("linear", "deep", "diffusion")
        if kind in accepted and not (kind == "linear" and name.endswith("_deep"))  # names blocks
    ]


# ---- models and cases


def problem(kind: str, labelled: bool = False) -> tuple[Any, Any]:
    """Return a tiny model of a kind and a case for it."""
    if kind == "linear":
        case = tiny.linear_case()
        return LinearBackbone().build(case, 0), tiny.linear_classes() if labelled else case
    if kind == "deep":
        return tiny.tiny_net(), tiny.image_case()
    return tiny_diffusion(), tiny_case()


# ---- fingerprints of weights


@cache
def _directions(position: int, shape: tuple[int, ...]) -> Tensor:
    """Return four fixed directions for the tensor at a position in the order of the names."""
    seed = 1_000_003 * position
    for size in shape:
        seed = (1_009 * seed + size + 1) % 2**61
    stream = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.randn(4, count, generator=stream, dtype=torch.float64)


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the norm of all tensors together and four random projections, in float64."""
    total, projections = 0.0, torch.zeros(4, dtype=torch.float64)
    for position, name in enumerate(sorted(tensors)):
        flat = tensors[name].detach().to(torch.float64).flatten()
        total += float(flat @ flat)
        projections += _directions(position, tuple(tensors[name].shape)) @ flat
    return {"norm": total**0.5, "projections": projections.tolist()}


# ---- computations


def immunized(group: str, name: str, kind: str) -> dict[str, Any]:
    """Immunize, or erase, and return fingerprints of the weights and of their change."""
    method, (model, case) = build(group, name, kind), problem(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if group == "erase":
        if kind == "diffusion":
            prompts = "a fox in mosaic style", "a panda in mosaic style"
            gone = Erasure("mosaic", "mosaic", prompts, ("a fox", "a panda"), ("a lion", "a frog"))
            case = replace(case, erased=(gone,))
        after = method(model, case, seed=SEED)
    else:
        after = method(model, case, seed=SEED, checkpoint=None, log=tiny.no_log)
    state = after.state_dict()
    change = {key: state[key].double() - before[key].double() for key in state}
    return {"after": fingerprint(state), "change": fingerprint(change)}


def attacked(name: str, kind: str) -> dict[str, Any]:
    """Attack for two steps and return fingerprints of weights and pictures, and all values."""
    method = build("attacks", name, kind)
    model, case = problem(kind, labelled=name == "probe_logistic")
    task = case.targets[0] if kind == "diffusion" else case.harmful[0]
    found = method(model, task, seed=SEED, budget=BUDGET, checkpoint=None)
    out = {
        "status": found.status,
        "steps": list(found.steps),
        "values": {key: list(values) for key, values in found.values.items()},
        "weights": fingerprint(found.weights),
    }
    return out | ({"samples": fingerprint(found.samples)} if found.samples else {})


def evaluated(name: str, kind: str = "linear") -> dict[str, Any]:
    """Compute a metric family on made-up runs; return value, low and high of every metric."""
    if kind == "deep":
        run = _probe_run(labelled=True)
        for model_name, model in run.models.items():
            run.models[model_name] = probes.DeepModel([("map", model.blocks[0])], model.feature_dim)
        return _figures(build("eval", name)(run))
    if "diffusion" in build("eval", name).accepts:
        metric = build("eval", name, "diffusion", scorers=pictures.FakeScorers())
        return _figures(metric(_pictures_run(one_model=metric.needs_models == 1)))
    metric = build("eval", name)
    if name == "transfer":
        return _figures(metric(_ManyCases()))
    return _figures(metric(_probe_run(labelled=name == "probe_accuracy")))


def _figures(scores: Any) -> dict[str, list[float | None]]:
    """Return the metrics, and the checks behind a verdict in their order."""
    rows = scores.tables.get("verdict", [])
    checks = [[row["value"], row["low"], row["high"], float(row["passed"])] for row in rows]
    found = {name: [s.value, s.low, s.high] for name, s in scores.metrics.items()}
    return found | {f"check {i}": check for i, check in enumerate(checks)}


def _probe_run(labelled: bool) -> Any:
    """Make a run of two attackers on two cases, whose speeds depend on seed, task and attacker."""

    def trajectory(model_name: str, attack: str, role: str, seed: int) -> Any:
        rate = 0.8 if model_name == BASELINE else 0.93 if role == "harmful" else 0.82
        rate += 0.01 * seed + (0.02 if attack == "probe_adam" else 0)
        return probes.decay(rate, probes.STEPS, 0.8 if model_name == BASELINE else 0.7)

    kind = "classification" if labelled else "regression"
    cases = tuple(
        probes.case(probes.random_data(i), probes.random_data(i + 1), name=name, kind=kind)
        for i, name in ((0, "a"), (2, "b"))
    )
    theta = torch.diag(torch.tensor([1.0, 0.4, 2.0, 0.7], dtype=torch.float64))
    theta[0, 2], theta[3, 1] = 0.3, -0.2
    logs = {"step": [0, 1, 2], "kappa_harmful": [4.0, 5.0, 7.0], "rir": [1.0, 1.5, 2.0]}
    attacks = "probe", "probe_adam"
    return probes.fake(theta, cases=cases, trajectories=trajectory, logs=logs, attacks=attacks)


class _ManyCases:
    """Ten cases whose immunization differs in strength, with attackers that feel it in part."""

    model_names, attacks = (BASELINE, IMMUNIZED), ("probe",)
    seeds, scenario, budget = (0, 1, 2), "fake", probes.BUDGET
    diverged: dict[tuple[str, int], Any] = {}

    def cases(self, seed: int) -> tuple[Case, ...]:
        def task(number: int, name: str, role: Any) -> Any:
            return probes.task(probes.random_data(number), name, role)

        def case(number: int) -> Case:
            harmful = (task(20 + number, "harm", "harmful"),)
            return Case(str(number), task(number, "good", "benign"), harmful)

        return tuple(map(case, range(10)))

    def model(self, model_name: str, case: Case, seed: int) -> Any:
        scale = 1.0 if model_name == BASELINE else 1.1 + 0.08 * int(case.name)
        return probes.linear(torch.diag(torch.tensor([1, 1 / scale, scale, 0.5]).double()))

    def history(self, case: Case, seed: int) -> dict[str, list[float]]:
        return {"step": []}

    def trajectory(self, model_name: str, attack: str, case: Case, task: Any, seed: int) -> Any:
        number = int(case.name)
        if model_name == BASELINE or task.role == "benign":
            return probes.decay(0.8, probes.STEPS)
        felt = 0.3 + 0.03 * number + 0.1 * ((7 * number + 3 * seed) % 5)
        return probes.decay(0.8 ** (1 - 0.5 * felt), probes.STEPS)


def _pictures_run(one_model: bool) -> Any:
    """Make a text-to-image run of two attackers, whose pictures depend on seed and concept."""

    def trajectory(model_name: str, attack: str, name: str, seed: int) -> Any:
        faster = attack == "full"
        shown = [0, 2 + faster, 8, 9, 10]
        cosines = [0.0, 0.6, 0.6, 0.8, 1.0]
        if model_name != BASELINE and name == "mosaic":
            shown, cosines = [0, 0, 2 + seed, 6 + faster, 9], [0.0, 0.0, 0.6, 0.6, 0.8]
        if model_name != BASELINE and name == "neon":
            shown, cosines = [0, 1, 4, 7, 8 + faster], [0.0, 0.0, 0.6, 0.8, 0.8]
        found = pictures.shares(*shown, cosines=cosines)
        found.samples["reworded"] = found.samples["name"].flip(1)
        return found

    def drifted(prompt: str, number: int) -> tuple[int, int, int]:
        return (0, 200, 0) if number % 4 == 0 else pictures.faithful(prompt, number)

    models = {BASELINE: pictures.Painter(pictures.faithful), IMMUNIZED: pictures.Painter(drifted)}
    return pictures.FakeRun(
        trajectory,
        case_list=(pictures.case(families=("name", "reworded")),),
        models=models,
        attacks=("lora", "full"),
        model_names=(BASELINE,) if one_model else (BASELINE, IMMUNIZED),
    )


def painted(style_name: str) -> dict[str, str]:
    """Return digests of what an artist makes of one scene and of finished images of the style.

    MiniSD's weights were trained on these pixels. A sum in another order changes the last bits of
    the scene and, after rounding, a pixel in dozens of images.
    """
    fox = np.asarray(openmoji.rasterise(openmoji.find("fox face").hexcode, 64), np.float32) / 255
    images = world.sample(world.Subset(OBJECTS, (style_name,)), SEED, 8).images
    paint = scenes._light if style_name == PHOTO else style(style_name).paint
    scene = paint(fox[..., :3], fox[..., 3], Dice(SEED, "scene"))
    return {"scene": digest(torch.from_numpy(scene)), "images": digest(images)}


def study(name: str) -> dict[str, Any]:
    """Run the real program for one seed; return its metrics and the committed ones of that seed."""
    committed = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    per_seed = {row["metric"]: row["0"] for row in committed["tables"]["seed_values"]}
    with tempfile.TemporaryDirectory() as folder:
        words = [word.format(name=name) for word in STUDY_WORDS]
        record = _run_program([*words, f"{OUTPUTS_KEY}={folder}"], Path(folder))
    found = {key: score["value"] for key, score in record["metrics"].items()}
    return {"found": found, "committed": per_seed}


def _run_program(words: list[str], folder: Path) -> dict[str, Any]:
    """Call `run.py` in this process and read the record that it writes."""
    old, sys.argv, told = sys.argv, ["run.py", *words], StringIO()
    GlobalHydra.instance().clear()
    try:
        with redirect_stdout(told), redirect_stderr(told):
            entry.main()
    except SystemExit as done:
        if done.code:
            raise AssertionError(f"run.py ended with {done.code}:\n{told.getvalue()}") from None
    finally:
        sys.argv = old
        GlobalHydra.instance().clear()
    (path,) = folder.rglob("record.json")
    return json.loads(path.read_text(encoding="utf-8"))


# ---- all of them, by key


@cache
def computations() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return every computation by its key."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"world/{name}": partial(painted, name) for name in (PHOTO, *(s.name for s in STYLES))
    }
    for group in ("immunize", "erase", "attacks"):
        for name in presets(group):
            if f"{group}/{name}" in LEFT_OUT:
                continue
            for kind in kinds(group, name):
                compute = attacked if group == "attacks" else partial(immunized, group)
                found[f"{group}/{name}/{kind}"] = partial(compute, name, kind)
    for name in presets("eval"):
        found[f"eval/{name}"] = partial(evaluated, name)
        metric = build("eval", name)
        if "deep" in metric.accepts and not metric.needs_attack:
            found[f"eval/{name}/deep"] = partial(evaluated, name, "deep")
    return found


def stored() -> dict[str, Any]:
    """Read the stored values."""
    return json.loads(VALUES.read_text(encoding="utf-8")) if VALUES.is_file() else {}


# ---- comparison

WEIGHTS_TOLERANCE = 1e-5  # of the norm
METRICS_TOLERANCE = 1e-9  # relative
STUDY_TOLERANCE = 1e-6  # relative
ROUNDING = 1e-12  # ratios and angles that differ by less are rounding noise


def differences(key: str, old: Any, new: Any) -> list[str]:
    """List where `new` differs from the stored `old` by more than the tolerance; empty: equal."""
    if key.startswith("eval/"):
        pairs = _paired(old, new)
        return [f"{name}: {a} -> {b}" for name, a, b in pairs if not _all_close(a, b)]
    told = [f"parts {sorted(old)} -> {sorted(new)}"] if old.keys() != new.keys() else []
    for part in old.keys() & new.keys():
        told += _part_differences(part, old[part], new[part])
    return told


def _part_differences(part: str, old: Any, new: Any) -> list[str]:
    if part == "values":  # quantities of a trajectory, each compared on its own scale
        pairs = _paired(old, new)
        return [f"{name}: {a} -> {b}" for name, a, b in pairs if not _on_scale(a, b)]
    if isinstance(old, dict):
        a, b = ([d["norm"], *d["projections"]] for d in (old, new))
        allowed = WEIGHTS_TOLERANCE * old["norm"]
        within = all(abs(x - y) <= allowed for x, y in zip(a, b, strict=True))
        return [] if within else [f"{part}: norm and projections {a} -> {b}"]
    return [] if old == new else [f"{part}: {old} -> {new}"]


def _paired(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Pair figures by name; one that is missing on a side is None there."""
    return [(name, old.get(name), new.get(name)) for name in sorted({*old, *new})]


def _all_close(old: list[float | None] | None, new: list[float | None] | None) -> bool:
    if old is None or new is None:
        return False
    return all(close(a, b, METRICS_TOLERANCE, 1e-12) for a, b in zip(old, new, strict=True))


def _on_scale(old: list[float] | None, new: list[float] | None) -> bool:
    if old is None or new is None or len(old) != len(new):
        return False
    scale = WEIGHTS_TOLERANCE * max(abs(value) for value in old)
    return all(abs(a - b) <= scale for a, b in zip(old, new, strict=True))


def close(old: float | None, new: float | None, relative: float, absolute: float) -> bool:
    """Tell whether two figures agree; two missing ones do."""
    if old is None or new is None:
        return old is new
    return old == new or abs(old - new) <= max(relative * abs(old), absolute)
