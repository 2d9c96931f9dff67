"""An exported folder, checked again: what was altered is detected and named."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from release_examples import composed, move, tiny_folder

from lab.core import record as records
from lab.core.errors import UserError
from lab.core.types import ImageGrid
from lab.release.verify import check, find_differences, verify, write_sums

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def test_verify_says_what_it_checked(exported, cli):
    out = cli("action=verify", f"path={exported}").out
    steps = [line.split(":")[0].strip() for line in out.splitlines() if line.startswith("  ")]
    assert steps == ["hashes", "record", "layout", "weights", "delta"]
    assert out.strip().endswith("verified")


def alter(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def swap_words(path):
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))


def forge(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def link(path):
    other = path.rename(path.with_name("elsewhere"))
    path.symlink_to(other.name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (UNET, alter, "was altered"),
        ("scheduler/scheduler_config.json", Path.unlink, "is missing"),
        ("tokenizer/tokenizer.json", link, "is a link"),
        ("unet/model.bin", lambda p: p.write_bytes(b"x"), "is surplus"),
        ("SHA256SUMS", Path.unlink, "is no exported folder"),
    ],
)
def test_a_file_that_is_not_as_exported_ends_with_code_2(copied, name, change, message, cli):
    change(copied / name)
    err = cli("action=verify", f"path={copied}", code=2).err
    assert name in err
    assert message in err


def test_what_a_hub_client_adds_is_no_surplus(copied):
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (copied / ".cache" / "huggingface").mkdir(parents=True)
    (copied / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert find_differences(copied) == []


@pytest.mark.parametrize(
    ("name", "change", "step", "message"),
    [
        ("unet/model.bin", lambda p: p.write_bytes(b"x"), "hashes", "is a pickle"),
        (UNET, move, "weights", "not those that export.json names"),
        (UNET, lambda p: move(p, by=float("nan")), "weights", "nan or inf"),
        (UNET, lambda p: p.write_bytes(p.read_bytes()[:1000]), "layout", "cannot be loaded"),
        ("unet/config.json", lambda p: p.write_text("{}"), "layout", "unet"),
        ("delta.safetensors", move, "delta", "unet is not the original plus delta"),
        ("vae/diffusion_pytorch_model.safetensors", move, "delta", "vae differs"),
        ("tokenizer/tokenizer.json", swap_words, "delta", "tokenizers, scheduler or configs"),
        (
            "scheduler/scheduler_config.json",
            lambda p: forge(p, beta_end=0.2),
            "delta",
            "tokenizers, scheduler or configs",
        ),
        ("export.json", lambda p: forge(p, seed=1), "record", "no finished immunization"),
        ("export.json", lambda p: p.write_text("{}"), "record", "format"),
        ("record.json", lambda p: forge(p, seeds=[7]), "record", "was altered"),
        ("README.md", lambda p: p.write_text("# Another run\n"), "record", "README.md is about"),
    ],
)
def test_a_forged_folder_whose_sums_fit_is_detected(copied, name, change, step, message):
    change(copied / name)
    write_sums(copied)
    with pytest.raises(UserError, match=f"{step}: .*{re.escape(message)}"):
        check(copied)


def write_record(folder, record):
    """Write another record to an export, with facts, card and sums that fit it."""
    before = record["content_hash"]
    records.write(record, folder / "record.json")
    for name in ("export.json", "README.md"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(before, record["content_hash"]))
    write_sums(folder)


def test_weights_are_those_that_the_record_measured(copied):
    record = records.read(copied / "record.json")
    for stage in record["stages"]:
        stage |= {"weights": "0" * 64} if stage["kind"] == "immunize" else {}
    write_record(copied, record)
    with pytest.raises(UserError, match=r"not those that record\.json measured"):
        check(copied)


def test_images_are_those_of_the_record(copied):
    record = records.read(copied / "record.json")
    grid = ImageGrid(torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), ("a",), ("b",))
    record["images"] = records.write_images(copied, {"grid": grid})
    write_record(copied, record)
    check(copied)
    alter(copied / "images/grid.png")
    write_sums(copied)
    with pytest.raises(UserError, match=r"images/grid\.png is not the image"):
        check(copied)


def test_a_card_that_states_another_verdict_is_not_vouched_for(copied):
    card = copied / "README.md"
    card.write_text(re.sub(r"^\*\*.*\*\*$", "**mima wins.**", card.read_text(), flags=re.MULTILINE))
    write_sums(copied)
    assert "README.md not checked" in check(copied)[1]


def test_without_the_original_the_delta_is_not_checked_and_base_names_it(copied, tmp_path, capsys):
    base = json.loads((copied / "record.json").read_text())["config"]["backbone"]["path"]
    moved = shutil.move(base, tmp_path / "moved")
    try:
        assert check(copied)[-1].startswith("delta: not checked")
        verify(composed("action=verify", f"path={copied}"))
        assert "as far as it could be checked here" in capsys.readouterr().out
        assert "bit for bit" in check(copied, base=str(moved))[-1]
        with pytest.raises(UserError, match="belongs to the base"):
            check(copied, base=str(tiny_folder(tmp_path / "other", seed=1)))
    finally:
        shutil.move(moved, base)
