from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_records import attacked, control, digits, failed, metric, record, sealed, sweep

from eval.report.compare import compare, to_text
from eval.report.figures import _shared_limits
from eval.report.html import render
from eval.report.leaderboard import labels, leaderboard, to_csv, to_html, to_markdown
from eval.report.plots import Line, curve_png, lines_plot
from eval.report.summary import summary
from eval.report.words import figure, outcome
from lab.errors import UserError

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (4.561, "4.56"), (12345.0, "12,345"), (2.5e9, "2.5·10⁹"), (1e-7, "10⁻⁷"),
     (9.999e6, "10⁷"), (None, "–"), (-3.0, "-3")],
)  # fmt: skip
def test_figures_are_readable(value: float | None, text: str) -> None:
    assert figure(value) == text


# --- words --------------------------------------------------------------------------------------------------------


def test_outcome_says_who_won_and_how_sure() -> None:
    good = outcome(attacked("kappa", 3.4, 1.03, 356.0))
    assert good.tone == "good"
    assert "kappa wins over the control" in good.headline
    assert any("over 3 seeds lies above 1" in d for d in good.details)
    broken = outcome(attacked("kappa", 4.9, 3.7, 1.2))
    assert broken.tone == "bad"
    assert "The control wins" in broken.headline
    assert outcome(control()).tone == "neutral"
    assert "UserError" in outcome(failed()).headline
    assert outcome(digits()).tone == "unsure"
    assert any("supports no claim about other seeds" in d for d in outcome(digits()).details)


def test_an_interval_over_one_is_not_sure() -> None:
    found = outcome(record("kappa", attacks=[], metrics={"rir": metric(1.05, spread=0.2)}))
    assert found.tone == "unsure"
    assert any("may be chance" in d for d in found.details)
    assert outcome(record("kappa", attacks=[], metrics={"rir": metric(0.8)})).tone == "bad"


def test_summary_fits_a_screen() -> None:
    for one in sweep():
        lines = summary(one).splitlines()
        assert len(lines) <= 32
        assert all(len(line) <= 110 for line in lines)
    text = summary(attacked("kappa", 3.4, 1.03, 356.0))
    assert "kappa wins over the control" in text
    assert "with uncommitted changes" in text
    assert "1 of 1 stages failed" in summary(failed())
    assert "skipped verdict" in summary(digits())


def test_a_lower_limit_is_marked() -> None:
    one = attacked("kappa", 5.0, 1.0, 2.0)
    one["metrics"]["slowdown_harmful_worst"]["note"] = "at least: the target was not met in 3 of 3 trajectories"
    assert "≥ 5×" in summary(sealed(one))


# --- leaderboard --------------------------------------------------------------------------------------------------


def test_order_puts_holding_verdicts_first_then_the_worst_case() -> None:
    rows = [r for r in leaderboard(sweep()) if r["scenario"] == "house_price"]
    names = ["kappa_closed_form", "kappa", "kappa_opt", "kappa_well_only", "kappa_ill_only", "kappa_imma", "none"]
    assert [r["immunizer"] for r in rows] == names
    assert [r["rank"] for r in rows] == [1, 2, 3, 4, 5, None, None]


def test_among_failures_a_destroyed_model_does_not_lead() -> None:
    rows = leaderboard([attacked("destroyed", 5.0, 5.0, 1.3), attacked("partial", 0.7, 0.04, 88.0)])
    assert [r["immunizer"] for r in rows] == ["destroyed", "partial"][::-1]
    assert all(r["best"] == [] for r in rows)


def test_measures_that_disagree_are_said() -> None:
    one = attacked("kappa", 0.71, 0.04, 88.0)
    one["metrics"]["slowdown_loss_harmful_worst"]["value"] = 1.43
    assert any("the two measures disagree" in d for d in outcome(sealed(one)).details)


