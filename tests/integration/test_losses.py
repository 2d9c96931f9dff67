"""An attacker or a metric with a defect: the others of its run go on, and nothing is claimed
without it.
"""

import json

import pytest
import yaml
from entry_point import FAST, record_of

from attacks.probes.linear_probe import LinearProbe
from lab.core.errors import UserError
from lab.core.types import RunMetric
from lab.runner.experiment import is_recoverable
from lab.runner.pipeline import Stage


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

    def __call__(self, run):
        raise ZeroDivisionError("nothing to divide by")


@pytest.fixture
def broken(cli, tmp_path):
    def call(*arguments, code, group="attacks", **options):
        place = tmp_path / "conf" / group
        place.mkdir(parents=True, exist_ok=True)
        target = "Broken" if group == "attacks" else "BrokenMetric"
        (place / "broken.yaml").write_text(
            yaml.safe_dump({"broken": {"_target_": f"{__name__}.{target}", **options}})
        )
        return cli("--config-dir", str(tmp_path / "conf"), *FAST, *arguments, code=code)

    return call


def test_the_other_attackers_figures_are_those_of_a_run_without_it_and_there_is_no_verdict(
    broken, cli, tmp_path
):
    out, err = broken("attacks=[broken,linear_probe]", code=1)
    assert "failed, the others go on: ZeroDivisionError: nothing to divide by" in err
    assert err.rstrip().endswith("error: attacks.broken: ZeroDivisionError: nothing to divide by")
    record = record_of(out, tmp_path)
    assert (record["status"], record["error"]["type"], record["error"]["key"]) == (
        "failed",
        "ZeroDivisionError",
        "attacks.broken",
    )
    mine = [stage["status"] for stage in record["stages"] if stage["attack"] == "broken"]
    assert mine == ["failed", *["pending"] * (len(mine) - 1)], (
        "an attack that failed is not tried again"
    )
    assert {c["status"] for c in record["stages"] if c["attack"] != "broken"} == {"ok"}
    whole = record_of(cli(*FAST).out, tmp_path)
    assert whole["provenance"]["cache_misses"] == 0, "nothing that was finished is computed again"
    for name, metric in whole["metrics"].items():
        if name in ("verdict", "verdict_share"):
            assert record["metrics"][name]["value"] is None
            assert "broken failed" in record["metrics"][name]["note"]
        else:
            assert record["metrics"][name] == metric
    assert "verdict" not in record["tables"]


def test_a_device_whose_state_is_lost_ends_the_run():
    stage = Stage("attack", "k", lambda _: None, attack="broken")
    assert not is_recoverable(stage, RuntimeError("CUDA error: device-side assert triggered"))
    assert is_recoverable(stage, RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"))


def test_an_attacker_that_failed_on_one_task_counts_on_none(broken, tmp_path):
    told = broken("attacks=[broken,linear_probe]", error="second task", code=1)
    record = record_of(told.out, tmp_path)
    states = [stage["status"] for stage in record["stages"] if stage["attack"] == "broken"]
    assert states == ["ok", "ok", "failed", "pending"]
    assert "broken" not in json.dumps(
        [record["metrics"]["slowdown_harmful_worst"], record["tables"], record["curves"]]
    )


@pytest.mark.parametrize("error", ["mended", "disk"])
def test_what_a_user_mends_first_ends_the_run_at_once(broken, tmp_path, error):
    record = record_of(broken("attacks=[broken,linear_probe]", error=error, code=2).out, tmp_path)
    assert {c["status"] for c in record["stages"] if c["attack"] == "linear_probe"} <= {"pending"}


def test_a_metric_that_fails_does_not_stop_the_others(broken, cli, tmp_path):
    record = record_of(broken("eval=[broken,verdict]", group="eval", code=1).out, tmp_path)
    assert record["skipped"] == {"broken": "ZeroDivisionError: nothing to divide by"}
    assert record["status"] == "failed"
    assert record["metrics"]["verdict"]["value"] is not None, (
        "every attack was run, and this metric is whole"
    )
