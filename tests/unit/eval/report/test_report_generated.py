"""Reports of text-to-image runs: sentences, columns, bands, pictures."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from fake_generated import STEPS, curve, generated
from fake_records import attacked, metric, sealed, sweep

from eval.report import pictures as embedding
from eval.report.compare import compare
from eval.report.figures import (
    CUT,
    GAPS,
    _gap_limits,
    _legend,
    _lines,
    _shared_limits,
    trajectories,
)
from eval.report.html import render
from eval.report.leaderboard import COLUMNS, columns, labels, leaderboard, to_csv, to_markdown
from eval.report.outcomes import outcome
from eval.report.plots import Line, band, curve_png, line_of, lines_plot, series_of
from eval.report.summary import summary
from eval.report.words import heading
from lab.core.record import read, write

# words


def test_a_verdict_that_holds_is_told_with_both_model_names_and_the_step() -> None:
    found = outcome(generated())
    assert (found.tone, found.label) == ("good", "protects")
    told = (
        "mima_deep protects 2 targets: attack success 35 % against 90 % for the baseline "
        "at step 40."
    )
    assert found.headline == told
    text = " ".join(found.details)
    assert "MSGR (CLIP) 0.21 [0.126, 0.294]" in text
    assert "Relearning takes 2.6× [2.39, 2.81] the baseline's steps on average, 1.7×" in text
    assert "Benign concepts take 1.08×" in text


def test_a_verdict_that_fails_says_why() -> None:
    found = outcome(generated("mima", holds=False))
    assert found.tone == "bad"
    assert found.headline.startswith(
        "The baseline wins: mima does not protect 2 targets: attack success 86 %"
    )
    assert "MSGR 0.01 (required > 0)." in found.details[0]
    assert any("includes 0" in d for d in found.details)


def test_what_is_held_back_is_not_called_unprotected_where_the_benign_side_fails() -> None:
    one = generated("mima", holds=False)
    one["tables"]["verdict"] = [
        {"side": "harmful", "passed": True},
        {"side": "benign", "passed": False},
    ]
    found = outcome(sealed(one))
    assert (found.tone, found.label) == ("bad", "fails on the benign side")
    told = (
        "The baseline wins: mima fails on the benign side, though it holds back 2 "
        "targets: attack success 86 %"
    )
    assert found.headline.startswith(told)
    one["tables"]["verdict"][0]["passed"] = False
    assert outcome(sealed(one)).label == "does not protect"


def test_one_seed_is_never_called_sure() -> None:
    one = generated()
    for entry in one["metrics"].values():
        entry |= {"n": 1, "interval": "within_seed"}
    one["tables"]["verdict"][0]["sure"] = False
    found = outcome(sealed(one))
    assert (found.tone, found.label) == ("unsure", "protects, unsure")
    assert any("supports no claim about other seeds" in d for d in found.details)


def test_without_a_verdict_nothing_is_said_to_be_protected() -> None:
    one = generated()
    del one["metrics"]["verdict"]
    found = outcome(sealed(one))
    assert found.tone == "unsure"
    assert "protects" not in found.headline
    assert "No verdict was passed" in found.details[0]
    one["metrics"]["msgr_clip"] = metric(-0.02)
    assert outcome(sealed(one)).tone == "bad"


@pytest.mark.parametrize(
    ("value", "spread", "says"),
    [
        (0.2, 0.1, "less like the target than the baseline's"),
        (0.2, 3.0, "not surely less like the target"),
        (-0.2, 0.1, "no less like the target than the baseline's"),
        (-0.2, -3.0, "not surely less like the target"),
    ],
)
def test_an_msgr_is_read_with_its_interval(value, spread, says) -> None:
    one = generated()
    one["metrics"]["msgr_clip"] = metric(value, spread=spread, n=1, interval="within_seed")
    assert any(f"model are {says}: " in d for d in outcome(sealed(one)).details)


def test_a_table_begins_with_what_its_rows_are_about(tmp_path) -> None:
    one = generated()
    one["tables"]["attacks"] = [
        {"model": "none", "at_07": 0.5, "attack": "lora", "concept": "neon", "seed": 0}
    ]
    page = render([sealed(one)], tmp_path / "report.html").read_text()
    head = page.partition("Table: attacks")[2].partition("</thead>")[0]
    assert re.findall(r'<th scope="col">(\w+)', head) == [
        "model",
        "attack",
        "concept",
        "at_07",
        "seed",
    ]


def test_targets_are_counted_from_the_tables_where_they_are() -> None:
    rows = [
        {"concept": c, "role": r, "seed": s}
        for c, r in (("a", "harmful"), ("b", "benign"))
        for s in (0, 1)
    ]
    one = generated()
    one["tables"]["relearning"] = rows
    assert "protects 1 target:" in outcome(sealed(one)).headline
    one["tables"].pop("relearning")
    one["config"]["scenario"] = {"name": "relearn"}
    assert "protects the targets:" in outcome(sealed(one)).headline


def test_summary_fits_a_screen() -> None:
    for one in (generated(), generated("mima", holds=False)):
        lines = summary(one).splitlines()
        assert len(lines) <= 32
        assert all(len(line) <= 110 for line in lines)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("msgr_clip", "MSGR (CLIP)"),
        ("mrsgr_clip_5x", "MRSGR (CLIP), 5x"),
        ("asr_mosaic", "attack success, mosaic"),
        ("asr_baseline", "attack success on the baseline"),
        ("sgr_benign_feature_lpips", "SGR of benign concepts (feature LPIPS)"),
        ("utility_new", "utility (new)"),
        ("rir", "RIR"),
        ("kappa_harmful", "kappa_harmful"),
    ],
)
def test_metrics_have_headings(name: str, words: str) -> None:
    assert heading(name) == words


# leaderboard


def test_columns_of_text_to_image_runs_come_in_order_with_other_scorers_last() -> None:
    names = [
        "msgr_dino",
        "utility_clip_drift",
        "asr",
        "msgr_clip_2x",
        "msgr_clip_auc",
        "verdict",
        "msgr_clip",
        "msgr_clip_reworded",
        "asr_2x",
        "steps_to_relearn_ratio",
        "utility_clip_drift_baseline",
        "utility_feature_drift",
        "utility_detection",
        "utility_clip_drift_negative",
    ]
    first = ["verdict", "steps_to_relearn_ratio", "asr", "msgr_clip", "utility_clip_drift"]
    assert columns(names) == [*first, "msgr_dino", "utility_feature_drift"]


def test_columns_of_linear_runs_are_what_they_were() -> None:
    for one in sweep():
        known = [n for n in COLUMNS if n in one["metrics"]]
        assert columns(one["metrics"]) == known


def test_a_holding_run_leads_and_the_worst_target_decides_among_several() -> None:
    strong, weak = generated(), generated("mima_weak")
    weak["metrics"]["steps_to_relearn_ratio_worst"]["value"] = 1.1
    weak["metrics"]["steps_to_relearn_ratio"]["value"] = 9.0
    rows = leaderboard([generated("mima", holds=False), sealed(weak), strong])
    assert [r["immunizer"] for r in rows] == ["mima_deep", "mima_weak", "mima"]
    assert rows[2]["best"] == []
    text = to_markdown(rows)
    assert "| MSGR (CLIP) ↑ |" in text
    assert "attack success ↓" in text
    assert "msgr_dino_low" in to_csv(rows).splitlines()[0]


def test_among_failures_the_checks_passed_decide_then_the_least_protected_target() -> None:
    """By the harmful side alone a destroyed model would lead."""
    rows = {"destroyed": (1, 4.0), "partial": (2, 1.2), "close": (2, 1.3)}
    records = []
    for name, (passed, worst) in rows.items():
        one = generated(name, holds=False)
        one["metrics"]["steps_to_relearn_ratio_worst"]["value"] = worst
        (check,) = one["tables"]["verdict"][:1]
        one["tables"]["verdict"] = [check | {"passed": i < passed} for i in range(3)]
        records.append(sealed(one))
    found = leaderboard(records)
    assert [r["immunizer"] for r in found] == ["close", "partial", "destroyed"]
    assert "Closest: close, which passes 2 of 3 checks" in to_markdown(found)


# curves


def test_low_and_high_are_a_band_and_no_model_names() -> None:
    both = curve({"none": [0.1] * 5, "mima": [0.2] * 5}, 0.05, "y")
    assert series_of(both) == ["none", "mima"]
    line = line_of(both, "mima", "mima", 1)
    xs, low, high = band(line, False)
    assert xs == STEPS
    assert (low[0], high[0]) == (pytest.approx(0.15), pytest.approx(0.25))
    assert series_of({"step": [0], "odd:low": [1.0]}) == ["odd:low"]  # nobody's band: a series
    both["mima:high"] = [None, *both["mima:high"][1:]]
    assert band(line_of(both, "mima", "mima", 1), False)[0] == STEPS[1:]
    assert line_of(both | {"mima:high": [1.0]}, "mima", "mima", 1).low is None


def test_a_band_is_drawn_and_widens_the_axis() -> None:
    bare = Line("a", 1, [0, 1], [1.0, 2.0])
    wide = Line("a", 1, [0, 1], [1.0, 2.0], [0.5, 1.0], [1.5, 4.0])
    plots = [lines_plot([line], title="t", x="x", y="y") for line in (bare, wide)]
    assert "opacity: 0.16" in plots[1]
    assert "opacity: 0.16" not in plots[0]
    low, high = _shared_limits([[wide], [wide]], "")
    assert low < 0.5
    assert high > 4.0
    log = lines_plot(
        [Line("a", 1, [0, 1], [1.0, 2.0], [-1.0, 1.0], [1.5, 4.0])],
        title="t",
        x="x",
        y="y",
        log="y",
    )
    assert log  # an end below zero is left out, not drawn at a wrong place


def test_a_relative_gap_to_next_to_nothing_does_not_squash_the_rest() -> None:
    tame, wild, high = (
        Line("a", 1, [0, 1, 2], y) for y in ([0.9, 0.3, -0.2], [12.0, 0.3, -4.0], [7.0, 0.3, 0.1])
    )
    assert _gap_limits([tame]) is None
    assert _gap_limits([Line("a", 1, [0, 1], [-9.0, -3.0])]) is None
    assert _gap_limits([tame, wild]) == GAPS
    low, top = _gap_limits([high]) or (0, 0)
    assert -1 < low < 0.1
    assert top == GAPS[1]
    one = generated()
    one["curves"]["msgr_clip"]["mima_deep"][0] = 12.0
    notes = {m["title"]: m["note"] for m in trajectories([one], ["mima_deep"], {"mima_deep": 1})[0]}
    assert [title for title, note in notes.items() if note == CUT] == ["MSGR (CLIP)"]


def test_few_steps_on_a_logarithmic_axis_are_its_ticks() -> None:
    svg = lines_plot([Line("a", 1, STEPS, [0.1] * 5)], title="t", x="step", y="y", log="x")
    shown = re.findall(r">([\d.,]+)</text>", svg)
    assert {"0", "40", "80", "120", "200"} <= set(shown)
    many = lines_plot(
        [Line("a", 1, list(range(1, 1001)), [0.1] * 1000)], title="t", x="step", y="y", log="x"
    )
    assert {"1", "10", "100", "1,000"} <= set(re.findall(r">([\d.,]+)</text>", many))


def test_deciding_curves_come_first_and_series_that_are_no_model_name_get_a_legend() -> None:
    one = generated()
    main, more = trajectories([one], ["mima_deep"], {"mima_deep": 1})
    assert [m["title"] for m in main] == [
        "attack success",
        "MSGR (CLIP)",
        "SGR of benign concepts (CLIP)",
    ]
    by_concept = next(m for m in more if m["title"] == "attack success, by concept")
    assert "mosaic" in by_concept["svg"]
    lines = _lines("asr_by_concept", [one], ["mima_deep"], {"mima_deep": 1})
    assert _legend(lines, ["mima_deep"])
    assert len({line.index for line in lines}) == 2
    assert not _legend(_lines("asr", [one], ["mima_deep"], {"mima_deep": 1}), ["mima_deep"])


def test_a_curve_with_a_band_becomes_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    shown = curve(
        {"none": [0.1, 0.5, 0.6, 0.7, 0.8], "mima": [0.1, 0.2, 0.2, 0.3, 0.3]}, 0.1, "share"
    )
    bare = {k: v for k, v in shown.items() if ":" not in k}
    coloured = []
    for name, one in (("band", shown), ("bare", bare)):
        image = Image.open(curve_png(name, one, tmp_path / f"{name}.png")).convert("RGB")
        coloured.append(sum(n for n, c in image.getcolors(1_000_000) if max(c) - min(c) > 20))
    assert coloured[0] > 3 * coloured[1]


# pictures


def sources(page: Path) -> list[bytes]:
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page.read_text())
    return [base64.b64decode(f) for f in found]


def test_pictures_of_a_fresh_record_are_embedded_from_beside_the_report(tmp_path: Path) -> None:
    one = generated(folder=tmp_path, curves={})
    page = render([one], tmp_path / "r.html")
    assert sources(page) == [(tmp_path / i["path"]).read_bytes() for i in one["images"].values()]
    text = page.read_text()
    assert (
        'alt="Picture grid attack lora. Style mosaic, attacked by LoRA; equal latents per column."'
        in text
    )
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
    assert "mima_a: attack lora" in page.read_text()
    assert "2 more pictures" in page.read_text()


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


def test_a_reference_far_from_the_values_has_a_tick_of_its_own() -> None:
    """Ticks were chosen for the values alone once, and crowded where the line was drawn."""
    svg = str(
        lines_plot(
            [Line("mima", 1, [0, 1], [0.003, 0.004])],
            title="t",
            x="x",
            y="y",
            log="y",
            reference=1.0,
        )
    )
    ticks = [text for text in re.findall(r">([^<>]+)</text>", svg) if text not in ("x", "y")]
    assert {"1", "0.1", "0.01"} <= set(ticks)
    assert "0.9" not in ticks