def test_a_broken_model_is_never_marked_as_best() -> None:
    rows = {r["immunizer"]: r for r in leaderboard(sweep()) if r["scenario"] == "house_price"}
    assert rows["kappa_ill_only"]["best"] == []
    assert "slowdown_harmful_worst" in rows["kappa_closed_form"]["best"]


def test_markdown_html_and_csv_carry_intervals_and_directions() -> None:
    rows = leaderboard(sweep())
    text = to_markdown(rows)
    assert "harmful slowdown, worst attacker ↑" in text
    assert "benign slowdown, worst attacker ↓" in text
    assert "3.4× [3.13, 3.67]" in text
    assert "kappa_closed_form comes first of 5" in text
    assert "intervals overlap" not in text
    page = to_html(rows)
    assert "3.4× [3.13, 3.67]" in page
    table = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert len(table) == len(rows)
    assert float(table[1]["slowdown_harmful_worst_low"]) == pytest.approx(3.4 * 0.92)
    assert table[0]["rir_interval"] == "across_seeds"


def test_overlapping_intervals_are_said() -> None:
    text = to_markdown(leaderboard([attacked("a", 3.4, 1.0, 9.0), attacked("b", 3.3, 1.0, 9.0)]))
    assert "overlap, so the order may be chance" in text
    nobody = to_markdown(leaderboard([attacked("a", 3.4, 2.0, 9.0), attacked("b", 3.3, 2.0, 9.0)]))
    assert "The control wins" in nobody


def test_records_of_one_immunizer_are_told_apart_by_their_settings() -> None:
    small, large = attacked("kappa", 3.4, 1.0, 9.0), attacked("kappa", 3.0, 1.0, 9.0)
    large["config"]["immunize"]["eta"] = 0.05
    assert labels([small, sealed(large)]) == ["kappa · eta=0.005", "kappa · eta=0.05"]


# --- compare ------------------------------------------------------------------------------------------------------


def test_compare_gives_differences_with_intervals() -> None:
    a, b = attacked("kappa_opt", 1.9, 1.01, 92.6), attacked("kappa", 3.4, 1.03, 356.0)
    result = compare(a, b)
    json.dumps(result, allow_nan=False)
    rir = next(m for m in result["metrics"] if m["name"] == "rir")
    assert rir["difference"] == pytest.approx(263.4)
    half = ((0.08 * 92.6) ** 2 + (0.08 * 356) ** 2) ** 0.5
    assert (rir["low"], rir["high"]) == (pytest.approx(263.4 - half), pytest.approx(263.4 + half))
    assert (rir["winner"], rir["sure"]) == ("b", True)
    benign = next(m for m in result["metrics"] if m["name"] == "slowdown_benign_worst")
    assert (benign["winner"], benign["sure"]) == ("a", False)
    assert {"key": "immunize.name", "a": "kappa_opt", "b": "kappa"} in result["config"]
    text = to_text(result)
    assert "immunize.name: kappa_opt → kappa" in text
    assert "B better, sure" in text


def test_compare_of_equal_records_says_so() -> None:
    a = attacked("kappa", 3.4, 1.03, 356.0)
    assert "same content" in to_text(compare(a, a))


@pytest.mark.parametrize(("key", "other"), [("scenario", "mnist_pairs"), ("schema", "0.9")])
def test_compare_refuses_what_is_not_comparable(key: str, other: str) -> None:
    a = attacked("kappa", 3.4, 1.03, 356.0)
    with pytest.raises(UserError, match=f"different {key}s"):
        compare(a, a | {key: other})


# --- HTML ---------------------------------------------------------------------------------------------------------

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>"\'{{ 7*7 }}'


