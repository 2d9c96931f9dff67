"""The computations whose results `values.json` holds; every key in it names one of them.

A key is `GROUP/PRESET/KIND` with the names of files in `conf/`, so it outlives a move of a module.
Where keys of `conf/` get other names, change the tables in `presets`.
"""

import json
import math
import tempfile
from dataclasses import replace
from functools import cache, partial

import fake_generations as fakes
import fake_run as probes
import numpy as np
import tiny
import torch
from presets import build, kinds, presets, problem

import lab.api
from lab.core.data import Case, Erasure
from lab.core.hashing import digest
from lab.core.sources import ROOT
from lab.core.types import BASELINE, IMMUNIZED, Budget
from lab.minisd.world import openmoji, scenes, world
from lab.minisd.world.dice import Dice
from lab.minisd.world.vocabulary import OBJECTS, PHOTO, STYLE

VALUES = ROOT / "tests" / "golden" / "values.json"
RECORDS = ROOT / "outputs" / "records" / "house_price_table"  # committed results of the real table

BUDGET = Budget(horizon=1, multiple=2, at=(0, 1, 2))  # two steps, a snapshot after each
SEED = 3
# where the last bits decide: a kernel in float32; a step over the smallest singular values; SOAP's
# eigenvectors of a preconditioner that is zero before LoRA's second step
PROCESSORS_DIFFER = {"gauss_newton": 5e-4, "kappa_opt": 5e-4, "lora_soap": 5e-2}
DTYPE = torch.float64  # of diffusion models: float32 differs by 5e-5 between versions of torch

# ---- fingerprints of weights


@cache
def _directions(position, shape):
    """Return four fixed directions for the tensor at a position in the order of the names."""
    seed = 1_000_003 * position
    for size in shape:
        seed = (1_009 * seed + size + 1) % 2**61
    stream = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.randn(4, count, generator=stream, dtype=torch.float64)


def fingerprint(tensors):
    """Return the norm of all tensors together and four random projections, in float64."""
    total, projections = 0.0, torch.zeros(4, dtype=torch.float64)
    for position, name in enumerate(sorted(tensors)):
        flat = tensors[name].detach().to(torch.float64).flatten()
        total += float(flat @ flat)
        projections += _directions(position, tuple(tensors[name].shape)) @ flat
    return {"norm": total**0.5, "projections": projections.tolist()}


# ---- computations


def immunized(group, name, kind):
    """Immunize, or erase, and return fingerprints of the weights and of their change."""
    method, (model, case) = build(group, name, kind), problem(kind, dtype=DTYPE)
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


def attacked(name, kind):
    """Attack for two steps and return fingerprints of weights and images, and all values."""
    method = build("attacks", name, kind)
    model, case = problem(kind, labelled=name == "probe_logistic", dtype=DTYPE)
    task = case.targets[0] if kind == "diffusion" else case.harmful[0]
    found = method(model, task, seed=SEED, budget=BUDGET, checkpoint=None)
    out = {
        "status": found.status,
        "steps": list(found.steps),
        "values": {key: list(values) for key, values in found.values.items()},
        "weights": fingerprint(found.weights),
    }
    return out | ({"samples": fingerprint(found.samples)} if found.samples else {})


def evaluated(name, kind="linear"):
    """Compute a metric family on made-up runs; return value, low and high of every metric."""
    if kind == "deep":
        run = _probe_run(labelled=True)
        for model_name, model in run.models.items():
            run.models[model_name] = probes.DeepModel([("map", model.blocks[0])], model.feature_dim)
        return _figures(build("eval", name)(run))
    if "diffusion" in build("eval", name).accepts:
        metric = build("eval", name, "diffusion", scorers=fakes.FakeScorers())
        return _figures(metric(_images_run(one_model=metric.released)))
    metric = build("eval", name)
    if name == "transfer":
        return _figures(metric(_ManyCases()))
    return _figures(metric(_probe_run(labelled=name == "probe_accuracy")))


def _figures(scores):
    """Return the metrics, and the checks behind a verdict in their order."""
    rows = scores.tables.get("verdict", [])
    checks = [[row["value"], row["low"], row["high"], float(row["passed"])] for row in rows]
    found = {name: [s.value, s.low, s.high] for name, s in scores.metrics.items()}
    return found | {f"check {i}": check for i, check in enumerate(checks)}


def _probe_run(labelled):
    """Make a run of two attackers on two cases, whose speeds depend on seed, task and attacker."""

    def trajectory(model_name, attack, role, seed):
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


class _ManyCases(probes.FakeRun):
    """Ten cases whose immunization differs in strength, with attackers that feel it in part."""

    def cases(self, seed):
        def task(number, name, role):
            return probes.task(probes.random_data(number), name, role)

        def case(number):
            harmful = (task(20 + number, "harm", "harmful"),)
            return Case(str(number), task(number, "good", "benign"), harmful)

        return tuple(map(case, range(10)))

    def model(self, model_name, case, seed):
        scale = 1.0 if model_name == BASELINE else 1.1 + 0.08 * int(case.name)
        return probes.linear(torch.diag(torch.tensor([1, 1 / scale, scale, 0.5]).double()))

    def trajectory(self, model_name, attack, case, task, seed):
        number = int(case.name)
        if model_name == BASELINE or task.role == "benign":
            return probes.decay(0.8, probes.STEPS)
        felt = 0.3 + 0.03 * number + 0.1 * ((7 * number + 3 * seed) % 5)
        return probes.decay(0.8 ** (1 - 0.5 * felt), probes.STEPS)


