"""One command for the release engineer: it attacks a checkpoint and ends in a verdict."""

import json
import re

import pytest
import torch
import yaml
from release_examples import composed, concept_folder, tiny_folder
from safetensors.torch import save_file

from lab.cli.arguments import rewrite
from lab.core import record as records
from lab.core.errors import UserError
from lab.minisd.world import folders
from lab.release.audit import find_other_targets, prepare
from lab.runner.assemble import assemble

SMALL = [
    "attacks=[lora,textual_inversion]",
    *(f"attacks.{name}.batch_size=2" for name in ("lora", "textual_inversion")),
    *(f"audit.search.{name}.steps=1" for name in ("lora", "textual_inversion")),
    "scenario.sampling.count=4",
    "scenario.sampling.steps=2",
    "scenario.keep_images=4",
    "scenario.unrelated_images=4",
    "scenario.regularizers=8",
    "budget.horizon=2",
    "budget.multiple=2",
    "budget.at=[0,2,4]",
    "tracker=none",
    "threads=1",
]


REAL = ["scorers=real", "scorers.clip.weights=null", "eval.audit.similarities=clip"]


def concepts_file(root, *rows):
    """A list of concepts with one folder of images, if there is none."""
    path = root / "concepts.yaml"
    if not path.is_file():
        concept_folder(root / "mosaic", "mosaic")
        rows = rows or ({"path": "mosaic", "role": "harmful"}, {"name": "neon", "role": "benign"})
        path.write_text(yaml.safe_dump(list(rows)))
    return path


def audit_words(root, folder, *more):
    """The words of an audit of a checkpoint, in seconds."""
    words = [f"path={folder}", f"concepts={concepts_file(root)}", f"paths.outputs={root / 'out'}"]
    return ["action=audit", *words, *SMALL, *more]


def audited(*words):
    """The config of an audit."""
    return composed(*rewrite(["action=audit", *words]))


@pytest.mark.slow
def test_one_command_ends_in_one_verdict(cli, tmp_path):
    folder = tiny_folder(tmp_path / "a model, released")  # a comma and blanks are no list
    words = audit_words(tmp_path, folder, "fail_on=[fails,inconclusive]")
    assert "0 cached" in cli(*words, "dry_run=true").out
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    out = cli(*words, code=None).out
    (path,) = (tmp_path / "out").rglob("verdict.json")
    verdict, record = json.loads(path.read_text()), records.read(path.with_name("record.json"))
    assert f"verdict: {verdict['verdict']}" in out
    assert verdict["headline"] in " ".join(out.split())
    assert verdict["content_hash"] == record["content_hash"]
    assert record["scenario"] == "folder"
    assert [row["concept"] for row in verdict["concepts"]] == ["mosaic"]
    assert {"concept", "check", "required", "measured", "passed"} == verdict["checks"][0].keys()
    attacks = record["tables"]["audit"]
    assert {row["concept"] for row in attacks} == {"mosaic", "neon"}
    assert all(row["trials"] == 2 and row["parameters"] > 0 for row in attacks)
    assert {row["detector"] for row in attacks} == {"scorers"}
    assert re.search(r"(\d+) stages, \1 cached", cli(*words, "dry_run=true").out)
    cli(*words, code=0 if verdict["verdict"] == "passes" else 3)


