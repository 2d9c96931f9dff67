"""Draw the two figures of README.md from the committed records.

``python docs/readme_figures.py`` draws ``docs/images/first_run.png`` and ``results.png`` where they
show other values than the records, or where their files were deleted. With the folder of a newer
first run it takes the images from there. ``--check`` changes nothing and fails where a figure is
out of date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import RECORDS, ROOT, read
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from eval.report.plots import COLORS as SIDES
from eval.report.plots import STYLE, set_log
from lab.core.images import GAP, PAD
from lab.core.types import BASELINE, IMMUNIZED

FIGURES = ROOT / "docs/images"
IMAGES = RECORDS / "first_run/guitar.png"  # rows: reference, baseline, immunized, both at 1×
ROWS, COLUMNS, CELL = ("reference", BASELINE, IMMUNIZED), 6, 128 + GAP
COLORS = {BASELINE: "#c2571a", IMMUNIZED: "#2b6cb0"}
METHODS = {  # label → record
    "never saw the targets": "retrained",
    "joint": "joint",
    "mima_deep (ours)": "mima_deep",
    "MIMA": "mima",
    "MIMA, a third of the step": "mima_lr_1e-4",
    "MIMA, as released": "mima_released",
    "compose": "compose",
    "undo": "undo",
    "IMMA": "imma",
    "another seed (control)": "other_seed",
    "weight noise (control)": "weight_noise",
}


def take_images(run: Path) -> None:
    """Cut the rows at 1× out of the run's grid of guitars, and keep them in `IMAGES`."""
    budget = json.loads((run / "record.json").read_text(encoding="utf-8"))["config"]["budget"]
    marks = len({m * budget["horizon"] for m in (1, 2, budget["multiple"])})
    grid = Image.open(run / "images/generations_guitar.png").convert("RGB")
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
    stored = read("first_run", "joint_stored")
    curve = stored["curves"]["asr"]
    lines = {
        name: [curve["step"], curve[name], curve[f"{name}:low"], curve[f"{name}:high"]]
        for name in (BASELINE, IMMUNIZED)
    }
    return {"horizon": stored["config"]["budget"]["horizon"], "lines": lines}


def draw_first_run(values: dict[str, Any]) -> Figure:
    """Draw the images at the left and both curves at the right."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.1, 1))
    left.imshow(Image.open(IMAGES), interpolation="nearest")
    left.set_yticks([CELL * (i + 0.5) for i in range(len(ROWS))], ROWS, fontsize=12)
    left.set_xticks([])
    for name, tick in zip(ROWS, left.get_yticklabels(), strict=True):
        tick.set(color=COLORS.get(name, "black"), fontweight="bold")
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    horizon, lines = values["horizon"], values["lines"]
    left.set_title(f"An erased object, the guitar, after {horizon} steps of an attack", fontsize=12)
    for name, (steps, value, low, high) in lines.items():
        right.plot(steps, value, "o-", color=COLORS[name], lw=2, ms=4)
        right.fill_between(steps, low, high, color=COLORS[name], alpha=0.15, lw=0)
    for name, place in ((BASELINE, (28, 1.02)), (IMMUNIZED, (30, 0.5))):
        right.annotate(name, place, color=COLORS[name], fontsize=12)
    right.axvline(horizon, color="#999999", lw=0.8, ls=":")
    right.set(xlabel="steps of the attack", xlim=(0, None), ylim=(-0.02, 1.12))
    right.set_title("Attack success, style and object", fontsize=12)
    right.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    right.set_xticks(lines[BASELINE][0])
    right.spines[["top", "right"]].set_visible(False)
    return figure


def slowdowns(records: str, rows: dict[str, str]) -> dict[str, Any]:
    """Return the slowdown of the slowest other concept, the relearning slowdown of the
    least-protected target, and the share of unrelated detections that is lost, per label of
    ``rows``, and what the verdict of the last record requires of them.
    """
    points: dict[str, Any] = {}
    limits: dict[str, float] = {}
    for label, method in rows.items():
        stored = read(records, method)
        metrics = stored["metrics"]
        names = ("benign_steps_usable_ratio_worst", "steps_to_relearn_usable_ratio_worst")
        sides = [metrics[name] for name in (*names, "utility_detection_drop")]
        points[label] = [{part: side[part] for part in ("value", "low", "high")} for side in sides]
        limits = stored["config"]["eval"]["concept_verdict"]
    required = [limits["max_benign_steps_ratio"], limits["min_worst_steps_ratio"]]
    required.append(limits["max_detection_drop"])
    return {"limits": required, "points": points}


@rc_context(STYLE)
def draw_slowdowns(values: dict[str, Any]) -> Figure:
    """Draw a point with its 95 % intervals per method, from what `slowdowns` returned; its colour
    is the share of unrelated detections that is lost. The first one is highlighted, and the region
    that passes is shaded.
    """
    limits = values["limits"]
    fig = Figure(figsize=(8.5, 4.4), layout="constrained")
    axes = fig.add_subplot()
    colors = ScalarMappable(Normalize(0, 100 * limits[2]), "YlOrRd")
    for i, (label, (x, y, drop)) in enumerate(values["points"].items()):
        errors = [[[m["value"] - m["low"]], [m["high"] - m["value"]]] for m in (y, x)]
        color = colors.to_rgba(100 * drop["value"])
        style: Any = {"fmt": "os^DvPX*hp<>"[i % 12], "label": label, "zorder": 3 + i}
        style |= {"color": color, "markeredgecolor": "black", "ecolor": "gray"}
        style |= (
            {"markersize": 8, "elinewidth": 0.5} if i else {"markersize": 12, "elinewidth": 1.5}
        )
        axes.errorbar(x["value"], y["value"], *errors, **style)
    for side in "xy":
        set_log(axes, side)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.fill_between([left, limits[0]], limits[1], top, color=SIDES["good"], alpha=0.13, lw=0)
    axes.text(left, top, "\n  meets both limits", color=SIDES["good"], va="top")
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_xlabel("slowdown of the slowest benign concept, × (lower is better)")
    axes.set_ylabel("slowdown of the least-protected target, × (higher is better)")
    bar = fig.colorbar(colors, ax=axes, extend="max", pad=0.01)
    bar.set_label("unrelated detections lost, points (limit at the top)")
    fig.legend(loc="outside right upper")
    return fig


def is_current(path: Path, values: Any, draw: Callable[[Any], Figure]) -> bool:
    """Return whether an image shows ``values``. If not, draw it, except with ``--check``."""
    description = json.dumps(values)
    if path.is_file() and Image.open(path).info.get("Description") == description:
        return True
    if "--check" not in sys.argv:
        metadata = {"Description": description, "Software": None}
        draw(values).savefig(path, dpi=110, metadata=metadata)
    return "--check" not in sys.argv


def main(arguments: list[str]) -> int:
    """Draw the figures, or check them; return the exit code."""
    if arguments and arguments != ["--check"]:
        take_images(Path(arguments[0]))
        (FIGURES / "first_run.png").unlink(missing_ok=True)
    results = slowdowns("lite", METHODS)
    are_current = (
        is_current(FIGURES / "first_run.png", first_run_values(), draw_first_run),
        is_current(FIGURES / "results.png", results, draw_slowdowns),
    )
    return int(not all(are_current))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
