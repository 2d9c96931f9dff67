"""From a record to a folder that others load, and back: what was altered is found and named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from release_examples import composed, finished, move, options, tiny_folder
from safetensors.torch import load_file
from tiny import image_case
from tiny_sd import tiny_pipeline

from lab.core import record as records
from lab.core.cache import Artifact, StageCache
from lab.core.data import ScenarioData
from lab.core.errors import UserError
from lab.models.diffusion import DiffusionModel
from lab.models.vision import VisionBackbone
from lab.release.checksums import read_sums, write_sums
from lab.release.export import export, write
from lab.release.source import Models, choose, own_classes, parts_of, rebuild, target, trusted
from lab.release.verify import check
from lab.runner.experiment import run_once

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """(root, record file) of one finished run."""
    root = tmp_path_factory.mktemp("release")
    path, _ = finished(root)
    return root, path


@pytest.fixture(scope="module")
def exported(run_folder):
    return export(options(run_folder))


# ---- what is written


def test_plain_diffusers_loads_the_immunized_weights(exported, run_folder):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(exported)
    record = records.read(run_folder[1])
    cfg = options(run_folder)
    models = rebuild(record, choose(record, cfg.export), cfg)
    found, expected = pipe.unet.state_dict(), models.released.unet.state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert not all(torch.equal(v, models.original.unet.state_dict()[k]) for k, v in found.items())
    assert pipe("a fox", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_the_folder_holds_what_a_release_needs(exported, run_folder):
    card = (exported / "README.md").read_text()
    for said in (
        "immunized by mima",
        "`steps=2`",
        "lora",
        "attack success",
        "not run",
        "licence",
        "1 seed(s)",
    ):
        assert said in card, said
    assert re.search(r"\| attack success.*\| 0 \| \[0, 0\.602\]", card), (
        "none of four pictures is no certainty"
    )
    untried = next(line for line in card.splitlines() if "that were not run" in line)
    assert {"lora_fast", "custom_diffusion", "dreambooth"} <= set(re.findall(r"\w+", untried))
    assert not {"lora", "linear_probe", "none"} & set(re.findall(r"\w+", untried))
    assert "={}" not in card
    original, kept = records.read(run_folder[1]), records.read(exported / "record.json")
    assert kept["content_hash"] == original["content_hash"]
    assert kept["provenance"]["host"] == kept["config"]["paths"] == "removed"
    assert set(read_sums(exported)) >= {
        "README.md",
        "record.json",
        "export.json",
        "delta.safetensors",
        UNET,
    }
    place = str(run_folder[0])
    assert not [
        p
        for p in exported.rglob("*")
        if p.is_file() and place.encode() in p.read_bytes() and p != exported / "record.json"
    ]
    assert "`lower.rank=null`" in card
    assert card.count("OpenMoji (") == 1
    assert not [p for p in exported.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    changed = load_file(exported / "delta.safetensors")
    whole = load_file(exported / UNET)
    assert 0 < len(changed) < len(whole)
    assert all(torch.equal(v, whole[k]) for k, v in changed.items())


def test_the_baseline_model_name_can_be_exported_for_comparison(run_folder):
    folder = export(options(run_folder, "export.model=none"))
    assert "NOT immunized" in (folder / "README.md").read_text()
    facts = json.loads((folder / "export.json").read_text())
    assert facts["changed"]["by_the_immunizer"] == 0
    assert facts["changed"]["tensors"] > 0  # what was erased
    assert not check(folder).failed


def test_two_exports_are_equal_byte_by_byte(run_folder, exported, tmp_path):
    again = export(options(run_folder, f"path={tmp_path / 'again'}"))
    assert (again / "SHA256SUMS").read_bytes() == (exported / "SHA256SUMS").read_bytes()


def test_the_working_directory_can_be_the_place(run_folder, exported, tmp_path, monkeypatch):
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    export(options(run_folder, "path=."))
    assert Path.cwd() == place, "it is still there"
    assert (place / "SHA256SUMS").read_bytes() == (exported / "SHA256SUMS").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


# ---- other layouts


def as_if(run_folder, backbone, published, released, folder):
    """An export of ``released`` as if the finished run had been about it."""
    record = records.read(run_folder[1])
    record["config"]["backbone"] = backbone
    record["backbone"] = backbone["name"]
    record["content_hash"] = records.content_hash(record)
    models = Models(published, published, released, None, ScenarioData((), ("a note",)))
    write(record, choose(record, composed().export), models, folder)
    return folder


@pytest.mark.parametrize("layout", ["sd2", "xl"])
def test_other_stable_diffusions(run_folder, tmp_path, layout):
    pipe = tiny_pipeline(layout)
    pipe.save_pretrained(tmp_path / "base")
    published = DiffusionModel.from_pipeline(pipe)
    released = published.copy()
    for name, p in released.unet.named_parameters():
        if ".attn2.to_k" in name:
            p.data += 0.1
    backbone = {
        **records.read(run_folder[1])["config"]["backbone"],
        "name": "sd",
        "path": str(tmp_path / "base"),
    }
    folder = as_if(run_folder, backbone, published, released, tmp_path / "out")
    report = check(folder)
    assert [line[:2] for line in report.lines][-1] == ("ok", "delta"), report.lines
    card = (folder / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "license: other" in card


def test_weights_outside_the_unet_are_refused(run_folder, tmp_path):
    pipe = tiny_pipeline("sd1")
    published = DiffusionModel.from_pipeline(pipe)
    released = published.copy()
    next(released.text_encoders[0].parameters()).data += 1
    with pytest.raises(UserError, match="outside the U-Net"):
        as_if(run_folder, {"name": "sd"}, published, released, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_efficientnet"])
def test_a_vision_network_loads_in_plain_timm(run_folder, tmp_path, model):
    config = {
        "_target_": "lab.models.vision.VisionBackbone",
        "name": "net",
        "model": model,
        "weights": "random",
    }
    config["image_size"] = 64
    built = VisionBackbone(model=model, weights="random", image_size=64).build(image_case(0), 0)
    folder = as_if(run_folder, config, built, built, tmp_path / "out")
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found = network.forward_head(network.forward_features(built.inputs(x)), pre_logits=True)
        assert torch.allclose(found, built(x), atol=1e-5)
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3)).astype(np.uint8)
    picture = Image.fromarray(noise).resize((180, 100))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    measured = built.inputs(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    assert torch.allclose(transform(picture)[None], measured, atol=0.05)  # a step of 8 bits is 0.02
    assert not check(folder).failed
    move(folder / "model.safetensors")
    write_sums(folder)
    assert ("model.safetensors", "does not hold the weights that export.json names") in check(
        folder
    ).failed


def test_a_linear_extractor_is_one_matrix(tmp_path):
    shared = [
        "experiment=house_price",
        "seeds=[0]",
        "immunize.epochs=2",
        "tracker=none",
        "budget.horizon=3",
        "budget.multiple=2",
        "threads=1",
    ]
    shared += ["budget.points=4", f"paths.outputs={tmp_path}"]
    path = run_once(composed(*shared), tmp_path / "run")
    case = records.read(path)["cells"][0]["case"]
    folder = export(composed(f"records={path}", f"paths.outputs={tmp_path}", f"export.case={case}"))
    (theta,) = load_file(folder / "model.safetensors").values()
    assert theta.dtype == torch.float64
    assert not torch.equal(theta, torch.eye(len(theta), dtype=torch.float64))
    assert 'load_file("DIR/model.safetensors")["theta"]' in (folder / "README.md").read_text()
    assert not check(folder).failed
    move(folder / "model.safetensors", by=float("inf"))
    write_sums(folder)
    assert {what for state, what, _ in check(folder).lines if state == "FAILED"} == {"weights"}


# ---- what cannot be exported


def test_choices_and_places_that_do_not_work(run_folder, exported, tmp_path):
    with pytest.raises(UserError, match="exists and is not empty"):
        export(options(run_folder, f"path={exported}"))
    with pytest.raises(UserError, match=r"export\.case=nothing"):
        export(options(run_folder, "export.case=nothing"))
    with pytest.raises(UserError, match=r"export\.model=imma.*did you mean mima"):
        export(options(run_folder, "export.model=imma"))
    with pytest.raises(UserError, match="name the record"):
        export(composed("action=export"))
    (tmp_path / "a").mkdir()
    for name in "ab":
        (tmp_path / "a" / name).mkdir()
        shutil.copy(run_folder[1], tmp_path / "a" / name / "record.json")
    with pytest.raises(UserError, match="2 records"):
        export(composed(f"records={tmp_path / 'a'}"))


def test_several_models_ask_for_a_choice(run_folder):
    record = records.read(run_folder[1])
    cell = next(c for c in record["cells"] if c["model"] == "mima" and c["stage"] == "immunize")
    record["cells"].append({**cell, "seed": 1})
    with pytest.raises(UserError, match=r"export.seed=0; .*export.seed=1"):
        choose(record, composed().export)
    assert choose(record, composed("export.seed=1").export).seed == 1
    cell["status"] = "diverged"
    record["cells"].pop()
    with pytest.raises(UserError, match="seed 0 diverged"):
        choose(record, composed().export)


def test_weights_that_left_the_cache_name_the_command(run_folder, tmp_path):
    notes = run_folder[1].parent / ".hydra"
    notes.mkdir(exist_ok=True)
    (notes / "overrides.yaml").write_text("- experiment=relearn\n- immunize=mima\n")
    with pytest.raises(
        UserError, match=r"paths\.cache=.*run\.py experiment=relearn immunize=mima`"
    ):
        export(options(run_folder, f"paths.cache={tmp_path}", f"path={tmp_path / 'x'}"))


def test_a_damaged_stage_is_not_exported(run_folder, tmp_path):
    cache = shutil.copytree(run_folder[0] / "outputs" / "cache", tmp_path / "cache")
    record = records.read(run_folder[1])
    chosen = choose(record, composed().export)
    file = StageCache(cache).folder("immunize", chosen.key) / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="no whole weights"):
        export(options(run_folder, f"paths.cache={cache}", f"path={tmp_path / 'x'}"))


def test_weights_that_nobody_measured_are_refused(run_folder, tmp_path):
    """The same recipe, computed again on another machine, lies in the cache under the same key."""
    cache = shutil.copytree(run_folder[0] / "outputs" / "cache", tmp_path / "cache")
    chosen = choose(records.read(run_folder[1]), composed().export)
    place = StageCache(cache).folder("immunize", chosen.key)
    measured = StageCache(cache).read("immunize", chosen.key)
    shutil.rmtree(place)
    name, tensor = next(iter(measured.tensors.items()))
    other = Artifact(measured.values, {**measured.tensors, name: tensor * (1 + 1e-6)})
    StageCache(cache).get("immunize", chosen.key, lambda _: other)
    with pytest.raises(
        UserError, match=r"paths\.cache=.*holds other weights .* than were measured"
    ):
        export(options(run_folder, f"paths.cache={cache}", f"path={tmp_path / 'x'}"))


def test_other_original_weights_are_refused(run_folder, tmp_path):
    record = records.read(run_folder[1])
    record["config"]["backbone"]["path"] = str(tiny_folder(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="original weights computed here are not those"):
        rebuild(record, choose(record, composed().export), options(run_folder))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "lab.core.provenance.subprocess.run",
        "lab.core.hashing.write_atomically",
        "nowhere.Thing",
        3,
    ],
)
def test_a_record_runs_no_code_of_others(run_folder, target):
    record = records.read(run_folder[1])
    record["config"]["scenario"]["_target_"] = target
    with pytest.raises(UserError, match=r"scenario\._target_"):
        parts_of(record)
    with pytest.raises(UserError, match=r"erase\.deep\[0\]\._target_"):
        trusted({"deep": [{"_target_": target}]}, "erase")


def test_a_folder_that_cannot_be_written_is_told_before_any_work(run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("/proc/none/release", tmp_path / "file" / "release"):
        with pytest.raises(UserError, match=r"path=.*cannot be written"):
            target(options(run_folder, f"path={place}"), "release")


def test_an_own_scenario_is_exported_where_the_command_names_it(run_folder, tmp_path, monkeypatch):
    """The record alone does not do: what the user chose for this command does."""
    record = records.read(run_folder[1])
    given = record["config"]["scenario"]["_target_"]
    module, _, name = given.rpartition(".")
    (tmp_path / "my_concepts.py").write_text(
        f"from {module} import {name}\n\n\nclass Mine({name}):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    record["config"]["scenario"]["_target_"] = "my_concepts.Mine"
    with pytest.raises(UserError, match="--config-dir"):
        rebuild(record, choose(record, composed().export), options(run_folder))
    cfg = options(run_folder)
    cfg.scenario._target_ = "my_concepts.Mine"
    assert "my_concepts.Mine" in own_classes(cfg)
    assert type(parts_of(record, own_classes(cfg)).scenario).__name__ == "Mine"


def test_a_record_interpolates_nothing(run_folder):
    record = records.read(run_folder[1])
    record["config"]["backbone"]["path"] = "${oc.env:HOME}"
    with pytest.raises(UserError, match="resolved values only"):
        parts_of(record)