def _images_run(one_model):
    """Make a text-to-image run of two attackers, whose images depend on seed and concept."""

    def trajectory(model_name, attack, name, seed):
        faster = attack == "full"
        shown = [0, 2 + faster, 8, 9, 10]
        cosines = [0.0, 0.6, 0.6, 0.8, 1.0]
        if model_name != BASELINE and name == "mosaic":
            shown, cosines = [0, 0, 2 + seed, 6 + faster, 9], [0.0, 0.0, 0.6, 0.6, 0.8]
        if model_name != BASELINE and name == "neon":
            shown, cosines = [0, 1, 4, 7, 8 + faster], [0.0, 0.0, 0.6, 0.8, 0.8]
        found = fakes.shares(*shown, cosines=cosines)
        found.samples["reworded"] = found.samples["name"].flip(1)
        return found

    def drifted(prompt, number):
        return (0, 200, 0) if number % 4 == 0 else fakes.faithful(prompt, number)

    return fakes.FakeRun(
        trajectory,
        case_list=(fakes.case(families=("name", "reworded")),),
        models={BASELINE: fakes.Painter(fakes.faithful), IMMUNIZED: fakes.Painter(drifted)},
        attacks=("lora", "full"),
        model_names=(BASELINE,) if one_model else (BASELINE, IMMUNIZED),
    )


def painted(style_name):
    """Return digests of what an artist makes of one scene and of finished images of the style.

    MiniSD's weights were trained on these pixels. A sum in another order changes the last bits of
    the scene and, after rounding, a pixel in dozens of images.
    """
    fox_face = openmoji.by_name()["fox face"].hexcode
    fox = np.asarray(openmoji.rasterise(fox_face, 64), np.float32) / 255
    images = world.sample(world.Subset(OBJECTS, (style_name,)), SEED, 8).images
    paint = scenes._light if style_name == PHOTO else STYLE[style_name].paint
    scene = paint(fox[..., :3], fox[..., 3], Dice(SEED, "scene"))
    return {"scene": digest(torch.from_numpy(scene)), "images": digest(images)}


def study(name):
    """Run the real program for one seed; return its metrics and the committed ones of that seed."""
    committed = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    per_seed = {row["metric"]: row["0"] for row in committed["tables"]["seed_values"]}
    words = ["experiment=house_price", "seeds=[0]", "tracker=none", f"immunize={name}"]
    with tempfile.TemporaryDirectory() as folder:
        record = lab.api.run([*words, f"paths.outputs={folder}"])
    found = {key: score["value"] for key, score in record["metrics"].items()}
    return {"found": found, "committed": per_seed}


# ---- all of them, by key


@cache
def computations():
    """Return every computation by its key."""
    found = {f"world/{name}": partial(painted, name) for name in (PHOTO, *STYLE)}
    for group in ("immunize", "erase", "attacks"):
        for name in presets(group):
            for kind in kinds(group, name):
                compute = attacked if group == "attacks" else partial(immunized, group)
                found[f"{group}/{name}/{kind}"] = partial(compute, name, kind)
    for name in presets("eval"):
        found[f"eval/{name}"] = partial(evaluated, name)
        metric = build("eval", name)
        if "deep" in metric.accepts and not metric.needs_attack:
            found[f"eval/{name}/deep"] = partial(evaluated, name, "deep")
    return found


def stored():
    """Read the stored values."""
    return json.loads(VALUES.read_text(encoding="utf-8")) if VALUES.is_file() else {}


# ---- comparison


def differences(key, old, new):
    """List where `new` differs from the stored `old` by more than the tolerance; empty: equal."""
    before, after = _figures_by_name(old), _figures_by_name(new)
    pairs = [(name, before.get(name), after.get(name)) for name in sorted({*before, *after})]
    return [f"{name}: {a} -> {b}" for name, a, b in pairs if not _agree(key, a, b)]


def _figures_by_name(result):
    """Flatten what a computation returns: lists of figures, and texts."""
    found = {}
    for name, part in result.items():
        if name == "values":
            found |= part
        else:
            found[name] = [part["norm"], *part["projections"]] if isinstance(part, dict) else part
    return found


def _agree(key, old, new):
    """Compare metrics to 1e-9, and weights and losses to 1e-5 of the largest figure, or by
    `PROCESSORS_DIFFER`.
    """
    if not isinstance(old, list) or not isinstance(new, list):
        return bool(old == new)
    rel, absolute = 1e-9, 1e-12
    if not key.startswith("eval/"):
        wide = [width for name, width in PROCESSORS_DIFFER.items() if name in key]
        rel, absolute = 0.0, max([1e-5, *wide]) * max(map(abs, old))
    return len(old) == len(new) and all(map(partial(close, rel=rel, absolute=absolute), old, new))


def close(old, new, rel, absolute):
    """Tell whether two figures agree; two missing ones do."""
    if old is None or new is None:
        return old is new
    return math.isclose(old, new, rel_tol=rel, abs_tol=absolute)
