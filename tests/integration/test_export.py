"""From a record to a folder that others load: models, deltas, attacks, the card."""

import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from diffusers import StableDiffusionPipeline
from release_examples import composed, options, tiny_folder
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import image_case
from tiny_diffusion import tiny_case
from tiny_sd import tiny_pipeline

from immunize.controls import StoredUnet
from lab.core import record as records
from lab.core.cache import Artifact, StageCache
from lab.core.errors import UserError
from lab.core.hashing import state_hash
from lab.core.types import changed_tensors
from lab.models.diffusion import DiffusionModel
from lab.models.vision import VisionBackbone
from lab.release.export import (
    Release,
    check_trusted,
    choose,
    export,
    rebuild,
    write,
)
from lab.release.verify import check, read_sums
from lab.runner.experiment import run_once

UNET = "unet/diffusion_pytorch_model.safetensors"


def chosen(run_folder):
    """Record and the stage of its immunized model."""
    record = records.read(run_folder[1])
    return record, choose(record, "immunize", composed().export)


# ---- what is written


def test_plain_diffusers_loads_the_immunized_weights(exported, run_folder):
    pipe = StableDiffusionPipeline.from_pretrained(exported)
    release = rebuild(*chosen(run_folder), options(run_folder))
    state = pipe.unet.state_dict()
    expected, original = (m.unet.state_dict() for m in (release.released, release.original))
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert not all(torch.equal(state[name], value) for name, value in original.items())
    assert pipe("a fox", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_the_folder_holds_its_evidence_and_nothing_of_the_machine(exported, run_folder):
    original, kept = records.read(run_folder[1]), records.read(exported / "record.json")
    assert kept["content_hash"] == original["content_hash"]
    assert kept["provenance"]["host"] == kept["config"]["paths"] == "removed"
    assert {"README.md", "record.json", "export.json", UNET} <= set(read_sums(exported))
    place = str(run_folder[0]).encode()
    others = [p for p in exported.rglob("*") if p.is_file() and p.name != "record.json"]
    assert not [p for p in others if place in p.read_bytes()]
    changed, whole = load_file(exported / "delta.safetensors"), load_file(exported / UNET)
    assert 0 < len(changed) < len(whole)


def test_the_baseline_can_be_exported_for_comparison(run_folder):
    folder = export(options(run_folder, "export.model=baseline"))
    assert "NOT immunized" in (folder / "README.md").read_text()
    assert json.loads((folder / "export.json").read_text())["immunized"] == {}


def test_two_exports_are_equal_byte_by_byte(run_folder, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the working directory can be the place
    export(options(run_folder, "path=."))
    assert (tmp_path / "SHA256SUMS").read_bytes() == (exported / "SHA256SUMS").read_bytes()


def test_changed_tensors_alone_serve_as_an_immunizer(run_folder, exported, tmp_path):
    file = export(options(run_folder, f"path={tmp_path / 'unet.safetensors'}"))
    with pytest.raises(UserError, match="exists"):
        export(options(run_folder, f"path={file}"))
    method = StoredUnet(path=str(file))
    case = tiny_case()
    targets = json.loads(safe_open(file, "pt").metadata()["facts"])["targets"]
    method.check((replace(case, targets=(replace(case.targets[0], name=targets[0]),)),))
    with pytest.raises(UserError, match=r"immunize.path=.*not nothing"):
        method.check((replace(case, targets=(replace(case.targets[0], name="nothing"),)),))
    stored, whole = load_file(file), load_file(exported / UNET)
    assert 0 < len(stored) < len(whole)
    close = {"rtol": 1e-3, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(stored, {name: whole[name] for name in stored}, **close)
    (tmp_path / "unet_1.safetensors").write_bytes(file.read_bytes())
    by_seed = StoredUnet(path=str(tmp_path / "unet_{seed}.safetensors"))
    assert by_seed.fingerprint() == method.fingerprint()
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no U-Net that"):
        StoredUnet(path=str(tmp_path / "bad.safetensors")).fingerprint()


# ---- other layouts


def as_if(run_folder, backbone, config, published, released, folder):
    """Export ``released`` as if the finished run had been about it."""
    record, stage = chosen(run_folder)
    record["config"]["backbone"] = config
    stage["weights"] = state_hash(changed_tensors(published, released))
    release = Release(backbone, published, published, released, ("a note",), ("mosaic",))
    write(record, stage, release, folder)
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
    config = records.read(run_folder[1])["config"]["backbone"]
    config |= {"name": "sd", "path": str(tmp_path / "base")}
    folder = as_if(run_folder, None, config, published, released, tmp_path / "out")
    assert "bit for bit" in check(folder)[-1]
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_weights_outside_the_unet_are_refused(run_folder, tmp_path):
    published = DiffusionModel.from_pipeline(tiny_pipeline("sd1"))
    released = published.copy()
    next(released.text_encoders[0].parameters()).data += 1
    with pytest.raises(UserError, match="outside the U-Net"):
        as_if(run_folder, None, {"name": "sd"}, published, released, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_a_vision_network_loads_in_plain_timm(run_folder, tmp_path, model):
    backbone = VisionBackbone(model=model, weights="random", image_size=64)
    published = backbone.build(image_case(0), 0)
    config = {"_target_": "lab.models.vision.VisionBackbone", "name": "net", "image_size": 64}
    folder = as_if(run_folder, backbone, config, published, published, tmp_path / "out")
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = network.forward_features(published.inputs(x))
        assert torch.allclose(network.forward_head(maps, pre_logits=True), published(x), atol=1e-5)
    check(folder)


def test_a_linear_extractor_is_one_matrix(tmp_path):
    small = [
        *("seeds=[0]", "immunize.epochs=2", "budget.horizon=3", "budget.multiple=2"),
        *("budget.points=4", "tracker=none", "threads=1", f"paths.outputs={tmp_path}"),
    ]
    path = run_once(composed("experiment=house_price", *small), tmp_path / "run")
    folder = export(composed(f"records={path}", f"paths.outputs={tmp_path}"))
    (theta,) = load_file(folder / "model.safetensors").values()
    assert theta.dtype == torch.float64
    assert not torch.equal(theta, torch.eye(len(theta), dtype=torch.float64))
    check(folder)


# ---- attacks


def test_the_adapter_of_one_attack_is_the_cached_one_and_loads_in_diffusers(run_folder, tmp_path):
    words = ("export.attack=lora", "export.task=mosaic", f"path={tmp_path / 'adapter'}")
    folder = export(options(run_folder, *words))
    cfg = options(run_folder, *words)
    stage = choose(records.read(run_folder[1]), "attack", cfg.export)
    assert (stage["attack"], stage["task"], stage["model"]) == ("lora", "mosaic", "immunized")
    cached = StageCache(cfg.paths.cache).read("attack", stage["key"]).tensors
    (file,) = folder.iterdir()
    for name, tensor in load_file(file).items():
        assert torch.equal(tensor, cached[f"weights/{name}"])
    pipe = StableDiffusionPipeline.from_pretrained(run_folder[0] / "base")
    pipe.load_lora_weights(str(folder))
    assert pipe.get_active_adapters()


# ---- what cannot be exported


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["path=."], r"path=\.: exists and is not empty"),
        (["export.case=nothing"], r"export\.case=nothing"),
        (["export.model=imunized"], r"export\.model=imunized: did you mean immunized"),
        (["export.attack=lora"], r"choose a .*export\.task=mosaic.*export\.task=neon"),
        (["export.attack=lorra", "export.task=neon"], r"export\.attack=lorra: did you mean lora"),
        (["paths.cache=elsewhere"], r"paths\.cache=elsewhere: .*run\.py immunize=mima`"),
    ],
)
def test_choices_and_places_that_do_not_work(run_folder, tmp_path, words, message):
    (run_folder[1].parent / ".hydra").mkdir(exist_ok=True)
    (run_folder[1].parent / ".hydra" / "overrides.yaml").write_text("- immunize=mima\n")
    with pytest.raises(UserError, match=message):
        export(options(run_folder, f"path={tmp_path / 'x'}", *words))
    assert not (tmp_path / "x").exists()


def test_weights_that_nobody_measured_are_refused(run_folder, tmp_path):
    """The same recipe, computed again on another machine, lies in the cache under the same key."""
    cache = shutil.copytree(run_folder[0] / "outputs" / "cache", tmp_path / "cache")
    _, stage = chosen(run_folder)
    measured = StageCache(cache).read("immunize", stage["key"])
    shutil.rmtree(StageCache(cache).folder("immunize", stage["key"]))
    name, tensor = next(iter(measured.tensors.items()))
    other = Artifact(measured.values, {**measured.tensors, name: tensor * (1 + 1e-6)})
    StageCache(cache).get("immunize", stage["key"], lambda _: other)
    with pytest.raises(UserError, match="holds other weights than were measured"):
        export(options(run_folder, f"paths.cache={cache}", f"path={tmp_path / 'x'}"))


def test_other_original_weights_are_refused(run_folder, tmp_path):
    record, stage = chosen(run_folder)
    record["config"]["backbone"]["path"] = str(tiny_folder(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="original weights computed here are not those"):
        rebuild(record, stage, options(run_folder))


@pytest.mark.parametrize(
    "target", ["os.system", "lab.core.provenance.subprocess.Popen", "nowhere.Thing"]
)
def test_a_record_runs_no_code_of_others(run_folder, target):
    with pytest.raises(UserError, match=r"records\._target_"):
        check_trusted({"erase": {"deep": [{"_target_": target}]}}, options(run_folder))
    with pytest.raises(UserError, match="resolved values only"):
        check_trusted({"backbone": {"path": "${oc.env:HOME}"}}, options(run_folder))


def test_an_own_class_is_trusted_where_the_command_names_it(run_folder):
    cfg = options(run_folder)
    cfg.scenario._target_ = "my_concepts.Mine"
    check_trusted({"scenario": {"_target_": "my_concepts.Mine"}}, cfg)
