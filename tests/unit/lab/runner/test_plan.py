"""The plan of a run: what is cached, and how long the others take."""

from types import SimpleNamespace

from omegaconf import OmegaConf

from lab.core.types import BASELINE, IMMUNIZED
from lab.runner.pipeline import Stage
from lab.runner.plan import STEP_SECONDS, StagePlan


def make_plan(tmp_path, cached=()):
    def stage(kind, **labels):
        return Stage(kind, f"{kind}-{labels}", lambda _: None, case="a", seed=0, **labels)

    pipeline = SimpleNamespace(
        immunize_stages=lambda: [
            stage("immunize", model=m, shards=n) for m, n in ((BASELINE, 0), (IMMUNIZED, 1))
        ],
        attack_stages=lambda: [
            stage("attack", model=m, attack="lora", task="a") for m in (BASELINE, IMMUNIZED)
        ],
        eval_stage=lambda name: Stage("eval", name, lambda _: None, metric=name),
        cache=SimpleNamespace(has=lambda stage, key, parents: stage in cached),
        budget=SimpleNamespace(steps=10),
        parts=SimpleNamespace(backbone=SimpleNamespace(kind="diffusion")),
    )
    config = {"backbone": {}, "scenario": {}, "budget": {}, "attacks": {"lora": {}}, "eval": {}}
    cfg = OmegaConf.create(config | {"immunize": {"steps": 5}, "paths": {"runs": str(tmp_path)}})
    return StagePlan(cfg, pipeline, ["relearning"])


def test_times_are_defaults_first_and_then_those_of_this_run(tmp_path, caplog):
    plan, default = make_plan(tmp_path), STEP_SECONDS["diffusion"]
    seconds = [plan.seconds(stage) for stage in plan.stages]
    assert seconds == [
        0,
        5 * default["immunize"],
        10 * default["attack"],
        10 * default["attack"],
        default["eval"],
    ]
    plan.finish(plan.stages[0], 0.1)  # a baseline is only loaded
    plan.finish(plan.stages[2], 4.0)
    assert [plan.seconds(stage) for stage in plan.stages[1:4]] == [seconds[1], 4.0, 4.0]
    with caplog.at_level("INFO", logger="progress"):
        plan.announce(plan.stages[3], 1)
    assert caplog.messages == ["[4/5] attack lora on a, immunized, seed 0 … ETA 00:10"]


def test_cached_stages_take_no_time(tmp_path):
    plan = make_plan(tmp_path, cached=("immunize", "attack", "eval"))
    assert plan.describe() == "5 stages, 5 cached"
