"""What determines a stage is in its key; what compares nothing is refused."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from tiny_diffusion import tiny_case, tiny_diffusion

from lab.core.cache import StageCache, StageCheckpoint
from lab.core.data import Sampling, ScenarioData
from lab.core.errors import Diverged, UserError
from lab.core.provenance import computing
from lab.core.sources import ROOT
from lab.core.types import BASELINE, Backbone, Immunizer, Scenario
from lab.runner.assemble import assemble
from lab.runner.pipeline import Pipeline

HOUSES = ["experiment=house_price", "immunize.epochs=1"]


class TinyScenario(Scenario):
    name = "tiny"
    provides = frozenset({"linear", "deep"})

    def load(self, seed):
        case = tiny.linear_case(seed)
        return ScenarioData((case, type(case)("second", case.benign, case.harmful)), (), str(seed))


@pytest.fixture
def pipeline(tmp_path):
    def make(*overrides, scenario=None):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            first = [] if overrides and overrides[0] == "experiment=relearn" else HOUSES
            cfg = compose("config", overrides=[*first, "seeds=[0]", "tracker=none", *overrides])
        changes = {"scenario": scenario or TinyScenario()}
        if isinstance(scenario, TinyConcepts):
            changes["backbone"] = TinyBackbone()
        return Pipeline(replace(assemble(cfg), **changes), StageCache(tmp_path))

    return make


def immunized_by(pipeline, call):
    """The same pipeline with ``call`` as its immunizer."""

    class Own(Immunizer):
        name, accepts = pipeline.parts.immunizer.obj.name, frozenset({"linear", "diffusion"})

        def __call__(self, model, case, **options):
            return call(model, case, **options)

    part = replace(pipeline.parts.immunizer, obj=Own())
    return Pipeline(replace(pipeline.parts, immunizer=part), pipeline.cache)


def stage_of(pipeline, model):
    return next(stage for stage in pipeline.immunize_stages() if stage.model == model)


def keys(found):
    return [
        stage.key
        for stage in (
            *found.immunize_stages(),
            *found.attack_stages(),
            found.eval_stage("conditioning"),
        )
    ]


class TinyBackbone(Backbone):
    name, kind = "tiny", "diffusion"

    def build(self, case, seed):
        return tiny_diffusion()


class TinyConcepts(Scenario):
    name = "tiny_concepts"
    provides = frozenset({"diffusion"})

    def __init__(self, **sampling):
        self.case = replace(tiny_case(), sampling=Sampling(**sampling))

    def load(self, seed):
        return ScenarioData((self.case,), (), str(seed))


@pytest.mark.parametrize(
    "override",
    [
        {"steps": 3},
        pytest.param({"guidance": 1.0}, marks=pytest.mark.slow),
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"count": 5}, marks=pytest.mark.slow),
    ],
)
def test_how_images_are_generated_is_in_the_metrics_keys_and_immunizes_nothing_anew(
    pipeline, override
):
    """Attacks have it among their own options."""
    base = {"steps": 2, "guidance": 4.0, "count": 4}
    fixed = ["experiment=relearn", "erase=none", "eval=[utility]"]
    one, other = (pipeline(*fixed, scenario=TinyConcepts(**{**base, **o})) for o in ({}, override))
    assert [c.key for c in one.immunize_stages()] == [c.key for c in other.immunize_stages()]
    assert one.eval_stage("utility").key != other.eval_stage("utility").key


def test_immunizers_see_nothing_of_attacks_and_metrics(pipeline):
    seen = []

    def immunize(model, case, **_):
        seen.append(case)
        model.unet.requires_grad_(False)
        next(model.unet.parameters()).data.add_(0)
        return model

    fixed = ["experiment=relearn", "erase=none", "eval=[utility]"]
    found = immunized_by(pipeline(*fixed, scenario=TinyConcepts(steps=3)), immunize)
    with pytest.raises(UserError, match="left every weight"):
        stage_of(found, "immunized").compute(None)
    (case,), whole = seen, found.data(0).cases[0]
    hidden = [*(t.train for t in case.targets), *(t.reference for t in case.targets)]
    assert [len(images) for images in (*hidden, case.unrelated)] == [0] * (len(hidden) + 1)
    assert (case.others, case.sampling) == ((), Sampling())
    assert all({*target.prompts} <= {"name", "description"} for target in case.targets)
    assert [t.own for t in case.targets] == [t.own for t in whole.targets]
    assert min(len(whole.others), len(whole.unrelated), len(whole.targets[0].train)) > 0


def test_an_autoencoder_is_no_protection(pipeline):
    def immunize(model, case, **_):
        after = model.copy()
        after.vae = copy.deepcopy(after.vae)
        next(after.vae.parameters()).data.add_(1)
        return after

    fixed = ["experiment=relearn", "erase=none", "eval=[utility]"]
    found = immunized_by(pipeline(*fixed, scenario=TinyConcepts(steps=3)), immunize)
    with pytest.raises(UserError, match=r"changed vae\..*puts back the published autoencoder"):
        stage_of(found, "immunized").compute(None)


@pytest.mark.parametrize(
    "override",
    [
        "immunize.lr=0.05",
        "seeds=[1]",
        "backbone.init=random",
        "budget.horizon=3",
        "eval.conditioning.size=50",
    ],
)
def test_every_input_changes_a_key(pipeline, override):
    assert keys(pipeline()) != keys(pipeline(override))


def test_the_backbone_itself_is_part_of_every_key(pipeline):
    one, other = pipeline(), pipeline()
    other.parts.backbone_identity["sources"] = "a mended bug"
    assert not set(keys(one)) & set(keys(other))


@pytest.mark.parametrize(
    ("part", "name"), [("metadata", "version"), ("torch.cuda", "is_available")]
)
def test_another_torch_or_a_gpu_computes_anew(pipeline, monkeypatch, part, name):
    """Digits depend on both; a cache that outlives an upgrade must not serve the old ones."""
    before = keys(pipeline())
    answer = {"version": lambda package: "9.9", "is_available": lambda: True}[name]
    with monkeypatch.context() as patched:
        patched.setattr(f"lab.core.provenance.{part}.{name}", answer)
        computing.cache_clear()
        other = keys(pipeline())
    computing.cache_clear()
    assert not set(before) & set(other)
    assert keys(pipeline()) == before


def test_the_baseline_model_name_is_shared_between_immunizers(pipeline):
    one, other = pipeline(), pipeline("immunize.lr=0.05")
    model_names = [{c.model: c.key for c in p.immunize_stages()} for p in (one, other)]
    assert model_names[0]["baseline"] == model_names[1]["baseline"]
    assert model_names[0]["immunized"] != model_names[1]["immunized"]


def test_a_diverged_case_is_left_out_of_attacks_and_views(pipeline):
    def diverge(model, case, **_):
        raise Diverged("too far", 3)

    found = immunized_by(pipeline(), diverge)
    artifact, _ = found.compute(stage_of(found, "immunized"))
    assert artifact.values["error"] == {"message": "too far", "last_good_step": 3}
    found.diverged["tiny", 0] = artifact.values["error"]
    assert ([c.name for c in found.cases(0)], {c.case for c in found.attack_stages()}) == (
        ["second"],
        {"second"},
    )
    found.diverged["second", 0] = artifact.values["error"]
    assert found.seeds == ()


def test_what_a_metric_keeps_is_computed_once_in_all_runs_and_anew_where_evaluation_is_forced(
    pipeline, tmp_path
):
    made = []

    def compute():
        made.append(len(made))
        return {"x": torch.tensor([made[-1]])}

    one, other = pipeline(), pipeline("immunize.lr=0.05")
    assert [run.cached("a", compute)["x"].item() for run in (one, other, one)] == [0, 0, 0]
    assert one.cached("b", compute)["x"].item() == 1
    one.cache = StageCache(tmp_path, force="eval")
    assert one.cached("a", compute)["x"].item() == 2


def test_attacks_and_metrics_count_only_for_the_weights_that_they_were_made_from(pipeline):
    run = pipeline()
    stages = [*run.immunize_stages(), *run.attack_stages(), run.eval_stage("conditioning")]
    for stage in stages:
        run.cache.get(*stage.place, stage.compute, stage.parents)
    assert all(run.cache.has(*stage.place, stage.parents) for stage in stages)
    root = next(c for c in stages if c.kind == "immunize" and c.model != BASELINE)
    moved = root.compute(StageCheckpoint(run.cache.folder("immunize", "other")))
    moved.tensors = {name: value + 1e-9 for name, value in moved.tensors.items()}
    StageCache(run.cache.root, force="immunize").get(*root.place, lambda _: moved)
    stale = [c for c in stages if not run.cache.has(*c.place, c.parents)]
    assert {(c.model, c.case) for c in stale if c.kind == "attack"} == {(root.model, root.case)}
    assert {c.kind for c in stale} == {"attack", "eval"}


@pytest.mark.parametrize("kept", [True, False])
def test_an_immunizer_that_changes_the_model_that_it_was_given_is_refused(pipeline, kept):
    def leaky(model, case, **_):
        after = model.copy()
        next(iter(after.parameters())).data.mul_(0.5)
        next(iter(model.parameters())).data.zero_()
        return after if kept else model

    found = immunized_by(pipeline(), leaky)
    with pytest.raises(UserError, match="immunize=kappa: changed the model that it was given"):
        stage_of(found, "immunized").compute(None)
