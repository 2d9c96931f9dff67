"""From a recipe to the published folder, with tiny networks and a few steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from lab.core.cache import StageCache
from lab.core.errors import UserError
from lab.core.hashing import file_hashes
from lab.core.sources import ROOT
from lab.minisd.train import networks, recipe
from lab.minisd.train.recipe import Training, run

pytestmark = pytest.mark.slow

NETWORKS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
PLAIN = """
import sys
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
pipe.set_progress_bar_config(disable=True)
g = torch.Generator().manual_seed(1)
made = pipe("a fox", num_inference_steps=2, guidance_scale=4.0, generator=g).images[0]
assert "lab" not in sys.modules
print(made.size, made.mode, pipe.scheduler.__class__.__name__, pipe.tokenizer.model_max_length)
"""


def config(root: Path, **changes) -> DictConfig:
    """The shipped recipe with everything made small."""
    small = {
        "images": 48,
        "held_out": 8,
        "captions": 2,
        "vocabulary": 600,
        "workers": 1,
        "measured": 1,
        "widths": {
            "vae": [8, 8, 8],
            "unet": [8, 16, 16],
            "text": 32,
            "layers": 1,
            "groups": 4,
        },
        "vae": {"steps": 4, "batch": 4},
        "text": {"steps": 4, "batch": 8, "warmup": 2},
        "denoiser": {"steps": 4, "batch": 4, "warmup": 2},
        "scorers": {
            "images": 48,
            "calibrate": 12,
            "measure": 700,
            "empty": 8,
            "captions": 2,
            "vocabulary": 600,
            "width": 8,
            "workers": 1,
            "clip_widths": {
                "embed": 16,
                "image": 4,
                "text": 32,
                "layers": 1,
                "blocks": [1, 1, 1, 1],
            },
            "detector": {"steps": 4, "batch": 8},
            "clip": {"steps": 4, "batch": 8, "warmup": 2},
        },
    }
    train = OmegaConf.merge(OmegaConf.load(ROOT / "conf" / "train" / "minisd.yaml"), small, changes)
    paths = {"cache": str(root / "cache"), "outputs": str(root / "outputs")}
    return OmegaConf.create({"train": train, "threads": 1, "paths": paths, "force": []})


@pytest.fixture(scope="module", autouse=True)
def _same_mode_afterwards():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module", autouse=True)
def _few_steps_to_destroy_a_model():
    """Of 18 models, whose images the detector is measured on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lab.minisd.train.degenerate._STEPS", 2)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("minisd")


@pytest.fixture(scope="module")
def folder(root) -> Path:
    return run(config(root))


def test_training_record(folder) -> None:
    """Curves of every network, the recipe as it was given, and the hashes of the files that lie
    there.
    """
    record = json.loads((folder / "training.json").read_text())
    assert record["recipe"] == OmegaConf.to_container(config(folder).train, resolve=True)
    stages = {"vae", "text", "denoiser", "detector", "clip"}
    assert set(record["curves"]) == set(record["seconds"]) == stages
    assert [row["step"] for row in record["curves"]["denoiser"] if "loss" in row] == [4.0]
    assert record["sha256"] == {
        n: h for n, h in file_hashes(folder).items() if n.startswith(("model/", "scorers/"))
    }


def test_diffusers_alone_loads_it_in_float32_and_draws(folder, tmp_path) -> None:
    """Half precision on disk; a plain pipeline in a Python that never imports this project."""
    for name in NETWORKS:
        with safe_open(str(folder / "model" / f"{name}.safetensors"), "pt") as file:
            assert {
                file.get_tensor(k).dtype
                for k in file.keys()  # noqa: SIM118 (a safetensors file is no mapping)
                if file.get_tensor(k).is_floating_point()
            } == {torch.float16}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(folder / "model")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(64, 64) RGB DDIMScheduler 32"


def test_second_run_reads_the_cache(folder, root, monkeypatch) -> None:
    """No network is trained again, and the same bytes are written."""
    monkeypatch.setattr(networks._NetworkTraining, "step", None)
    monkeypatch.setattr(recipe, "assess", lambda *args: None)
    other = config(root)
    other.paths.outputs = str(root / "again")
    again = file_hashes(run(other))
    # the detector's error rates are measured by what is left out here
    weights = {n: h for n, h in file_hashes(folder).items() if n.startswith(("model/", "scorers/"))}
    without = {"training.json", "scorers/detector/detector.json"}
    assert {n for n, h in (again.items() ^ weights.items())} <= without
    first, second = (
        json.loads((root / name / "minisd/training.json").read_text())
        for name in ("outputs", "again")
    )
    assert (second["curves"], second["seconds"]) == (first["curves"], first["seconds"])


def test_seed_and_recipe_determine_the_weights(folder, root, tmp_path) -> None:
    """A fresh cache repeats the weights bit for bit; another seed gives others."""

    def vae(**changes) -> dict[str, torch.Tensor]:
        options = instantiate(config(root, **changes).train, _convert_="all")
        return Training(options, StageCache(tmp_path)).vae().half().state_dict()

    saved = load_file(folder / "model" / f"{NETWORKS[1]}.safetensors")
    again, other = vae(), vae(seed=1)
    assert saved.keys() == again.keys()
    # the scale of the latents is folded into two layers of the saved one
    assert all(torch.equal(v, again[k]) for k, v in saved.items() if "quant_conv" not in k)
    assert not torch.equal(other["encoder.conv_in.weight"], saved["encoder.conv_in.weight"])


def test_what_belongs_to_which_stage(root) -> None:
    """Options that cannot change a network do not cost its training; those that can do."""

    def key(stage: str, **changes) -> str:
        options = instantiate(config(root, **changes).train, _convert_="all")
        return json.dumps(options.identity(stage), sort_keys=True)

    for stage in ("vae", "text", "denoiser", "detector", "clip"):
        for changes in ({"workers": 2}, {"measured": 3}, {"scorers": {"workers": 2}}):
            assert key(stage, **changes) == key(stage)
        assert key(stage, seed=1) != key(stage)
    assert key("vae", denoiser={"steps": 5}) == key("vae") == key("vae", text={"steps": 5})
    for stage in ("vae", "text", "denoiser"):
        assert key(stage, never_seen=["fox"]) != key(stage)
    assert key("clip", never_seen=["fox"]) == key("clip")
    for changes in ({"vae": {"lr": 1.0}}, {"images": 47}, {"gamma": 1.0}):
        assert key("denoiser", **changes) != key("denoiser")
        assert key("clip", **changes) == key("clip")


def test_a_model_never_sees_what_the_recipe_names(root, tmp_path) -> None:
    """The images leave the concepts out; the tokenizer, and so every shape, stays the same."""
    cache = StageCache(tmp_path)
    given = config(root, never_seen=["fox", "neon"], seed=3).train
    made, plain = (
        Training(instantiate(train, _convert_="all"), cache)
        for train in (given, config(root).train)
    )
    assert {"fox", "neon"}.isdisjoint(
        name for p in made.images.pictures for name in (*p.objects, p.style)
    )
    assert made.tokenizer().get_vocab() == plain.tokenizer().get_vocab()
    unknown = instantiate(config(root, never_seen=["unicorn"]).train, _convert_="all")
    with pytest.raises(UserError, match=r"train\.never_seen=unicorn"):
        _ = Training(unknown, cache).images


def test_a_wrong_recipe_names_its_key(root) -> None:
    with pytest.raises(UserError) as caught:
        run(config(root, scorers={"vocabulary": 10}))
    assert caught.value.key == "train.scorers.vocabulary"
