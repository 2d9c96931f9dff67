"""An attacker or a metric with a defect: the others of its run go on, and nothing is claimed
without it.
"""

import gc
import json
import weakref

import pytest
import torch
import yaml
from entry_point import FAST, record_of

from attacks.probes.linear_probe import LinearProbe
from eval.report.compare import compare
from eval.report.leaderboard import leaderboard, to_markdown
from eval.report.outcomes import outcome
from eval.report.summary import summary
from lab.core.errors import UserError
from lab.core.types import RunMetric, Score, Scores
from lab.release.card import make_card
from lab.runner.failed_stages import describe, is_recoverable
from lab.runner.pipeline import Cell

FACTS = {"kind": "linear", "model": "kappa", "case": "house_price", "seed": 0, "versions": {}}


class Broken(LinearProbe):
    """Fails wherever it runs, or on all tasks but the first."""

    def __init__(self, *, error="defect", name="broken"):
        super().__init__(name=name)
        self.error = error

    def __call__(self, model, task, **kwargs):
        if self.error == "mended":
            raise UserError("attacks.broken.lr", -1, "must be positive.")
        if self.error == "disk":
            raise OSError(28, "No space left on device")
        if self.error != "second task" or task.name != "LotArea":
            raise ZeroDivisionError("nothing to divide by")
        return super().__call__(model, task, **kwargs)


class BrokenMetric(RunMetric):
    accepts = frozenset({"linear"})
    needs_models, needs_attack, name = 1, True, "broken"

    def __init__(self, *, returns=None):
        self.returns = returns

    def __call__(self, run):
        if self.returns is None:
            raise ZeroDivisionError("nothing to divide by")
        name, value = self.returns
        return Scores({name: Score(value)})


@pytest.fixture
def broken(cli, tmp_path):
    def call(*arguments, group="attacks", **options):
        place = tmp_path / "conf" / group
        place.mkdir(parents=True, exist_ok=True)
        target = "Broken" if group == "attacks" else "BrokenMetric"
        (place / "broken.yaml").write_text(
            yaml.safe_dump({"broken": {"_target_": f"{__name__}.{target}", **options}})
        )
        return cli("--config-dir", str(tmp_path / "conf"), *FAST, *arguments)

    return call


def test_the_other_attackers_figures_are_those_of_a_run_without_it_and_there_is_no_verdict(
    broken, cli, tmp_path
):
    code, out, err = broken("attacks=[broken,linear_probe]")
    assert code == 1
    assert "broken LotArea failed, the others go on: ZeroDivisionError: nothing to divide by" in err
    assert "in __call__" in err, "the traceback"
    assert err.rstrip().endswith("error: attacks.broken: ZeroDivisionError: nothing to divide by")
    record = record_of(out, tmp_path)
    assert (record["status"], record["error"]["type"]) == ("failed", "ZeroDivisionError")
    assert record["error"]["key"] == "attacks.broken"
    mine = [cell["status"] for cell in record["cells"] if cell["attack"] == "broken"]
    assert mine == ["failed", *["pending"] * (len(mine) - 1)], (
        "an attack that failed is not tried again"
    )
    assert {c["status"] for c in record["cells"] if c["attack"] != "broken"} == {"ok"}
    assert any("attack broken failed" in note for note in record["notes"])
    code, out, err = cli(*FAST)
    assert code == 0, err
    whole = record_of(out, tmp_path)
    assert whole["provenance"]["cache_misses"] == 0, "nothing that was finished is computed again"
    for name, metric in whole["metrics"].items():
        if name in ("verdict", "verdict_share"):
            assert record["metrics"][name]["value"] is None
            assert "broken failed" in record["metrics"][name]["note"]
        else:
            assert record["metrics"][name] == metric
    assert "verdict" not in record["tables"]
    assert "left out" in summary(record)
    assert outcome(record).details[0].endswith("nothing to divide by. Figures are of the others.")


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ("scenario", "lab.scenarios.tabular.Tabular.load"),
        ("backbone", "lab.models.linear.LinearBackbone.build"),
        ("erase", "lab.models.erase.NoErasure.__call__"),
    ],
)
def test_a_defect_of_what_all_stages_start_from_is_named_by_its_own_key(
    part, place, monkeypatch, cli, tmp_path
):
    def broken(*_, **__):
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr(place, broken)
    code, out, err = cli(*FAST)
    assert code == 1
    assert err.rstrip().endswith(f"error: {part}: ZeroDivisionError: nothing to divide by")
    assert record_of(out, tmp_path)["error"]["key"] == part


