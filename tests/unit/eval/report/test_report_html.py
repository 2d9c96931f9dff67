from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_records import attacked, failed, sealed, sweep

from eval.report.html import render
from eval.report.leaderboard import leaderboard, to_html, to_markdown
from eval.report.plots import Line, lines_plot
from lab.core.record import read
from lab.core.sources import ROOT

STUDIES = sorted((ROOT / "outputs" / "records").iterdir())
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>"\'{{ 7*7 }}'


def hostile() -> dict:
    one = attacked("kappa", 3.4, 1.03, 356.0)
    one |= {
        "name": HOSTILE,
        "scenario": HOSTILE,
        "backbone": HOSTILE,
        "immunizer": HOSTILE,
        "notes": [HOSTILE],
    }
    one["attacks"] = [HOSTILE]
    one["error"] = {"type": HOSTILE, "message": HOSTILE, "key": HOSTILE, "last_good_step": 3}
    one["skipped"] = {HOSTILE: HOSTILE}
    one["config"][HOSTILE] = HOSTILE
    one["provenance"] |= {"host": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    one["metrics"]["rir"]["note"] = HOSTILE
    one["tables"]["pairs"][0][HOSTILE] = HOSTILE
    one["tables"][HOSTILE] = [{HOSTILE: HOSTILE}]
    one["tables"]["verdict"][0]["note"] = HOSTILE
    one["cells"][0] |= {"model": HOSTILE, "case": HOSTILE, "status": "failed"}
    curve = one["curves"].pop("norm_ratio_harmful_linear_probe")
    one["curves"][HOSTILE] = curve | {"x": HOSTILE, "y": HOSTILE, HOSTILE: curve["baseline"]}
    return sealed(one)


def test_strings_of_a_record_are_escaped_everywhere(tmp_path: Path) -> None:
    one = hostile()
    pages = [render([one, failed()], tmp_path / "r.html").read_text(), to_html(leaderboard([one]))]
    for page in pages:
        assert "<script" not in page
        assert "<img" not in page
        assert "{{ 7*7 }}" in page  # data is never a template
    assert "<script" not in to_markdown(leaderboard([one]))


def test_report_is_self_contained_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    first = render(sweep(), tmp_path / "a.html").read_bytes()
    assert render(sweep(), tmp_path / "b.html").read_bytes() == first
    text = first.decode()
    assert re.findall(r"https?:", text) == []
    assert re.findall(r"(?:src|href)=\"(?!#|data:,\")[^\"]*", text) == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert '<meta name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    ids = re.findall(r"\bid=\"(f[0-9a-f]{8}-[^\"]+)\"", text)
    assert ids


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES, ids=lambda folder: folder.name)
def test_every_committed_record_renders(tmp_path: Path, study: Path) -> None:
    found = [read(path) for path in sorted(study.rglob("*.json"))]
    assert found
    assert render(found, tmp_path / "r.html").stat().st_size > 0
    assert len(leaderboard(found)) == len(found)


def test_report_shows_what_it_must(tmp_path: Path) -> None:
    text = render(sweep(), tmp_path / "r.html").read_text()
    for part in (
        "kappa wins over the baseline",
        "kappa_imma failed: UserError",
        "RIR per pair: kappa",
        "Dropped 6 of 79 columns",
        "with uncommitted changes",
        "torch 2.13.0",
        "needs an attack, and attacks=none",
    ):
        assert part in text or part.replace("_", "_<wbr>") in text, part
    assert "<svg role" in text


def test_a_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one record"):
        render([], tmp_path / "r.html")


def test_a_dollar_sign_is_no_formula() -> None:
    svg = lines_plot([Line("a", 1, [0, 1], [1.0, 2.0])], title="t", x="price $x_$", y="$\\frac")
    assert "price $x_$" in svg


def test_plots_survive_missing_and_constant_values() -> None:
    assert lines_plot([Line("a", 0, [0, 1], [None, None])], title="t", x="x", y="y", log="y") == ""
    svg = lines_plot([Line("a", 0, [0, 1, 2], [0.0, 2.0, 2.0])], title="t", x="x", y="y", log="y")
    assert "var(--s0)" in svg
    assert "currentColor" in svg
