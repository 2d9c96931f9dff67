"""The report as a page: what it shows, that it is self-contained, safe and fits a phone."""

import base64
import re
import shutil
import subprocess

import pytest
from fake_generated import batch_sizes, generated, transferred
from fake_records import attacked, failed, metric, record, sealed, sweep

from eval.report import html
from eval.report.html import render
from eval.report.leaderboard import leaderboard, to_markdown
from eval.report.plots import Line, lines_plot
from eval.report.studies import option_blocks
from lab.core.record import read, write
from lab.core.sources import ROOT

STUDIES = sorted((ROOT / "outputs" / "records").iterdir())
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>"\'{{ 7*7 }}'


def hostile():
    one = attacked("kappa", 3.4, 1.03, 356.0)
    texts = ("name", "scenario", "backbone", "immunizer")
    one |= dict.fromkeys(texts, HOSTILE) | {"notes": [HOSTILE], "attacks": [HOSTILE]}
    one["error"] = {"type": HOSTILE, "message": HOSTILE, "key": HOSTILE, "last_good_step": 3}
    one["skipped"] = {HOSTILE: HOSTILE}
    one["config"][HOSTILE] = HOSTILE
    one["provenance"] |= {"host": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    one["metrics"]["rir"]["note"] = HOSTILE
    one["tables"]["pairs"][0][HOSTILE] = HOSTILE
    one["tables"][HOSTILE] = [{HOSTILE: HOSTILE}]
    one["tables"]["verdict"][0]["note"] = HOSTILE
    one["stages"][0] |= {"model": HOSTILE, "case": HOSTILE, "status": "failed"}
    curve = one["curves"].pop("norm_ratio_harmful_linear_probe")
    one["curves"][HOSTILE] = curve | {"x": HOSTILE, "y": HOSTILE, HOSTILE: curve["baseline"]}
    return sealed(one)


def test_strings_of_a_record_are_escaped_everywhere(tmp_path):
    one = hostile()
    page = render([one, failed()], tmp_path / "r.html").read_text()
    for text in (page, to_markdown(leaderboard([one]))):
        assert "<script" not in text
        assert "<img" not in text
    assert "{{ 7*7 }}" in page  # data is never a template


def test_report_is_self_contained_and_repeats_bit_for_bit(tmp_path):
    first = render(sweep(), tmp_path / "a.html").read_bytes()
    assert render(sweep(), tmp_path / "b.html").read_bytes() == first
    text = first.decode()
    assert re.findall(r"https?:", text) == []
    assert re.findall(r"(?:src|href)=\"(?!#|data:,\")[^\"]*", text) == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text


def test_report_shows_verdicts_checks_and_provenance(tmp_path):
    text = render(sweep(), tmp_path / "r.html").read_text()
    for part in (
        "kappa_closed_form wins: 3 of 5 methods pass",
        "UserError: immunize.lambda_p=-1: must be ≥ 0.",
        "RIR of every pair of tasks",
        "Dropped 6 of 79 columns",
        "with uncommitted changes",
        "torch 2.13.0",
        "needs an attack, and attacks=none",
        '<div class="tile good"><b>✓ passes</b>',
        "<dt>required</dt><dd>≤ 1.1</dd>",
    ):
        assert part in text, part
    assert "<svg role" in text


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES, ids=lambda folder: folder.name)
def test_committed_records_render(tmp_path, study):
    found = [read(path) for path in sorted(study.rglob("*.json"))]
    assert render(found[:2], tmp_path / "r.html").stat().st_size > 0
    assert len(leaderboard(found)) == len(found)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_does_not_scroll_sideways(tmp_path, width):
    render([*sweep(), generated(folder=tmp_path)], tmp_path / "r.html")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="r.html" style="width:{width}px;height:800px;border:0"></iframe>'
        '<p id="o"></p><script>window.onload = () => { const e = '
        'document.getElementById("f").contentDocument.documentElement;'
        'document.getElementById("o").textContent = `width=${e.scrollWidth}`; };</script>'
    )
    words = [
        *("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync", "dump-dom"),
        *("disable-background-networking", "disable-component-update"),
        *("allow-file-access-from-files", "virtual-time-budget=3000"),
        f"user-data-dir={tmp_path / 'profile'}",
    ]
    command = [CHROMIUM, *(f"--{word}" for word in words), frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"width=(\d+)", done.stdout)
    assert found is not None
    assert int(found[1]) <= width


# ---- images


def sources(page):
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page.read_text())
    return [base64.b64decode(f) for f in found]


def test_images_are_embedded_from_beside_the_record(tmp_path):
    for name in ("a", "b"):
        one = generated(f"mima_{name}", folder=tmp_path / name, curves={})
        write(one, tmp_path / name / "record.json")
    found = [read(tmp_path / name / "record.json") for name in ("a", "b")]
    page = render(found, tmp_path / "elsewhere" / "r.html")
    files = [tmp_path / n / i["path"] for n in "ab" for i in found[0]["images"].values()]
    assert sorted(sources(page)) == sorted(file.read_bytes() for file in files)


def test_an_image_that_is_missing_or_another_is_named_and_not_shown(tmp_path):
    one = generated(folder=tmp_path, curves={})
    (tmp_path / "images/comparison_neon.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
    (tmp_path / "images/generations_neon.png").unlink()
    page = render([one], tmp_path / "r.html")
    assert sources(page) == []
    for name in ("generations_neon", "comparison_neon"):
        assert f"mima_deep: images/{name}.png" in page.read_text()


def test_a_page_has_a_size_limit(tmp_path, monkeypatch):
    one = generated(folder=tmp_path, curves={})
    size = len(base64.b64encode((tmp_path / "images/comparison_neon.png").read_bytes()))
    monkeypatch.setattr(html, "IMAGE_BYTES", size + 1000)
    page = render([one], tmp_path / "r.html")
    assert len(sources(page)) == 1
    assert "too large for this page" in page.read_text()


# ---- plots


def test_plots_survive_dollars_and_missing_and_constant_values():
    assert lines_plot([Line("a", 0, [0, 1], [None, None])], title="t", x="x", y="y", log="y") == ""
    svg = lines_plot(
        [Line("a", 0, [0, 1, 2], [0.0, 2.0, 2.0])], title="t", x="$x_$", y="y", log="y"
    )
    assert "var(--s0)" in svg
    assert "$x_$" in svg


def run(value, **immunize):
    config = {"immunize": {"name": "kappa", **immunize}}
    return record("kappa", attacks=[], config=config, metrics={"rir": metric(value)})


@pytest.mark.parametrize(
    "records",
    [
        sweep(),  # every immunizer once
        [run(1.0, lr=0.1), run(2.0, lr=0.2)],  # two points are no figure
        [run(1.0, lr=0.1), run(1.5, lr=0.1), run(2.0, lr=0.2)],  # twice the same settings
    ],
)
def test_what_makes_no_plot_of_options(records):
    assert option_blocks(records) == []


def test_sweeps_over_options_and_transfer_have_plots(tmp_path):
    text = render([*batch_sizes(), transferred()], tmp_path / "r.html").read_text()
    assert "kappa by batch_size and spectrum" in text
    assert "Does RIR predict the slowdown?" in text
    assert "The cases behind it" in text
