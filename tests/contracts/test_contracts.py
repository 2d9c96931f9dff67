"""One contract suite over every immunizer × every model kind and every attacker × every model
kind.
"""

import dataclasses
from functools import cache
from types import SimpleNamespace

import pytest
import tiny
import torch
from assertions import same_weights
from presets import build, kinds, nodes, presets, problem

from lab.core import sources
from lab.core.cache import StageCache
from lab.core.data import ScenarioData
from lab.core.sources import ROOT
from lab.core.types import Attacker, Budget, Immunizer, RunMetric
from lab.runner.assemble import Part, Parts
from lab.runner.pipeline import Pipeline

BUDGET = Budget(horizon=4, multiple=2, points=5)


def choices(group):
    """(name, kind) of every preset of a group and every kind of feature model that it takes."""
    return [(n, k) for n in presets(group) for k in kinds(group, n) if k != "diffusion"]


@pytest.mark.parametrize(("name", "kind"), choices("immunize"))
class TestImmunizer:
    def test_meets_the_contract_and_leaves_its_input_alone(self, name, kind):
        method = build("immunize", name, kind)
        assert isinstance(method, Immunizer)
        assert method.name == name
        model, case = problem(kind, harmful=2)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        data = [t.train.x.clone() for t in case.tasks]
        after, again = (
            method(model, case, seed=3, checkpoint=None, log=tiny.no_log) for _ in range(2)
        )
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(t.train.x, x) for t, x in zip(case.tasks, data, strict=True))
        assert all(torch.isfinite(v.double()).all() for v in after.state_dict().values())
        assert same_weights(after, again)
        assert same_weights(after, model) == (name == "none")


WITH_LAYERS = [
    n for n, k in choices("immunize") if k == "deep" and "layers" in nodes("immunize")[n]
]


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_only_declared_parameters_move(name):
    method = dataclasses.replace(build("immunize", name, "deep"), layers=1)
    model, case = problem("deep")
    after = method(model, case, seed=0, checkpoint=None, log=tiny.no_log)
    assert {name.split(".")[1] for name in moved(model, after)} == {"2"}


def attacked_problem(name, kind):
    return problem(kind, labelled=name == "probe_logistic")


def launch(attack, model, task, budget, seed=0):
    """The trajectory of an attack that leaves ``model`` alone."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = attack(model, task, seed=seed, budget=budget, checkpoint=None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), attack.name
    assert found.steps[0] == 0, attack.name
    assert all(len(values) == len(found.steps) for values in found.values.values()), attack.name
    assert found.status in ("ok", "diverged"), attack.name
    return found


def run_attack(name, kind):
    """(attack, trajectory, the copies that it trained)."""
    model, case = attacked_problem(name, kind)
    attack = build("attacks", name, kind)
    copies = []
    if (
        opens := getattr(attack, "open", None)
    ) is not None:  # a probe trains no copy: its features stay
        attack.open = lambda net, seed: (copies.append(net), opens(net, seed))[1]
    return attack, launch(attack, model, case.harmful[0], BUDGET), copies


attacked = cache(run_attack)  # what tests only read


def moved(model, copied):
    """Names in ``copied`` that are new or hold other values than in ``model``; adapters wrap
    layers.
    """
    old, new = (
        model.state_dict(),
        {k.replace(".base_layer.", "."): v for k, v in copied.state_dict().items()},
    )
    assert old.keys() <= new.keys()
    # a new word makes one table longer; a linear extractor is trained in double precision
    same = {
        k
        for k, v in old.items()
        if torch.equal(new[k][: len(v)] if v.dim() else new[k], v.to(new[k].dtype))
    }
    return new.keys() - same


def check_round_trip(found, name, model, case, task, folder, budget=BUDGET):
    """A trajectory that one pipeline stores is the same, bit for bit, in another one that
    reads it.
    """

    def pipeline(attack):
        none = Part(build("immunize", "none"), {}, "")
        parts = Parts(
            scenario=SimpleNamespace(
                name="tiny", load=lambda seed: ScenarioData((case,), (), "tiny")
            ),
            backbone=SimpleNamespace(build=lambda case, seed: model.copy()),
            backbone_identity={},
            eraser=Part(lambda built, case, seed: built, {}, ""),
            immunizer=none,
            baseline=none,
            attacks={name: Part(attack, {}, "")},
            metrics={},
            budget=budget,
            seeds=(0,),
        )
        return Pipeline(parts, StageCache(folder))

    where = ("baseline", name, case, task, 0)
    pipeline(lambda *_, **__: found).trajectory(*where)
    loaded = pipeline(lambda *_, **__: pytest.fail("the attack was not stored")).trajectory(*where)
    facts = ("steps", "values", "status", "info")
    assert [getattr(loaded, fact) for fact in facts] == [getattr(found, fact) for fact in facts]
    for ours, theirs in ((loaded.weights, found.weights), (loaded.samples, found.samples)):
        assert ours.keys() == theirs.keys()
        assert all(ours[k].dtype == v.dtype and torch.equal(ours[k], v) for k, v in theirs.items())


@pytest.mark.parametrize(("name", "kind"), choices("attacks"))
class TestAttacker:
    def test_meets_the_contract(self, name, kind):
        attack, found, _ = attacked(name, kind)
        assert isinstance(attack, Attacker)
        assert attack.name == name
        assert found.steps == sorted(set(found.steps))
        if found.status == "ok":
            assert found.steps[-1] == BUDGET.steps
            assert BUDGET.horizon in found.steps
        assert {"train_loss", "test_loss"} <= set(found.values)
        assert ("test_accuracy" in found.values) == (kind == "deep" or name == "probe_logistic")
        assert found.weights

    def test_learns_the_training_task(self, name, kind):
        _, found, _ = attacked(name, kind)
        assert found.values["train_loss"][-1] < found.values["train_loss"][0]

    def test_same_seed_same_bits(self, name, kind):
        (_, a, _), (_, b, _) = attacked(name, kind), run_attack(name, kind)
        assert a.values == b.values
        assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)

    def test_only_declared_parameters_move(self, name, kind):
        _, found, copies = attacked(name, kind)
        model, _ = attacked_problem(name, kind)
        heads = {"head", "mean", "deviation"} if name == "probe_standardized" else {"head"}
        assert heads <= found.weights.keys()
        parameters = dict(model.named_parameters())
        declared = {
            "last_block_finetune": {k for k in parameters if k.startswith("blocks.2.")},
            "extractor_full_finetune": set(parameters),
            "extractor_gauss_newton": set(parameters),
            "extractor_lora": {k for k in found.weights if ".lora_" in k},
        }.get(name, set())
        assert found.weights.keys() - heads == declared
        assert len(copies) == bool(declared)
        assert all(moved(model, copied) == declared for copied in copies)

    def test_the_store_gives_back_what_the_attack_gave(self, name, kind, tmp_path):
        model, case = attacked_problem(name, kind)
        check_round_trip(attacked(name, kind)[1], name, model, case, case.harmful[0], tmp_path)


@pytest.mark.parametrize("name", presets("eval"))
def test_metric_meets_the_contract(name):
    assert isinstance(build("eval", name), RunMetric)


def test_the_suite_covers_every_choice():
    for group in ("immunize", "attacks"):
        assert all(kinds(group, name) for name in presets(group)), group


def test_no_immunizer_reaches_a_scorer():
    """Through any chain of imports: what decides about a model must not be what the model was
    trained against.
    """
    todo = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "immunize").rglob("*.py")
    ]
    seen = set()
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo.extend(sources._imports(module))
    assert not {module for module in seen if module.startswith("lab.scorers")}