def test_a_record_that_lacks_an_attack_is_neither_ranked_nor_surely_better(broken, tmp_path):
    found = []
    for name in ("kappa", "kappa_ill_only"):
        _, out, _ = broken("attacks=[broken,linear_probe]", f"immunize={name}")
        found.append(record_of(out, tmp_path))
    rows = leaderboard(found)
    assert [(row["rank"], row["best"], row["status"]) for row in rows] == [(None, [], "failed")] * 2
    text = to_markdown(rows)
    assert "holds" not in text.split("↑")[0]
    assert "fails" not in text
    assert not any(row["sure"] for row in compare(*found)["metrics"] if "worst" in row["name"])
    card = make_card(found[0], FACTS, ())
    assert "Attackers that failed and are in no figure: broken" in card
    assert "| broken | 0 |" in card


def test_an_attacker_that_failed_on_one_task_counts_on_none(broken, tmp_path):
    code, out, _ = broken("attacks=[broken,linear_probe]", error="second task")
    assert code == 1
    record = record_of(out, tmp_path)
    states = [cell["status"] for cell in record["cells"] if cell["attack"] == "broken"]
    assert states == ["ok", "ok", "failed", "pending"]
    assert "broken" not in json.dumps(
        [record["metrics"]["slowdown_harmful_worst"], record["tables"], record["curves"]]
    )


def test_what_failed_frees_its_memory_while_the_others_go_on():
    def fail(tensor):
        raise RuntimeError(f"out of memory beside {tensor.shape}")

    tensor = torch.zeros(3)
    held = weakref.ref(tensor)
    try:
        fail(tensor)
    except RuntimeError as error:
        failure = describe(error)
    del tensor
    gc.collect()
    assert held() is None
    assert failure.type == "RuntimeError"


def test_a_device_whose_state_is_lost_ends_the_run():
    cell = Cell("attack", "k", lambda _: None, attack="broken")
    assert not is_recoverable(cell, RuntimeError("CUDA error: device-side assert triggered"))
    assert is_recoverable(cell, RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"))


@pytest.mark.parametrize(("error", "code"), [("mended", 2), ("disk", 2)])
def test_what_a_user_mends_first_ends_the_run_at_once(broken, tmp_path, error, code):
    found, out, err = broken("attacks=[broken,linear_probe]", error=error)
    assert found == code, err
    record = record_of(out, tmp_path)
    assert {c["status"] for c in record["cells"] if c["attack"] == "linear_probe"} <= {"pending"}


def test_a_metric_that_fails_does_not_stop_the_others(broken, cli, tmp_path):
    code, out, _ = broken("eval=[broken,verdict]", group="eval")
    assert code == 1
    record = record_of(out, tmp_path)
    assert record["skipped"] == {"broken": "ZeroDivisionError: nothing to divide by"}
    assert record["status"] == "failed"
    assert record["metrics"]["verdict"]["value"] is not None, (
        "every attack was run, and this metric is whole"
    )


@pytest.mark.parametrize(
    ("returns", "metric"), [(["mine", None], "broken"), (["verdict", 1.0], "verdict")]
)
def test_a_metric_whose_scores_no_record_can_hold_is_left_out_by_name(
    broken, tmp_path, returns, metric
):
    code, out, _ = broken("eval=[broken,verdict]", group="eval", returns=returns)
    assert code == 1
    record = record_of(out, tmp_path)
    assert record["status"] == "failed"
    assert list(record["skipped"]) == [metric]
    assert record["error"]["key"] == f"eval.{metric}"
