"""Run the same small studies in two checkouts and compare every number that they give.

    python tests/golden/side_by_side.py --old /path/to/old --new /path/to/new [--only NAME ...]

Both run with the Python that runs this script, one thread each, in folders of their own. Compared
are all numbers of the record (metrics, curves, tables), hashes of the immunized weights, and the
tensors and numbers of every stage in the cache. Tensors and stage numbers are compared without
their names. The exit code is 1 where anything differs, bit for bit, and 2 where a study fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.core.migration import current_name

# New name of a part of a figure's path by its old name, beyond `lab.core.migration.current_name`.
RENAMED: dict[str, str] = {"arm": "model"}

# Hashes of weights in a record are over names of parameters, too. Set to False where those change;
# the tensors themselves are compared in any case.
COMPARE_WEIGHT_HASHES = True

ALWAYS = ("tracker=none", "threads=1")
OUTPUTS = "paths.outputs={folder}"  # where a run writes; {folder} is filled in

# what debug=wiring once was in full; it has limits of its own now
_WIRING = "seeds=[0] budget.horizon=2 budget.multiple=1 budget.points=2 budget.at=null"
_QUICK = "scenario.sampling.count=4 eval.utility.count=20 eval.concept_verdict.count=20"
_KAPPA = (
    "experiment=house_price seeds=[0,1] immunize=kappa "
    "attacks=[linear_probe,probe_adam,probe_lbfgs,probe_kfac,probe_whitening] "
    "eval=[conditioning,conditioning_release,conditioning_ridge,geometry,convergence,verdict]"
)
_CLOSED_FORM = (
    "experiment=house_price seeds=[0,1,2] immunize=kappa_closed_form "
    "attacks=[linear_probe,probe_sgd,probe_newton,extractor_full_finetune]"
)
_DEEP = (
    f"experiment=deep_probe {_WIRING} immunize.steps=4 "
    "attacks=[probe_logistic,last_block_finetune,extractor_lora] "
    "attacks.extractor_lora.lr=1e-3 "
    "scenario.size=64 scenario.train_rows=200 scenario.test_rows=60"
)
_DEFAULT = f"{_WIRING} immunize.steps=4 immunize.decoys=4 {_QUICK}"
_ATTACKS = "attacks=[dreambooth,custom_diffusion,textual_inversion]"
_MIMA = f"{_WIRING} immunize=mima immunize.steps=3 {_ATTACKS} {_QUICK}"
_PERSONALIZE = (
    f"experiment=personalize {_WIRING} immunize=mima_released immunize.steps=4 "
    f"attacks=[lora_text_encoder,curriculum] {_QUICK}"
)


class Study(NamedTuple):
    """A run, as command words of the old and of the new checkout."""

    name: str
    old: str
    new: str


STUDIES = (
    Study("house_price_kappa", _KAPPA, _KAPPA),
    Study("house_price_closed_form", _CLOSED_FORM, _CLOSED_FORM),
    Study("deep_probe", _DEEP, _DEEP),
    Study("minisd_default", _DEFAULT, _DEFAULT),
    Study("minisd_mima", _MIMA, _MIMA),
    Study("minisd_personalize", _PERSONALIZE, _PERSONALIZE),
)


@dataclass
class Result:
    """What a study gave in one checkout."""

    figures: dict[str, float | None]
    hashes: Counter[str]  # of weights, from the record
    weights: Counter[str]  # content of the tensors of the stage `immunize`
    tensors: Counter[str]  # content of the tensors of every stage
    values: Counter[str]  # numbers and lists of numbers of every stage
    seconds: float


@dataclass
class Row:
    """How the results of two checkouts compare."""

    study: str
    compared: int
    equal: int
    largest: float
    weights: bool
    hashes: bool
    tensors: tuple[int, int]
    values: tuple[int, int]
    seconds: tuple[float, float]
    told: list[str]

    @property
    def same(self) -> bool:
        """Tell whether nothing differs."""
        counts = (self.compared, self.equal), self.tensors, self.values
        hashes = self.hashes or not COMPARE_WEIGHT_HASHES
        return self.weights and hashes and all(a == b for a, b in counts)


# ---- running


def run(checkout: Path, words: str, folder: Path) -> Result:
    """Run a study in a checkout, with its outputs in a folder, and collect what it gave."""
    folder.mkdir(parents=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    outputs = folder / "outputs"
    asked = [*words.split(), *ALWAYS, OUTPUTS.format(folder=outputs)]
    started = time.monotonic()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        command = [sys.executable, str(checkout / "run.py"), *asked]
        ended = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log)
    seconds = time.monotonic() - started
    records = sorted(outputs.rglob("record.json"))
    if ended.returncode or len(records) != 1:
        end = (folder / "log.txt").read_text(encoding="utf-8")[-2000:]
        told = f"exit code {ended.returncode}, {len(records)} records"
        raise RuntimeError(f"{checkout}: {told}\n{end}")
    return collect(json.loads(records[0].read_text(encoding="utf-8")), outputs, seconds)


# ---- collecting


def collect(record: dict[str, Any], outputs: Path, seconds: float) -> Result:
    """Gather the numbers of a record and of the stages in the cache below a folder."""
    figures: dict[str, float | None] = {}
    for part in ("metrics", "curves", "tables"):
        figures.update(numbers(part, record[part]))
    hashes = Counter(
        f"{cell.get('model', cell.get('arm'))} {cell['case']} {cell['seed']} {cell['weights']}"
        for cell in record["cells"]
        if cell.get("weights")
    )
    weights: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    values: Counter[str] = Counter()
    for path in sorted(outputs.rglob("*.safetensors")):
        found = tensor_hashes(path)
        tensors.update(found)
        if "immunize" in path.relative_to(outputs).parts:
            weights.update(found)
    for path in sorted(outputs.rglob("values.json")):
        values.update(leaves(json.loads(path.read_text(encoding="utf-8"))))
    return Result(figures, hashes, weights, tensors, values, seconds)


def numbers(path: str, node: Any) -> Iterator[tuple[str, float | None]]:
    """Yield every number below a node with the path that leads to it; None stands for itself."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from numbers(f"{path}/{key}", value)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from numbers(f"{path}/{i}", value)
    elif node is None or isinstance(node, bool | int | float):
        yield path, node


