"""An exported folder, checked again and pushed: what was altered is found and named, nothing leaves
unasked.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from entry_point import call_entry
from release_examples import composed, finished, move, options, tiny_folder
from safetensors.torch import save_file

from lab.core import record as records
from lab.core.errors import UserError
from lab.core.types import ImageGrid
from lab.release import push as export_push
from lab.release.checksums import differences, write_sums
from lab.release.export import export
from lab.release.verify import Report, _features, check, verify

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


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def test_verify_says_what_it_checked(exported, monkeypatch, capfd):
    code, out, _ = call_entry(monkeypatch, capfd, "action=verify", f"path={exported}")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("  ")] == [
        ["ok", what] for what in ("hashes", "record", "layout", "weights", "delta")
    ]
    assert out.strip().endswith("verified")


def alter(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def swap_words(path):
    known = json.loads(path.read_text())
    vocabulary = known["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(known))


def forge(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def link(path):
    other = path.rename(path.with_name("elsewhere"))
    path.symlink_to(other.name)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (UNET, alter, "was altered"),
        ("README.md", alter, "was altered"),
        ("scheduler/scheduler_config.json", Path.unlink, "is missing"),
        ("tokenizer/tokenizer.json", link, "is a link"),
        ("unet/model.bin", lambda p: p.write_bytes(b"x"), "is surplus"),
        ("SHA256SUMS", Path.unlink, "cannot be read"),
        ("SHA256SUMS", lambda p: p.write_text("zz  README.md\n"), "line 1"),
        ("SHA256SUMS", lambda p: p.write_text(f"{'0' * 64}  ../README.md\n"), "line 1"),
    ],
)
def test_a_file_that_is_not_as_exported_ends_with_code_2(
    copied, name, change, told, monkeypatch, capfd
):
    change(copied / name)
    code, _, err = call_entry(monkeypatch, capfd, "action=verify", f"path={copied}")
    assert code == 2
    assert name in err
    assert told in err


def test_what_a_hub_client_adds_is_no_surplus(copied):
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (copied / ".cache" / "huggingface").mkdir(parents=True)
    (copied / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert differences(copied) == []


@pytest.mark.parametrize(
    ("name", "change", "step", "told"),
    [
        (UNET, move, "weights", "does not hold the weights"),
        (UNET, lambda p: move(p, by=float("nan")), "weights", "nan or inf"),
        ("delta.safetensors", move, "delta", "delta.safetensors holds another"),
        ("vae/diffusion_pytorch_model.safetensors", move, "delta", "vae differs from the original"),
        ("text_encoder/model.safetensors", move, "delta", "text_encoder differs from the original"),
        ("tokenizer/tokenizer.json", swap_words, "delta", "tokenizers differs from the original"),
        (
            "scheduler/scheduler_config.json",
            lambda p: forge(p, beta_end=0.2),
            "delta",
            "scheduler differs from the",
        ),
        (UNET, lambda p: p.write_bytes(p.read_bytes()[:1000]), "layout", "cannot be read"),
        ("unet/config.json", lambda p: p.write_text("{}"), "layout", "unet"),
        ("export.json", lambda p: p.write_text('{"format": 1}'), "record", "export.json"),
        (
            "export.json",
            lambda p: p.write_text(p.read_text().replace('"model": "mima"', '"model": "none"')),
            "record",
            "",
        ),
        (
            "record.json",
            lambda p: p.write_text(p.read_text().replace('"seeds": [', '"seeds": [7,', 1)),
            "record",
            "",
        ),
        ("README.md", Path.unlink, "record", "README.md is missing"),
        ("README.md", lambda p: p.write_bytes(b"\xff"), "record", "README.md cannot be read"),
        (
            "README.md",
            lambda p: p.write_text("# Of another run\n"),
            "record",
            "README.md does not name",
        ),
        ("export.json", lambda p: forge(p, seed=1), "record", "names another model, case or seed"),
        (
            "export.json",
            lambda p: forge(p, case="forged"),
            "record",
            "names another model, case or seed",
        ),
        ("export.json", lambda p: forge(p, stage_key="0" * 64), "record", "another run"),
    ],
)
def test_a_forged_folder_whose_hashes_fit_is_still_found(copied, name, change, step, told):
    change(copied / name)
    write_sums(copied)
    report = check(copied)
    assert report.failed
    assert any(
        state == "FAILED" and what == step and told in text for state, what, text in report.lines
    ), report.lines
    with pytest.raises(UserError, match="is not what was exported"):
        report.require()


def test_a_card_that_tells_another_verdict_is_not_vouched_for(copied):
    card = copied / "README.md"
    card.write_text(
        re.sub(
            r"^\*\*.*\*\*$", "**mima holds everybody back.**", card.read_text(), flags=re.MULTILINE
        )
    )
    write_sums(copied)
    report = check(copied)
    assert not report.failed
    assert ("not checked", "record") in {(state, what) for state, what, _ in report.lines}


def written(folder, record):
    """Write another record to an export, with facts, card and hashes that fit it."""
    before = record["content_hash"]
    records.write(record, folder / "record.json")
    for name in ("export.json", "README.md"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(before, record["content_hash"]))
    write_sums(folder)


def test_an_immunization_that_the_record_calls_diverged_has_no_weights(copied):
    record = records.read(copied / "record.json")
    next(c for c in record["cells"] if c["stage"] == "immunize" and c["model"] == "mima")[
        "status"
    ] = "diverged"
    written(copied, record)
    assert check(copied).failed == [
        ("export.json", "names an immunization that record.json calls diverged")
    ]


def test_pictures_are_those_of_the_record(copied):
    record = records.read(copied / "record.json")
    grid = ImageGrid(torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), ("a",), ("b",))
    record["images"] = records.write_images(copied, {"grid": grid})
    written(copied, record)
    assert not check(copied).failed
    alter(copied / "images/grid.png")
    write_sums(copied)
    assert check(copied).failed == [
        ("images/grid.png", "is not the picture that record.json names")
    ]
    (copied / "images/grid.png").unlink()
    write_sums(copied)
    report = check(copied)
    assert not report.failed
    assert ("not checked", "record", "picture grid is not here") in report.lines


def test_the_settings_of_features_are_a_mapping(tmp_path):
    save_file({"theta": torch.eye(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[]")
    report = Report(tmp_path)
    _features(report, {"kind": "linear", "weights": ""})
    assert report.failed == [("config.json", "holds no settings by name")]


def test_without_the_original_the_delta_is_left_open_and_base_names_it(
    copied, run_folder, tmp_path, capsys
):
    record = json.loads((copied / "record.json").read_text())
    base = record["config"]["backbone"]["path"]
    moved = shutil.move(base, tmp_path / "moved")
    try:
        report = check(copied)
        assert not report.failed
        assert [what for state, what, _ in report.lines if state == "not checked"] == ["delta"]
        verify(composed("action=verify", f"path={copied}"))
        assert "as far as it could be checked here" in capsys.readouterr().out
        report = check(copied, base=str(moved))
        assert report.lines[-1][:2] == ("ok", "delta")
        for wrong, told in (
            (tiny_folder(tmp_path / "other", seed=1), "other weights"),
            (tmp_path / "no", "no model"),
        ):
            with pytest.raises(UserError, match=rf"export\.base=.*{told}"):
                check(copied, base=str(wrong))
    finally:
        shutil.move(moved, base)


def test_verify_needs_a_folder(tmp_path):
    with pytest.raises(UserError, match="path=None"):
        verify(composed("action=verify"))
    with pytest.raises(UserError, match="no such folder"):
        verify(composed(f"path={tmp_path / 'none'}"))


# ---- push


class Hub:
    """Takes the place of the hub's client."""

    def __init__(self, private=True, error=None):
        self.private, self.error, self.sent, self.files = private, error, [], [".gitattributes"]

    def create_repo(self, name, private, exist_ok):
        assert private
        assert exist_ok
        return f"https://hub/{name}"

    def repo_info(self, name):
        return type("Info", (), {"private": self.private})()

    def list_repo_files(self, name):
        return self.files

    def upload_folder(self, folder_path, repo_id, commit_message, delete_patterns):
        assert delete_patterns == "*", "what an earlier push left would be surplus"
        if self.error:
            raise self.error
        self.sent.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))


