from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import CHROMIUM, browse
from fake_generated import generated
from fake_records import attacked, failed, sealed, sweep

from eval.report.figures import _shared_limits, spectra
from eval.report.html import render
from eval.report.leaderboard import leaderboard, to_html, to_markdown
from eval.report.plots import Line, curve_png, lines_plot

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
    one["curves"][HOSTILE] = curve | {"x": HOSTILE, "y": HOSTILE, HOSTILE: curve["none"]}
    return sealed(one)


def test_strings_of_a_record_are_escaped_everywhere(tmp_path: Path) -> None:
    one = hostile()
    pages = [render([one, failed()], tmp_path / "r.html").read_text(), to_html(leaderboard([one]))]
    for page in pages:
        assert "<script" not in page
        assert "<img" not in page
        assert "{{ 7*7 }}" in page  # data is never a template
    assert "<script" not in to_markdown(leaderboard([one]))


def test_markup_in_plot_labels_is_escaped() -> None:
    svg = lines_plot([Line("a", 1, [0, 1], [1.0, 2.0])], title=HOSTILE, x=HOSTILE, y="<b>y</b>")
    assert "<img" not in svg
    assert "<b>" not in svg


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


def test_report_shows_what_it_must(tmp_path: Path) -> None:
    text = render(sweep(), tmp_path / "r.html").read_text()
    for part in (
        "kappa wins over the baseline",
        "The baseline wins",
        "kappa_imma failed: UserError",
        "RIR per pair: kappa",
        "RIR as a share of its bound",
        "Singular values of the features, harmful task",
        "Notes on the data",
        "Dropped 6 of 79 columns",
        "with uncommitted changes",
        "peak memory",
        "torch 2.13.0",
        "harmful slowdown",
        "63 of 90 pairs above 1",
        "1 of 1 immunize stages failed",
        "needs an attack, and attacks=none",
    ):
        assert part in text or part.replace("_", "_<wbr>") in text, part
    assert text.count("<svg role") >= 13


def test_figures_of_the_first_case_and_seed_say_so() -> None:
    run, other = attacked("kappa", 1.8, 1.0, 40.0), attacked("imma", 1.3, 1.0, 5.0)
    notes = {shown["title"]: shown["note"] for shown in spectra([run], ["kappa"], {"kappa": 1})}
    assert len(notes) == 4
    assert all("First case and seed only: house, seed 0." in note for note in notes.values())
    for row in [
        row
        for table in ("spectrum", "principal_angles", "pencil")
        for row in other["tables"][table]
    ]:
        row["seed"] = 3
    both = spectra([run, other], ["kappa", "imma"], {"kappa": 1, "imma": 2})
    assert all("house, seed 0; house, seed 3." in shown["note"] for shown in both)


def test_a_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one record"):
        render([], tmp_path / "r.html")


def test_a_curve_becomes_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    curve = attacked("kappa", 3.4, 1.03, 356.0)["curves"]["norm_ratio_harmful_linear_probe"]
    path = curve_png("a_$_curve", curve, tmp_path / "c.png")
    colours = Image.open(path).convert("RGB").getcolors(1_000_000)
    assert (0, 0x72, 0xB2) in [c for _, c in colours]  # the immunized model
    assert curve_png("empty", {"step": [0], "kappa": [None]}, tmp_path / "e.png").stat().st_size > 0


def test_a_dollar_sign_is_no_formula() -> None:
    svg = lines_plot([Line("a", 1, [0, 1], [1.0, 2.0])], title="t", x="price $x_$", y="$\\frac")
    assert "price $x_$" in svg


def test_plots_survive_missing_and_constant_values() -> None:
    assert lines_plot([Line("a", 0, [0, 1], [None, None])], title="t", x="x", y="y", log="y") == ""
    svg = lines_plot([Line("a", 0, [0, 1, 2], [0.0, 2.0, 2.0])], title="t", x="x", y="y", log="y")
    assert "var(--s0)" in svg
    assert "currentColor" in svg


@pytest.mark.parametrize(("last", "shared"), [(0.001, True), (1e-25, False)])
def test_harmful_and_benign_share_an_axis_unless_one_would_be_squashed(
    last: float, shared: bool
) -> None:
    lines = [[Line("a", 1, [0, 1], [1.0, 0.01])], [Line("a", 1, [0, 1], [1.0, last])]]
    assert (_shared_limits(lines, "y") is not None) is shared


# in a browser


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_wide_scrolling_in_a_browser(tmp_path: Path, width: int) -> None:
    page = render([*sweep(), generated(folder=tmp_path)], tmp_path / "r.html")
    page.write_text(page.read_text().replace("<details", "<details open"))
    frame = (
        tmp_path / "frame.html"
    )  # a frame, since a headless window cannot be narrower than 500 px
    frame.write_text(
        '<iframe id="f" src="r.html" '
        f'style="width:{width}px;height:800px;border:0"></iframe><p id="out"></p><script>'
        'window.onload = () => { const d = document.getElementById("f").contentDocument; '
        "const e = d.documentElement;"
        'const plots = [...d.querySelectorAll("figure svg")].filter(s => '
        "s.getBoundingClientRect().height > 100);"
        'document.getElementById("out").textContent = `width=${e.scrollWidth} '
        "plots=${plots.length} "
        "pictures=${[...d.images].filter(i => i.naturalWidth > 300).length}`; };</script>"
    )
    found = re.search(
        r"width=(\d+) plots=(\d+) pictures=(\d+)", browse(tmp_path, "--dump-dom", frame.as_uri())
    )
    assert found is not None
    assert int(found[1]) <= width
    assert int(found[2]) >= 13
    assert int(found[3]) == 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_dark_and_light_screens_differ(tmp_path: Path) -> None:
    from PIL import Image

    page = render([attacked("kappa", 3.4, 1.03, 356.0)], tmp_path / "r.html")
    brightness = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{name}.png"
        browse(
            tmp_path,
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={shot}",
            "--window-size=1280,1600",
            page.as_uri(),
        )
        image = Image.open(shot).convert("L").resize((64, 80))
        brightness[name] = sum(image.getdata()) / (64 * 80)
        assert len(set(image.getdata())) > 10  # something is drawn
    assert brightness["dark"] < 80
    assert brightness["light"] > 200


def test_a_report_explains_its_words(tmp_path: Path) -> None:
    features, generations = (
        render(found, tmp_path / name).read_text(encoding="utf-8")
        for found, name in (
            ([attacked("kappa", 3.4, 1.03, 356.0)], "a.html"),
            ([generated("mima")], "b.html"),
        )
    )
    assert "<dt>RIR</dt>" in features
    assert "<dt>steps to relearn</dt>" not in features
    assert "<dt>steps to relearn</dt>" in generations
    assert "<dt>RIR</dt>" not in generations


def test_a_check_behind_the_verdict_shows_that_it_is_a_limit(tmp_path: Path) -> None:
    one = attacked("kappa", 3.4, 1.03, 356.0)
    row = {
        "side": "benign",
        "check": "steps",
        "value": 0.4,
        "low": 0.2,
        "high": 0.8,
        "n": 10,
        "bound": "lower",
        "required": "≤ 1.1",
        "passed": False,
        "sure": False,
        "note": "the target was not met in 1 of 10 cases",
    }
    one["tables"]["verdict"] = [row]
    assert ">≥ 0.4 [0.2, 0.8]<" in render([sealed(one)], tmp_path / "a.html").read_text(
        encoding="utf-8"
    )
