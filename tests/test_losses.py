"""An attacker or a metric with a defect: the others of its run go on, and nothing is claimed without it."""

import json

import pytest
import yaml
from entry_point import FAST, record_of

from attacks.linear_probe import LinearProbe
from eval.report.leaderboard import leaderboard
from lab.errors import UserError


class Broken(LinearProbe):
    """Fails on the immunized arm only, or wherever it runs."""

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


class BrokenMetric:
    accepts = frozenset({"linear"})
    needs_arms, needs_attack, name = 1, True, "broken_metric"

    def __call__(self, run):
        raise ZeroDivisionError("nothing to divide by")


@pytest.fixture
def broken(cli, tmp_path):
    def call(*arguments, group="attacks", **options):
        place = tmp_path / "conf" / group
        place.mkdir(parents=True)
        target = "Broken" if group == "attacks" else "BrokenMetric"
        (place / "broken.yaml").write_text(yaml.safe_dump({"broken": {"_target_": f"{__name__}.{target}", **options}}))
        return cli("--config-dir", str(tmp_path / "conf"), *FAST, *arguments)

    return call


def test_the_other_attackers_figures_are_those_of_a_run_without_it_and_there_is_no_verdict(broken, cli, tmp_path):
    code, out, err = broken("attacks=[broken,linear_probe]")
    assert code == 1
    assert "broken LotArea failed, the others go on: ZeroDivisionError: nothing to divide by" in err
    assert "in __call__" in err, "the traceback"
    record = record_of(out, tmp_path)
    assert (record["status"], record["error"]["type"]) == ("failed", "ZeroDivisionError")
    mine = [cell["status"] for cell in record["cells"] if cell["attack"] == "broken"]
    assert mine == ["failed", *["pending"] * (len(mine) - 1)], "an attack that failed is not tried again"
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
    rows = leaderboard([record | {"attacks": whole["attacks"]}, whole])
    assert [row["status"] for row in rows] == ["ok", "failed"]


def test_an_attacker_that_failed_on_one_task_counts_on_none(broken, tmp_path):
    code, out, _ = broken("attacks=[broken,linear_probe]", error="second task")
    assert code == 1
    record = record_of(out, tmp_path)
    states = [cell["status"] for cell in record["cells"] if cell["attack"] == "broken"]
    assert states == ["ok", "ok", "failed", "pending"]
    assert "broken" not in json.dumps([record["metrics"]["slowdown_harmful_worst"], record["tables"], record["curves"]])


def test_a_run_whose_only_attacker_failed_has_no_figures(broken, tmp_path):
    code, out, _ = broken("attacks=[broken]")
    assert code == 1
    record = record_of(out, tmp_path)
    assert record["status"] == "failed"
    assert record["metrics"] == {}


@pytest.mark.parametrize(("error", "code"), [("mended", 2), ("disk", 2)])
def test_what_a_user_mends_first_ends_the_run_at_once(broken, tmp_path, error, code):
    found, out, err = broken("attacks=[broken,linear_probe]", error=error)
    assert found == code, err
    record = record_of(out, tmp_path)
    assert "linear_probe" not in {cell["attack"] for cell in record["cells"]}


def test_a_metric_that_fails_does_not_stop_the_others(broken, cli, tmp_path):
    code, out, _ = broken("eval=[broken,verdict]", group="eval")
    assert code == 1
    record = record_of(out, tmp_path)
    assert record["skipped"] == {"broken": "ZeroDivisionError: nothing to divide by"}
    assert record["status"] == "failed"
    assert record["metrics"]["verdict"]["value"] is not None, "every attack was run, and this metric is whole"
