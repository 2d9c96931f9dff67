"""Draw the two figures of README.md from the committed records.

``python docs/readme_figures.py`` draws ``docs/images/first_run.png`` and ``results.png``. With the
folder of a newer first run it takes the images from there. ``--check`` changes nothing and fails
where a figure shows other values than the records.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from omegaconf import OmegaConf
from PIL import Image

from lab.core import record
from lab.core.images import GAP, PAD
from lab.core.types import BASELINE, IMMUNIZED

ROOT = Path(__file__).resolve().parents[1]
RECORDS, FIGURES = ROOT / "outputs/records", ROOT / "docs/images"
FIRST_RUN = RECORDS / "first_run/mima_deep_quick.json"
IMAGES = RECORDS / "first_run/mosaic.png"  # rows: reference, baseline, immunized, both at 1×
ROWS, COLUMNS, CELL = ("reference", BASELINE, IMMUNIZED), 6, 128 + GAP
COLORS = {BASELINE: "#c2571a", IMMUNIZED: "#2b6cb0"}
METHODS = {  # label → record, and where the label stands
    "mima_deep (ours)": ("mima_deep_nine_attackers", (6, 6)),
    "MIMA, released settings": ("mima_released_nine_attackers", (-8, -14)),
    "compose": ("compose_nine_attackers", (6, 4)),
    "joint": ("joint_nine_attackers", (-8, 7)),
    "MIMA, first order": ("mima_first_order_nine_attackers", (6, 5)),
    "MIMA": ("mima_nine_attackers", (6, 4)),
    "IMMA": ("imma_nine_attackers", (6, -14)),
}
SIDES = (("benign_steps", "_worst"), ("steps_to_relearn", ""))  # metric, ending


def take_images(run: Path) -> None:
    """Cut the rows at 1× out of the run's grid of mosaic images, and keep them in `IMAGES`."""
    budget = json.loads((run / "record.json").read_text(encoding="utf-8"))["config"]["budget"]
    marks = len({m * budget["horizon"] for m in (1, 2, budget["multiple"])})
    grid = Image.open(run / "images/generations_mosaic.png").convert("RGB")
    left = grid.width - PAD - 8 * CELL + GAP  # it has eight columns
    top = grid.height - PAD - (3 + 2 * marks) * CELL + GAP
    width = COLUMNS * CELL - GAP
    images = Image.new("RGB", (width, 3 * CELL - GAP))
    for i, row in enumerate((0, 2, 3 + marks)):  # a model's first row is step 0, its second 1×
        y = top + row * CELL
        images.paste(grid.crop((left, y, left + width, y + CELL)), (0, i * CELL))
    images.save(IMAGES)


def first_run_values() -> dict[str, Any]:
    """Return attack success of both models: steps, value, low and high ends of the interval."""
    stored = record.read(FIRST_RUN)
    curve = stored["curves"]["asr"]
    lines = {
        name: [curve["step"], curve[name], curve[f"{name}:low"], curve[f"{name}:high"]]
        for name in (BASELINE, IMMUNIZED)
    }
    return {"horizon": stored["config"]["budget"]["horizon"], "lines": lines}


def draw_first_run(values: dict[str, Any]) -> Figure:
    """Draw the images at the left and both curves at the right."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.9), layout="constrained", width_ratios=(2.1, 1)
    )
    left.imshow(Image.open(IMAGES), interpolation="nearest")
    left.set_yticks([CELL * (i + 0.5) for i in range(len(ROWS))], ROWS, fontsize=12)
    left.set_xticks([])
    for name, tick in zip(ROWS, left.get_yticklabels(), strict=True):
        tick.set(color=COLORS.get(name, "black"), fontweight="bold")
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    horizon, lines = values["horizon"], values["lines"]
    left.set_title(f"An erased style, “mosaic”, after {horizon} steps of an attack", fontsize=12)
    for name, (steps, value, low, high) in lines.items():
        right.plot(steps, value, "o-", color=COLORS[name], lw=2, ms=4)
        right.fill_between(steps, low, high, color=COLORS[name], alpha=0.15, lw=0)
    right.annotate(BASELINE, (2.2, 1.02), color=COLORS[BASELINE], fontsize=12)
    right.annotate(IMMUNIZED, (12.5, 0.44), color=COLORS[IMMUNIZED], fontsize=12)
    right.axvline(horizon, color="#999999", lw=0.8, ls=":")
    right.set(xlabel="steps of the attack", xlim=(0, None), ylim=(-0.02, 1.12))
    right.set_title("Attack success, both erased styles", fontsize=12)
    right.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    right.set_xticks(lines[BASELINE][0])
    right.spines[["top", "right"]].set_visible(False)
    return figure


def result_values() -> dict[str, Any]:
    """Return the benign and the harmful slowdown of every method with intervals, and limits."""
    values = {}
    for label, (name, _) in METHODS.items():
        stored = record.read(RECORDS / f"relearn_table/{name}.json")
        scores = [stored["metrics"][f"{side}_ratio{end}"] for side, end in SIDES]
        values[label] = [[score["value"], score["low"], score["high"]] for score in scores]
    verdict = OmegaConf.load(ROOT / "conf/eval/concept_verdict.yaml").concept_verdict
    return {"limits": [verdict.max_benign_steps_ratio, verdict.min_steps_ratio], "points": values}


def draw_results(values: dict[str, Any]) -> Figure:
    """Draw a point per method with 95 % intervals, the first one highlighted."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    axes.set(xscale="log", yscale="log", xlim=(0.4, 13), ylim=(0.5, 12))
    axes.set_xlabel("slowdown of the slowest benign concept (lower is better)", fontsize=11)
    axes.set_ylabel("relearning slowdown of targets\n(higher is better)", fontsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}×")
        axis.set_minor_formatter("")
    largest, smallest = values["limits"]
    axes.fill_between([0.4, largest], smallest, 12, color="tab:green", alpha=0.13, lw=0)
    axes.annotate("pass region", (0.43, 10), color="#2e7d32", fontsize=12)
    for i, (label, (x, y)) in enumerate(values["points"].items()):
        color = "#2b6cb0" if i == 0 else "#6b7480"
        errors = [[[value - low], [high - value]] for value, low, high in (x, y)]
        line = {"elinewidth": 1 if i == 0 else 0.5, "ms": 8 if i == 0 else 6}
        axes.errorbar(x[0], y[0], errors[1], errors[0], fmt="o", color=color, **line)
        shift = METHODS[label][1]
        side = "left" if shift[0] > 0 else "right"
        text = {"textcoords": "offset points", "ha": side, "fontsize": 11, "color": color}
        text["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        axes.annotate(label, (x[0], y[0]), shift, fontweight="bold" if i == 0 else None, **text)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(arguments: list[str]) -> int:
    """Draw the figures, or check them; return the exit code."""
    check = arguments == ["--check"]
    if arguments and not check:
        take_images(Path(arguments[0]))
    changed = []
    for name, values, draw in (
        ("first_run", first_run_values(), draw_first_run),
        ("results", result_values(), draw_results),
    ):
        path, shown = FIGURES / f"{name}.png", json.dumps(values)
        if check and Image.open(path).info["Description"] != shown:
            changed.append(name)
        if not check:
            metadata = {"Description": shown, "Software": None}
            draw(values).savefig(path, dpi=110, metadata=metadata)
    return int(bool(changed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
