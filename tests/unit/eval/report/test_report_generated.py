"""Reports of text-to-image runs: sentences, columns, bands, pictures."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from fake_generated import generated
from fake_records import attacked, metric, sealed

from eval.report import pictures as embedding
from eval.report.compare import compare
from eval.report.html import render
from eval.report.leaderboard import labels, leaderboard
from eval.report.outcomes import outcome
from lab.core.record import read, write


def test_a_verdict_is_told_with_both_model_names_and_the_step() -> None:
    found = outcome(generated())
    assert (found.tone, found.label) == ("good", "protects")
    assert "attack success 35 % against 90 % for the baseline at step 40" in found.headline
    assert outcome(generated("mima", holds=False)).tone == "bad"


def test_one_seed_is_never_called_sure() -> None:
    one = generated()
    for entry in one["metrics"].values():
        entry |= {"n": 1, "interval": "within_seed"}
    one["tables"]["verdict"][0]["sure"] = False
    found = outcome(sealed(one))
    assert (found.tone, found.label) == ("unsure", "protects, unsure")


def test_without_a_verdict_nothing_is_said_to_be_protected() -> None:
    one = generated()
    del one["metrics"]["verdict"]
    found = outcome(sealed(one))
    assert found.tone == "unsure"
    assert "protects" not in found.headline
    one["metrics"]["msgr_clip"] = metric(-0.02)
    assert outcome(sealed(one)).tone == "bad"


def test_a_holding_run_leads_and_the_worst_target_decides_among_several() -> None:
    strong, weak = generated(), generated("mima_weak")
    weak["metrics"]["steps_to_relearn_ratio_worst"]["value"] = 1.1
    weak["metrics"]["steps_to_relearn_ratio"]["value"] = 9.0
    rows = leaderboard([generated("mima", holds=False), sealed(weak), strong])
    assert [r["immunizer"] for r in rows] == ["mima_deep", "mima_weak", "mima"]
    assert rows[2]["best"] == []


def sources(page: Path) -> list[bytes]:
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page.read_text())
    return [base64.b64decode(f) for f in found]


def test_pictures_of_a_fresh_record_are_embedded_from_beside_the_report(tmp_path: Path) -> None:
    one = generated(folder=tmp_path, curves={})
    page = render([one], tmp_path / "r.html")
    assert sources(page) == [(tmp_path / i["path"]).read_bytes() for i in one["images"].values()]
    text = page.read_text()
    assert "img-src data:" in text
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*', text) == []
    assert render([one], tmp_path / "again.html").read_text() == text


def test_pictures_of_records_that_were_read_are_found_beside_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(
            generated(f"mima_{name}", folder=tmp_path / name, curves={}),
            tmp_path / name / "record.json",
        )
    found = [read(tmp_path / name / "record.json") for name in ("a", "b")]
    page = render(found, tmp_path / "elsewhere" / "r.html")
    assert len(sources(page)) == 4


def test_a_picture_that_is_missing_or_another_is_told_and_not_shown(tmp_path: Path) -> None:
    one = generated(folder=tmp_path, curves={})
    (tmp_path / "images" / "attack_lora.png").unlink()
    (tmp_path / "images" / "attack_dreambooth.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
    page = render([one], tmp_path / "r.html")
    assert sources(page) == []
    assert "images/attack_lora.png is not beside the record" in page.read_text()
    assert (
        "images/attack_dreambooth.png is not the picture that the record names" in page.read_text()
    )


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    one = generated(folder=tmp_path / "run", curves={})
    outside = tmp_path / "attack_lora.png"
    inside = tmp_path / "run" / "images" / "attack_lora.png"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert len(sources(render([one], tmp_path / "run" / "r.html"))) == 1


def test_a_page_has_a_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = generated(folder=tmp_path, curves={})
    size = len(base64.b64encode((tmp_path / one["images"]["attack_lora"]["path"]).read_bytes()))
    monkeypatch.setattr(embedding, "LIMIT", size + 1000)
    page = render([one], tmp_path / "r.html")
    assert len(sources(page)) == 1
    assert "Left out to keep this page small: images/attack_dreambooth.png" in page.read_text()


def test_captions_are_escaped(tmp_path: Path) -> None:
    one = generated(folder=tmp_path, curves={})
    one["images"]["attack_lora"]["caption"] = '"><script>alert(1)</script>'
    page = render([sealed(one)], tmp_path / "r.html")
    assert "<script" not in page.read_text()
    assert len(sources(page)) == 2


def test_records_of_two_minor_versions_can_be_compared() -> None:
    old, new = attacked("kappa", 3.4, 1.03, 356.0), attacked("kappa_opt", 1.9, 1.01, 92.6)
    assert (old["schema"], labels([old])) == ("1.0", ["kappa"])
    assert compare(old, sealed(new | {"schema": "1.1"}))["metrics"]
