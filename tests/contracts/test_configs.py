"""Every YAML composes and every target binds its options."""

import inspect
from functools import cache

import presets
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from marks import with_slow
from omegaconf import OmegaConf

from lab.cli.search import Plan
from lab.core.errors import UserError
from lab.core.sources import ROOT
from lab.runner.assemble import assemble

composed = cache(presets.composed)  # read only: a composition takes a tenth of a second

PARTS = ("scenario", "backbone", "erase", "immunize", "scorers", "tracker")  # composed alone
LISTS = ("attacks", "eval")  # composed all at once
GROUPS = ("launch", "paths", "experiment", "experiment/paper", "debug")


def names(group):
    folder = ROOT / ("sweeps" if group == "sweeps" else f"conf/{group}")
    return sorted(path.stem for path in folder.glob("*.yaml"))


def targets(node, path=""):
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}".strip("."))


def check_targets(cfg):
    found = list(targets(OmegaConf.to_container(OmegaConf.create(cfg), resolve=False)))
    for path, node in found:
        options = {k: v for k, v in node.items() if not k.startswith("_")}
        signature = inspect.signature(get_object(node["_target_"]))
        (signature.bind_partial if node.get("_partial_") else signature.bind)(**options)
        inside = path.split(".")[0] in ("scorers", "train", "tracker") or ".scorers." in path
        inside = inside or path.endswith(".detector")
        assert inside or options.get("name") or node.get("_partial_"), f"{path} has no name"
    return found


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in GROUPS for n in names(g)])
def test_every_choice_composes_and_binds(group, name):
    group, _, folder = group.partition("/")
    assert len(check_targets(composed(f"{group}={folder}/{name}".replace("=/", "=")))) >= 4


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in PARTS for n in names(g)])
def test_every_part_binds_and_has_the_name_of_its_file(group, name):
    node = composed(config=f"{group}/{name}")[group]
    assert check_targets({group: node}) or group == "tracker"
    named = group in ("scenario", "backbone", "immunize") or "name" in node
    assert not named or node.name == name, f"conf/{group}/{name}.yaml calls itself {node.name}"


@pytest.mark.parametrize("group", LISTS)
def test_every_attack_and_metric_binds_and_has_the_name_of_its_file(group):
    choices = [name for name in names(group) if name != "none"]
    node = composed(f"{group}=[{','.join(choices)}]")[group]
    assert sorted(node) == choices
    check_targets({group: node})
    assert all(node[key].name == key for key in node)


# train_* have no models, audit_sd no concepts but those of `action=audit concepts=FILE`
NO_RUN = ("train_minisd", "train_extractor", "audit_sd")
RUN = [n for n in names("experiment") if n not in NO_RUN]


@pytest.mark.parametrize("name", [*RUN, *(f"paper/{n}" for n in names("experiment/paper"))])
def test_the_parts_of_every_experiment_fit(name):
    """What an experiment leaves at the table of contents' default must take its backbone too;
    nothing is loaded.
    """
    try:
        given = ["scenario.captions=[a street]"] if name.startswith("paper/") else []
        parts = assemble(composed(f"experiment={name}", *given))
    except UserError as error:
        if error.key != "backbone.path":
            raise
        pytest.skip("MiniSD's weights are not there")
    scorers = [m.obj.scorers for m in parts.metrics.values() if hasattr(m.obj, "scorers")]
    assert all((j.name == "minisd") == (parts.backbone.name == "minisd") for j in scorers), (
        "scorers of another world"
    )
    assert scorers or parts.backbone.kind != "diffusion"


# one of each form: a table of methods, of variants, of an extractor's options, a search
FORMS = ("lite", "merge_ablation", "kappa_options", "tune_mima_deep")


@pytest.mark.parametrize("name", with_slow(names("sweeps"), {*names("sweeps")} - {*FORMS}))
def test_every_sweep_expands_to_the_number_of_runs_it_states(name):
    text = (ROOT / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8")
    sweep = OmegaConf.create(text)
    if sweep.get("action") == "search":
        cfg = composed(f"sweeps={name}")
        assert Plan.read(cfg).trials == cfg.sweep.runs
        check_targets(cfg)
        return
    if "sweeper" not in sweep.get("hydra", {}):  # it inherits from another sweep
        sweep = composed(f"sweeps={name}", return_hydra_config=True)
    assert sweep.sweep.cost
    assert str(sweep.hydra.mode).endswith("MULTIRUN")
    params = [f"{key}={value}" for key, value in sweep.hydra.sweeper.params.items()]
    jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)[0]
    jobs = [list(job) for job in jobs]
    assert len(jobs) == sweep.sweep.runs
    seen = set()
    for job in (jobs[0], jobs[-1], *jobs):
        groups = {word.partition("=")[0]: word for word in job}
        choices = {word for group, word in groups.items() if f"\n{group}:" in text}
        if not seen or job is jobs[-1] or not choices <= seen:  # others differ in values only
            check_targets(composed(f"sweeps={name}", *job))
        seen |= choices | {name}


ON_HOUSES = ["kappa_options", "imma_options"]


@pytest.mark.parametrize(
    "name", ["merge_ablation", "mima_options", "lower_level_ablation", *ON_HOUSES]
)
def test_ablations_change_one_thing_at_a_time_from_the_preset(name):
    """`sweep.variant` repeats the presets' values; without a change they must be the presets'."""
    ablation = composed(f"sweeps={name}")
    changes = OmegaConf.to_container(ablation.sweep.variant)
    where = "experiment=house_price" if name in ON_HOUSES else "experiment=ablation"
    attacks = [f"attacks=[{','.join(ablation.attacks)}]"] if name in ON_HOUSES else []
    preset = composed(where, f"immunize={ablation.immunize.name}", *attacks)
    assert changes
    for group in ("immunize", "scenario", *(["attacks"] if attacks else [])):
        found, expected = (
            OmegaConf.to_container(c[group], resolve=True) for c in (ablation, preset)
        )
        if name == "lower_level_ablation" and group == "immunize":
            assert (found.pop("steps"), expected.pop("steps")) == (
                120,
                480,
            )  # a quarter of the preset's
        assert found == expected