def hostile() -> dict:
    one = attacked("kappa", 3.4, 1.03, 356.0)
    one |= {"name": HOSTILE, "scenario": HOSTILE, "backbone": HOSTILE, "immunizer": HOSTILE, "notes": [HOSTILE]}
    one["attacks"] = [HOSTILE]
    one["error"] = {"type": HOSTILE, "message": HOSTILE, "key": HOSTILE, "last_good_step": 3}
    one["skipped"] = {HOSTILE: HOSTILE}
    one["config"][HOSTILE] = HOSTILE
    one["provenance"] |= {"host": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    one["metrics"]["rir"]["note"] = HOSTILE
    one["tables"]["pairs"][0][HOSTILE] = HOSTILE
    one["tables"][HOSTILE] = [{HOSTILE: HOSTILE}]
    one["tables"]["verdict"][0]["note"] = HOSTILE
    one["cells"][0] |= {"arm": HOSTILE, "case": HOSTILE, "status": "failed"}
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
        "kappa wins over the control", "The control wins", "kappa_imma failed: UserError", "RIR per pair: kappa",
        "RIR as a share of its bound", "Singular values of the features, harmful task", "Notes on the data",
        "Dropped 6 of 79 columns", "with uncommitted changes", "peak memory", "torch 2.13.0", "harmful slowdown",
        "63 of 90 pairs above 1", "1 of 1 immunize stages failed", "needs an attack, and attacks=none",
    ):  # fmt: skip
        assert part in text or part.replace("_", "_<wbr>") in text, part
    assert text.count("<svg role") >= 13


def test_a_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one record"):
        render([], tmp_path / "r.html")


def test_a_curve_becomes_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    curve = attacked("kappa", 3.4, 1.03, 356.0)["curves"]["norm_ratio_harmful_linear_probe"]
    path = curve_png("a_$_curve", curve, tmp_path / "c.png")
    colours = Image.open(path).convert("RGB").getcolors(1_000_000)
    assert (0, 0x72, 0xB2) in [c for _, c in colours]  # the immunized arm
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
def test_harmful_and_benign_share_an_axis_unless_one_would_be_squashed(last: float, shared: bool) -> None:
    lines = [[Line("a", 1, [0, 1], [1.0, 0.01])], [Line("a", 1, [0, 1], [1.0, last])]]
    assert (_shared_limits(lines, "y") is not None) is shared


# --- in a browser -------------------------------------------------------------------------------------------------


def browse(tmp_path: Path, *arguments: str) -> str:
    """Output of one headless run."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--virtual-time-budget=3000",
        f"--user-data-dir={tmp_path / 'profile'}", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_wide_scrolling_in_a_browser(tmp_path: Path, width: int) -> None:
    page = render(sweep(), tmp_path / "r.html")
    page.write_text(page.read_text().replace("<details", "<details open"))
    frame = tmp_path / "frame.html"  # a frame, since a headless window cannot be narrower than 500 px
    frame.write_text(
        f'<iframe id="f" src="r.html" style="width:{width}px;height:800px;border:0"></iframe><p id="out"></p><script>'
        'window.onload = () => { const d = document.getElementById("f").contentDocument; const e = d.documentElement;'
        'const plots = [...d.querySelectorAll("figure svg")].filter(s => s.getBoundingClientRect().height > 100);'
        'document.getElementById("out").textContent = `width=${e.scrollWidth} plots=${plots.length}`; };</script>'
    )
    found = re.search(r"width=(\d+) plots=(\d+)", browse(tmp_path, "--dump-dom", frame.as_uri()))
    assert found is not None
    assert int(found[1]) <= width
    assert int(found[2]) >= 13


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_dark_and_light_screens_differ(tmp_path: Path) -> None:
    from PIL import Image

    page = render([attacked("kappa", 3.4, 1.03, 356.0)], tmp_path / "r.html")
    brightness = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{name}.png"
        browse(
            tmp_path, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}",
            "--window-size=1280,1600", page.as_uri(),
        )  # fmt: skip
        image = Image.open(shot).convert("L").resize((64, 80))
        brightness[name] = sum(image.getdata()) / (64 * 80)
        assert len(set(image.getdata())) > 10  # something is drawn
    assert brightness["dark"] < 80
    assert brightness["light"] > 200