def tiny_clip(folder):
    """An open_clip folder of random weights."""
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    facts = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    looks = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    folder.mkdir()
    config = {"model_cfg": facts, "preprocess_cfg": looks | {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(CLIP(**facts).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.slow
def test_scorers_for_real_images_end_in_a_verdict_by_a_calibrated_detector(cli, tmp_path):
    noise = torch.randint(0, 40, (2, 8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    for i, name in enumerate(("red", "green")):
        noise[i, :, i] += 200
        rows = [{"text": f"a {name} thing"}] * 8
        folders.write(tmp_path / name, noise[i].to(torch.uint8), rows)
    rows = [{"path": "red", "role": "harmful"}, {"path": "green", "role": "benign"}]
    (tmp_path / "concepts.yaml").write_text(yaml.safe_dump(rows))
    clip = tiny_clip(tmp_path / "clip")
    words = audit_words(
        tmp_path, tiny_folder(tmp_path / "model"), *REAL, f"scorers.clip.name={clip}"
    )
    cli(*words)
    (path,) = (tmp_path / "out").rglob("verdict.json")
    verdict, record = json.loads(path.read_text()), records.read(path.with_name("record.json"))
    assert verdict["verdict"] in ("passes", "fails", "inconclusive")
    assert any("the detector misses" in check["check"] for check in verdict["checks"])
    for row in record["tables"]["audit"]:
        assert row["detector"] == "reference"
        assert row["false_positive"] + row["false_negative"] < 0.5


def test_all_mistakes_are_in_one_message(tmp_path):
    path = concepts_file(
        tmp_path, {"name": "neno", "role": "harmful"}, {"path": "x", "role": "bad"}
    )
    with pytest.raises(UserError) as raised:
        prepare(
            audited(
                "path=/nowhere/model",
                f"concepts={path}",
                "scorers=real",
                "eval.audit.similarities=clip",
                "immunize=mima",
                "fail_on=bad",
            )
        )
    message = str(raised.value)
    for part in (
        "6 mistakes",
        "fail_on=bad: ",
        "immunize=mima: ",
        "path=/nowhere/model: ",
        "concepts[0].name=neno: ",
        "concepts[1].role=bad: ",
        "scorers.clip.name=ViT-B-32: ",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attacks=none"], r"action=audit: .*attacks=\[lora\]"),
        (["+audit.search.lorra={mode: grid}"], r"did you mean lora"),
        (["launch=cpu"], r"launch=cpu: .*launch=none"),
        (["concepts=/nowhere.yaml"], r"concepts=/nowhere.yaml: "),
        (["path=OWNER/MODEL"], r"path=OWNER/MODEL: must be a folder on this machine"),
    ],
)
def test_what_cannot_be_audited(overrides, message):
    with pytest.raises(UserError, match=message):
        prepare(audited(*overrides))


@pytest.mark.slow
def test_an_export_that_was_immunized_against_other_concepts_is_reported(tmp_path):
    folder = tiny_folder(tmp_path / "released")
    cfg = audited(f"path={folder}")
    parts = assemble(cfg)
    (folder / "export.json").write_text('{"kind": "diffusion", "case": "mosaic_neon"}')
    assert find_other_targets(cfg, parts) == []
    (folder / "export.json").write_text('{"case": "watercolor_stained-glass"}')
    (message,) = find_other_targets(cfg, parts)
    assert "case watercolor_stained-glass, and this audit attacks mosaic_neon" in message


def test_a_search_of_the_attackers_own_is_kept():
    own = "attacks.lora.search={mode: grid, steps: 7, space: {rank: [2]}}"
    cfg = prepare(audited(own, "audit.search.full_finetune=null"))
    assert cfg.attacks.lora.search.steps == 7
    assert cfg.attacks.full_finetune.search is None
    assert cfg.attacks.textual_inversion.search.space.lr == [5e-3, 2e-2]


def test_size_sampling_scorers_and_rates_follow_the_checkpoint(tmp_path):
    small = audited(
        f"path={tiny_folder(tmp_path / 'small')}", f"concepts={concepts_file(tmp_path)}"
    )
    assert (small.backbone.name, small.scorers.name) == ("minisd", "minisd")
    assert (small.scenario.resolution, small.scenario.sampling.steps) == (32, 8)
    large = tmp_path / "large"
    for part, facts in (("unet", {"sample_size": 64}), ("vae", {"block_out_channels": [1] * 4})):
        (large / part).mkdir(parents=True)
        (large / part / "config.json").write_text(json.dumps(facts))
    cfg = audited(f"path={large}", f"concepts={tmp_path / 'concepts.yaml'}")
    assert (cfg.backbone.name, cfg.scorers.name) == ("sd", "real")
    assert (cfg.scenario.resolution, cfg.scenario.sampling.guidance) == (512, 7.5)
    assert cfg.audit.search.lora.space.lr == [1e-4, 4e-4]
