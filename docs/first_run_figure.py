"""Draw the first figure of README.md from the record of the first run.

``python docs/first_run_figure.py`` draws ``docs/images/first_run.png`` from the record and the
images in ``outputs/records/first_run``. With the folder of a newer run it takes the images from
there first. ``--check`` changes nothing and fails where the figure shows other values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from lab.core import record
from lab.core.images import GAP, PAD
from lab.core.types import BASELINE

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "outputs/records/first_run/mima_deep_quick.json"
TILES = RECORD.with_name("neon.png")  # rows: reference, baseline, immunized, all at 1×
FIGURE = ROOT / "docs/images/first_run.png"
ROWS, COLUMNS, SIZE = ("reference", "baseline", "immunized"), 6, 64
COLORS = {"baseline": "#c2571a", "immunized": "#2b6cb0"}


def take_tiles(run: Path) -> None:
    """Cut the rows at 1× out of the run's grid of neon images, and keep them in `TILES`."""
    budget = json.loads((run / "record.json").read_text(encoding="utf-8"))["config"]["budget"]
    marks = sorted({m * budget["horizon"] for m in (1, 2, budget["multiple"])})
    rows = (0, 2, 3 + len(marks))  # after the reference: per model step 0, then the marks
    grid = Image.open(run / "images/generations_neon.png").convert("RGB")
    cell = 2 * SIZE + GAP
    left = grid.width - PAD - 8 * cell + GAP  # it has eight columns
    top = grid.height - PAD - (3 + 2 * len(marks)) * cell + GAP
    tiles = Image.new("RGB", (COLUMNS * SIZE, len(rows) * SIZE))
    for i, row in enumerate(rows):
        for j in range(COLUMNS):
            x, y = left + j * cell, top + row * cell
            tile = grid.crop((x, y, x + 2 * SIZE, y + 2 * SIZE)).resize((SIZE, SIZE), 0)
            tiles.paste(tile, (j * SIZE, i * SIZE))
    tiles.save(TILES)


def curves() -> dict[str, list[list[float]]]:
    """Return attack success of both models: steps, value, low and high ends of the interval."""
    curve = record.read(RECORD)["curves"]["asr"]
    immunized = next(key for key in curve if f"{key}:low" in curve and key != BASELINE)
    return {
        name: [curve["step"], curve[key], curve[f"{key}:low"], curve[f"{key}:high"]]
        for name, key in (("baseline", BASELINE), ("immunized", immunized))
    }


def draw(lines: dict[str, list[list[float]]]) -> None:
    """Draw the images at the left and both curves at the right."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.9), layout="constrained", width_ratios=(2.1, 1)
    )
    tiles = Image.open(TILES)
    left.imshow(tiles, interpolation="nearest")
    left.set_yticks([SIZE * (i + 0.5) for i in range(len(ROWS))], ROWS, fontsize=12)
    left.set_xticks([])
    for name, tick in zip(ROWS, left.get_yticklabels(), strict=True):
        tick.set(color=COLORS.get(name, "black"), fontweight="bold")
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    for i in range(1, COLUMNS):
        left.axvline(i * SIZE - 0.5, color="white", lw=1.5)
    for i in range(1, len(ROWS)):
        left.axhline(i * SIZE - 0.5, color="white", lw=4)
    horizon = int(record.read(RECORD)["config"]["budget"]["horizon"])
    left.set_title(f"An erased style, “neon”, after {horizon} steps of an attack", fontsize=12)
    for name, (steps, value, low, high) in lines.items():
        right.plot(steps, value, "o-", color=COLORS[name], lw=2, ms=4)
        right.fill_between(steps, low, high, color=COLORS[name], alpha=0.15, lw=0)
    right.annotate("baseline", (6, 0.9), (2.2, 1.02), color=COLORS["baseline"], fontsize=12)
    right.annotate("immunized", (13, 0.6), color=COLORS["immunized"], fontsize=12)
    right.axvline(horizon, color="#999999", lw=0.8, ls=":")
    right.set(xlabel="steps of the attack", xlim=(0, None), ylim=(-0.02, 1.12))
    right.set_title("Attack success, both erased styles", fontsize=12)
    right.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    right.set_xticks(lines["baseline"][0])
    right.spines[["top", "right"]].set_visible(False)
    metadata = {"Description": json.dumps(lines), "Software": None}
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110, metadata=metadata)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Draw the figure, or check it; return the exit code."""
    lines = curves()
    if "--check" in arguments:
        return int(Image.open(FIGURE).info["Description"] != json.dumps(lines))
    if arguments:
        take_tiles(Path(arguments[0]))
    draw(lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