SECRET = "hf_averysecrettoken"


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(export_push, "_client", lambda token: made)
    return made


def test_nothing_is_pushed_unless_asked(run_folder, hub, tmp_path):
    export(options(run_folder, f"path={tmp_path / 'x'}"))
    assert hub.sent == []


def test_push_uploads_the_checked_folder_and_shows_no_token(run_folder, hub, tmp_path, capsys):
    folder = export(options(run_folder, f"path={tmp_path / 'x'}", "push_to=me/model"))
    assert hub.sent == [("me/model", sorted(p.name for p in folder.iterdir()))]
    assert export_push.FACTS in hub.sent[0][1]
    said = capsys.readouterr()
    assert "pushed: https://hub/me/model" in said.out
    written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert SECRET not in said.out + said.err
    assert SECRET.encode() not in written
    assert SECRET not in repr(export_push.ready("me/model"))


def test_a_push_that_cannot_work_is_refused_before_anything_is_written(
    run_folder, hub, tmp_path, monkeypatch
):
    for name, told in (("model", "OWNER/NAME"), ("a/b/c", "OWNER/NAME")):
        with pytest.raises(UserError, match=told):
            export(options(run_folder, f"path={tmp_path / 'x'}", f"push_to={name}"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN"):
        export(options(run_folder, f"path={tmp_path / 'x'}", "push_to=me/model"))
    assert not (tmp_path / "x").exists()


def test_a_push_replaces_an_earlier_export_and_nothing_else(hub, tmp_path):
    hub.files = [".gitattributes", "README.md", "thesis.safetensors"]
    with pytest.raises(UserError, match=r"holds 2 file\(s\) and no export.json"):
        export_push.ready("me/model").upload(tmp_path)
    assert hub.sent == []
    hub.files.append(export_push.FACTS)
    export_push.ready("me/model").upload(tmp_path)
    assert len(hub.sent) == 1


def test_a_public_repository_and_a_refusal_of_the_hub(hub, tmp_path):
    hub.private = False
    with pytest.raises(UserError, match="is public"):
        export_push.ready("me/model").upload(tmp_path)
    assert hub.sent == []
    hub.private, hub.error = True, OSError(f"401 for token {SECRET}")
    with pytest.raises(UserError, match=r"did not take it: OSError: 401 for token \*\*\*") as told:
        export_push.ready("me/model").upload(tmp_path)
    assert told.value.__cause__ is None
