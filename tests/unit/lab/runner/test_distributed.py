"""Processes that share one immunization: what they exchange, equal weights for any number of them,
faults that show.
"""

import math

import pytest
import torch
from mima_examples import model
from ranks_together import together
from team_cases import failing, immunized, immunized_with_a_fault, shared, summed

from lab.core.distributed import ALONE, Team, team, working

pytestmark = pytest.mark.slow

SIZES = (1, 2, 3)


def relative(a, b):
    """Largest distance of two sets of tensors, relative to each tensor's norm."""
    assert a.keys() == b.keys()
    return max(
        float((a[name].double() - b[name].double()).norm() / b[name].double().norm()) for name in b
    )


def test_a_process_alone_needs_no_group():
    assert team() is ALONE
    assert ALONE.broadcast({"x": torch.ones(1)}) == {"x": torch.ones(1)}
    assert (ALONE.broadcast_object(3), ALONE.gather({2: "b"})) == (3, {2: "b"})
    with working(inner := Team()):
        assert team() is inner
    assert team() is ALONE


def test_tensors_of_any_kind_and_values_reach_everyone(tmp_path):
    first, *others = together(3, shared, folder=tmp_path)
    tensors, values = first
    assert tensors["half"].dtype == torch.bfloat16
    assert torch.equal(tensors["half"], torch.full((2, 3), 2.0, dtype=torch.bfloat16))
    assert float(tensors["scalar"]) == 2.5
    assert torch.equal(tensors["turned"], (torch.arange(6.0).view(2, 3) + 2).t())
    assert values == {"rank": 2, "wide": [math.inf, "ä"], "gathered": [[10, 0], [11, 1], [12, 2]]}
    for theirs, told in others:
        assert (told, theirs.keys()) == (values, tensors.keys())
        assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("count", [1, 5])
def test_terms_are_added_in_their_order_wherever_they_were_computed(tmp_path, count):
    """Also with fewer terms than processes, and with a number that does not divide."""
    plain = together(1, summed, count, folder=tmp_path)[0]
    for size in (2, 3):
        found = together(size, summed, count, folder=tmp_path)
        assert sorted(n for _, values in found for n in values["own"]) == list(range(count))
        for tensors, values in found:
            assert values["order"] == list(range(count))
            assert torch.equal(tensors["total"], plain[0]["total"])


@pytest.mark.parametrize("kind", ["Diverged", "FloatingPointError"])
def test_a_term_without_a_number_ends_all_processes_alike(tmp_path, kind):
    found = [values for _, values in together(2, failing, kind, folder=tmp_path)]
    assert (found[0], found[0]["raised"], found[0]["message"]) == (found[1], kind, "no number")
    assert found[0].get("step") == (7 if kind == "Diverged" else None)


def test_1_2_and_3_processes_agree(tmp_path):
    """float32; the weights have left the original by a hundred times the bound. 20 steps:
    test_launch_concepts.py.
    """
    changes = {"steps": 4, "lr": 1e-3, "batch_size": 1, "prior_batch_size": 1}
    alone, *found = (together(size, immunized, "mima", changes, folder=tmp_path) for size in SIZES)
    weights, log = alone[0]
    original = model().state_dict()
    assert relative(weights, {name: original[name] for name in weights}) > 1e-3
    for processes in found:
        for theirs, told in processes:
            assert relative(theirs, weights) <= 1e-5
            assert relative(theirs, processes[0][0]) == 0
            for (_, one), (_, other) in zip(told["rows"], log["rows"], strict=True):
                assert one == pytest.approx(other, rel=1e-4, nan_ok=True)


NAMES = ["plain", "bfloat16", "alternating", "implicit", "learned", "lora", "deep"]
VARIANTS = [
    ("mima_first_order", {}),
    ("mima", {"precision": "bfloat16"}),
    ("mima_released", {}),
    ("mima", {"hypergradient": {"method": "implicit", "iterations": 2}}),
    ("mima", {"merge": {"rule": "gated"}}),
    (
        "mima",
        {
            "inner_loop": {"steps": 2, "optimizer": "adamw", "lr": 1e-2, "rank": 2},
            "optimizer": "sgd",
            "clip": 0.1,
        },
    ),
    ("mima_deep", {"steps": 8, "k_max": 3}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=NAMES)
def test_every_way_through_the_lower_level_agrees(tmp_path, name, changes):
    small = {"batch_size": 1, "prior_batch_size": 1, **changes}
    alone, (first, second) = (
        together(size, immunized, name, small, folder=tmp_path) for size in (1, 2)
    )
    assert relative(first[0], alone[0][0]) <= 1e-5
    assert relative(second[0], first[0]) == 0
    assert first[1] == second[1]


@pytest.mark.parametrize(("name", "steps"), [("mima", 2), ("mima_deep", 4)])
def test_a_checkpoint_of_one_process_is_continued_by_two(tmp_path, name, steps):
    """The first checkpoint: of ``mima_deep`` in the middle of an attack."""
    changes = {"steps": steps, "checkpoint_every": steps // 2, "batch_size": 1}
    whole = together(1, immunized, name, changes, folder=tmp_path)[0]
    for tensors, values in together(2, immunized, name, changes, True, folder=tmp_path):
        assert relative(tensors, whole[0]) <= 1e-5
        assert len(values["rows"]) == steps


def test_a_last_bit_that_differs_is_noticed(tmp_path):
    for _, values in together(
        2,
        immunized_with_a_fault,
        "mima_first_order",
        {"steps": 4, "batch_size": 1},
        2,
        folder=tmp_path,
    ):
        assert values["raised"] == "OutOfStep"