def tensor_hashes(path: Path) -> list[str]:
    """Hash dtype, shape and bytes of every tensor of a file, without its name."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = []
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            total = hashlib.sha256(f"{entry['dtype']} {entry['shape']} ".encode())
            total.update(data[start + first : start + end])
            found.append(total.hexdigest())
    return found


def leaves(node: Any) -> Iterator[str]:
    """Yield every number and every list of numbers below a node, as text, without its name."""
    if isinstance(node, dict):
        for value in node.values():
            yield from leaves(value)
    elif isinstance(node, list) and not all(_is_number(value) for value in node):
        for value in node:
            yield from leaves(value)
    elif isinstance(node, list) or _is_number(node):
        yield json.dumps(node)


def _is_number(node: Any) -> bool:
    return isinstance(node, int | float) and not isinstance(node, bool)


# ---- comparing


def renamed(path: str) -> str:
    """Return a path of the old checkout as the new one writes it."""
    return "/".join(current_name(RENAMED.get(part, part)) for part in path.split("/"))


def distance(old: float | None, new: float | None) -> float:
    """Return the relative difference of two figures; inf where only one is a number."""
    if old == new or (_is_nan(old) and _is_nan(new)):
        return 0.0
    if old is None or new is None or not (math.isfinite(old) and math.isfinite(new)):
        return math.inf
    return abs(new - old) / max(abs(old), abs(new))


def _is_nan(value: float | None) -> bool:
    return isinstance(value, float) and math.isnan(value)


def shared(old: Counter[str], new: Counter[str]) -> tuple[int, int]:
    """Count the contents of both together, and those that both have."""
    return (old | new).total(), (old & new).total()


def compare(study: str, old: Result, new: Result) -> Row:
    """Compare the results of a study; `told` names the figures that differ most.

    ``bound`` is left out: records of schema 1.x said it in the note.
    """
    before = {renamed(path): value for path, value in old.figures.items()}
    after = {path: value for path, value in new.figures.items() if not path.endswith("/bound")}
    apart = dict.fromkeys({*before, *after}, math.inf)  # for those that one side lacks
    for path in before.keys() & after.keys():
        apart[path] = distance(before[path], after[path])
    worst = sorted((path for path, far in apart.items() if far), key=lambda p: (-apart[p], p))
    missing = "missing"
    told = [f"{p}: {before.get(p, missing)} -> {after.get(p, missing)}" for p in worst[:10]]
    return Row(
        study,
        compared=len(apart),
        equal=len(apart) - len(worst),
        largest=max(apart.values(), default=0.0),
        weights=old.weights == new.weights,
        hashes=old.hashes == new.hashes,
        tensors=shared(old.tensors, new.tensors),
        values=shared(old.values, new.values),
        seconds=(old.seconds, new.seconds),
        told=told,
    )


HEADS = (
    "study",
    "figures",
    "equal",
    "largest rel. diff.",
    "weights equal",
    "weight hashes equal",
    "tensors equal",
    "stage numbers equal",
    "seconds old, new",
)


def cells(row: Row) -> tuple[str, ...]:
    """Format a row of the table."""
    yes = {True: "yes", False: "NO"}
    return (
        row.study,
        str(row.compared),
        str(row.equal),
        f"{row.largest:.3g}",
        yes[row.weights],
        yes[row.hashes],
        f"{row.tensors[1]} of {row.tensors[0]}",
        f"{row.values[1]} of {row.values[0]}",
        f"{row.seconds[0]:.0f}, {row.seconds[1]:.0f}",
    )


def show(table: list[tuple[str, ...]]) -> None:
    """Print rows with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        print("  ".join(padded).rstrip())


def main() -> int:
    """Run and compare the chosen studies; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="checkout whose numbers count")
    parser.add_argument("--new", type=Path, required=True, help="checkout to compare with it")
    names = [study.name for study in STUDIES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="2: both at once")
    parser.add_argument("--keep", type=Path, help="an empty folder for outputs, which stay there")
    asked = parser.parse_args()
    checkouts = asked.old.resolve(), asked.new.resolve()
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(asked.jobs) as pool:
        base = (asked.keep or Path(made)).resolve()
        for study in STUDIES:
            if study.name not in asked.only:
                continue
            words, sides = (study.old, study.new), ("old", "new")
            folders = [base / study.name / side for side in sides]
            try:
                old, new = pool.map(run, checkouts, words, folders)
            except RuntimeError as error:
                print(f"{study.name} FAILED in {error}", flush=True)
                failed += 1
                continue
            rows.append(compare(study.name, old, new))
            verdict = "equal" if rows[-1].same else "DIFFERENT"
            print(f"{study.name}: {verdict}", *rows[-1].told, sep="\n  ", flush=True)
    show([HEADS, *map(cells, rows)])
    if failed:
        return 2
    return 0 if all(row.same for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
