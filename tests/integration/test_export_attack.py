"""What an attacker ended with leaves the cache as files that plain diffusers and peft load."""

from __future__ import annotations

import copy

import pytest
import torch
from release_examples import finished, options
from safetensors.torch import load_file

from lab.core import record as records
from lab.core.cache import StageCache
from lab.core.errors import UserError
from lab.release.attack import choose_attack
from lab.release.export import export


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("attacked")
    path, _ = finished(root)
    return root, path


def test_the_adapter_of_one_attack_is_the_cached_one_and_loads_in_diffusers(
    run_folder, tmp_path, capsys
):
    from diffusers import StableDiffusionPipeline

    asked = options(
        run_folder, "export.attack=lora", "export.task=mosaic", f"path={tmp_path / 'adapter'}"
    )
    folder = export(asked)
    assert f"export: {folder}" in capsys.readouterr().out
    (file,) = folder.iterdir()
    cell = choose_attack(records.read(run_folder[1]), asked.export)
    assert (cell["attack"], cell["task"], cell["model"]) == ("lora", "mosaic", "mima")
    cached = StageCache(asked.paths.cache).read("attack", cell["key"]).tensors
    kept = {
        name.removeprefix("weights/"): t
        for name, t in cached.items()
        if name.startswith("weights/")
    }
    written = load_file(file)
    assert written.keys() == kept.keys()
    assert all(torch.equal(written[name], kept[name]) for name in kept)
    pipe = StableDiffusionPipeline.from_pretrained(run_folder[0] / "base")
    pipe.load_lora_weights(str(folder))
    assert pipe.get_active_adapters()


def test_the_baseline_model_name_and_a_folder_of_its_own(run_folder):
    made = [
        export(options(run_folder, "export.attack=lora", "export.task=neon", f"export.model={a}"))
        for a in ("none", "mima")
    ]
    assert made[0] != made[1]
    assert "lora-neon-none" in made[0].name
    assert made[0].parent == run_folder[0] / "outputs" / "export"
    with pytest.raises(UserError, match=r"path=.*exists and is not empty"):
        export(options(run_folder, "export.attack=lora", "export.task=neon"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export.attack=lora"], r"export=2 attacks: choose one by export\.task: mosaic, neon"),
        (["export.attack=lorra", "export.task=neon"], r"export\.attack=lorra: .*did you mean lora"),
        (["export.task=fox"], r"export\.task=fox"),
        (["export.attack=lora", "export.model=imma"], r"export\.model=imma"),
        (
            ["export.attack=lora", "export.task=neon", "push_to=me/adapter"],
            r"push_to=me/adapter: .*stays here",
        ),
        (
            ["export.attack=lora", "export.task=neon", "paths.cache=elsewhere"],
            r"paths\.cache=elsewhere: .*compute them",
        ),
    ],
)
def test_choices_that_do_not_work(run_folder, tmp_path, words, told):
    with pytest.raises(UserError, match=told):
        export(options(run_folder, f"path={tmp_path / 'adapter'}", *words))
    assert not (tmp_path / "adapter").exists()


def test_a_record_without_a_finished_attack_is_told(run_folder):
    record = copy.deepcopy(records.read(run_folder[1]))
    for cell in record["cells"]:
        cell["status"] = "diverged" if cell["stage"] == "attack" else cell["status"]
    with pytest.raises(UserError, match="holds no finished attack on mima"):
        choose_attack(record, options(run_folder, "export.attack=lora").export)
