"""Run the same small studies in two checkouts and compare every number that they give.

    python tests/golden/side_by_side.py --old /path/to/old --new /path/to/new [--only NAME ...]

The old checkout may be as old as fc147ca; its records are brought to today's names by
`lab.core.migration`. Both run with the Python that runs this script, one thread each, in folders of
their own. Compared are all numbers of the record (metrics, curves, tables), hashes of the immunized
weights, and the tensors and numbers of every stage in the cache. Tensors and stage numbers are
compared without their names. The exit code is 1 where anything differs, bit for bit, and 2 where a
study fails. Against fc147ca the immunized feature extractors are equal; figures of attackers that
have used torch's optimizers since then differ by less than 1e-12. MiniSD has other weights since
then, so its studies (`minisd_…`) compare later checkouts only.
"""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.core.migration import current_name, migrate

# what debug=wiring was at fc147ca; today it has limits of its own
_WIRING = "seeds=[0] budget.horizon=2 budget.multiple=1 budget.points=2 budget.at=null"
_FEW_IMAGES = (
    "scenario.families=[name] scenario.sampling.steps=8 scenario.sampling.count=4 "
    "eval.utility.count=20 eval.concept_verdict.count=20"
)
STUDIES = {
    "house_price_kappa": (
        "experiment=house_price seeds=[0,1] immunize=kappa "
        "attacks=[linear_probe,probe_adam,probe_lbfgs,probe_kfac,probe_whitening] "
        "eval=[conditioning,conditioning_release,conditioning_ridge,geometry,convergence,verdict]"
    ),
    "house_price_closed_form": (
        "experiment=house_price seeds=[0,1,2] immunize=kappa_closed_form "
        "attacks=[linear_probe,probe_sgd,probe_newton,extractor_full_finetune]"
    ),
    "deep_probe": (
        f"experiment=deep_probe {_WIRING} immunize.steps=4 "
        "attacks=[probe_logistic,last_block_finetune,extractor_lora] "
        "attacks.extractor_lora.lr=1e-3 "
        "scenario.size=64 scenario.train_rows=200 scenario.test_rows=60"
    ),
    "minisd_default": (
        f"{_WIRING} immunize=mima_deep_quick immunize.steps=4 immunize.decoys=4 {_FEW_IMAGES}"
    ),
    "minisd_mima": (
        f"{_WIRING} immunize=mima immunize.steps=3 "
        f"attacks=[dreambooth,custom_diffusion,textual_inversion] {_FEW_IMAGES}"
    ),
    "minisd_personalize": (
        f"experiment=personalize {_WIRING} immunize=mima_released immunize.steps=4 "
        f"attacks=[lora_text_encoder,curriculum] {_FEW_IMAGES}"
    ),
}
DDIM = "scenario.sampling.sampler=ddim"  # the only sampler at fc147ca, which has no key for it


class Result(NamedTuple):
    """What a study gave in one checkout."""

    figures: dict[str, float | None]
    hashes: Counter[str]  # of weights, from the record
    weights: Counter[str]  # content of the tensors of the stage `immunize`
    tensors: Counter[str]  # content of the tensors of every stage
    values: Counter[str]  # numbers and lists of numbers of every stage
    seconds: float


# ---- running


def run(checkout, words, folder):
    """Run a study in a checkout, with its outputs in a folder, and collect what it gave."""
    folder.mkdir(parents=True)
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"), "1")
    environment = {**os.environ, **single, "PYTHONPATH": str(checkout)}
    outputs = folder / "outputs"
    words += f" tracker=none threads=1 paths.outputs={outputs}"
    sampling = (checkout / "conf/scenario/relearn_styles.yaml").read_text(encoding="utf-8")
    if "scenario.sampling" in words and "sampler:" in sampling:
        words += f" {DDIM}"
    started = time.monotonic()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        command = [sys.executable, str(checkout / "run.py"), *words.split()]
        ended = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log)
    seconds = time.monotonic() - started
    records = sorted(outputs.rglob("record.json"))
    if ended.returncode or len(records) != 1:
        end = (folder / "log.txt").read_text(encoding="utf-8")[-2000:]
        reason = f"exit code {ended.returncode}, {len(records)} records"
        raise RuntimeError(f"{checkout}: {reason}\n{end}")
    return collect(migrate(json.loads(records[0].read_text(encoding="utf-8"))), outputs, seconds)


# ---- collecting


def collect(record, outputs, seconds):
    """Gather the numbers of a record and of the stages in the cache below a folder."""
    figures = {k: v for k in ("metrics", "curves", "tables") for k, v in numbers(k, record[k])}
    hashes = Counter(
        f"{stage['model']} {stage['case']} {stage['seed']} {stage['weights']}"
        for stage in record["stages"]
        if stage.get("weights")
    )
    weights = Counter()
    tensors = Counter()
    values = Counter()
    for path in sorted(outputs.rglob("*.safetensors")):
        content = tensor_hashes(path)
        tensors.update(content)
        if "immunize" in path.relative_to(outputs).parts:
            weights.update(content)
    for path in sorted(outputs.rglob("values.json")):
        values.update(leaves(json.loads(path.read_text(encoding="utf-8"))))
    return Result(figures, hashes, weights, tensors, values, seconds)


def numbers(path, node):
    """Yield every number below a node with the path that leads to it; None stands for itself.

    Rows of a table are named by their metric. ``bound`` and ``note`` are left out: at fc147ca they
    were one text.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            yield from numbers(f"{path}/{key}", value)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            row = (
                current_name(value["metric"])
                if isinstance(value, dict) and "metric" in value
                else i
            )
            yield from numbers(f"{path}/{row}", value)
    elif not path.endswith(("/bound", "/note")) and (
        node is None or isinstance(node, bool | int | float)
    ):
        yield path, node


def tensor_hashes(path):
    """Hash dtype, shape and bytes of every tensor of a file, without its name."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    hashes = []
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            total = hashlib.sha256(f"{entry['dtype']} {entry['shape']} ".encode())
            total.update(data[start + first : start + end])
            hashes.append(total.hexdigest())
    return hashes


def leaves(node):
    """Yield every number and every list of numbers below a node, as text, without its name."""
    if isinstance(node, dict):
        node = list(node.values())
    elif _is_number(node) or (isinstance(node, list) and all(map(_is_number, node))):
        yield json.dumps(node)
        return
    for value in node if isinstance(node, list) else ():
        yield from leaves(value)


def _is_number(node):
    return isinstance(node, int | float) and not isinstance(node, bool)


# ---- comparing


def distance(old, new):
    """Return the relative difference of two figures; inf where only one is a number."""
    if old == new or (old is not None and new is not None and math.isnan(old) and math.isnan(new)):
        return 0.0
    if old is None or new is None or not (math.isfinite(old) and math.isfinite(new)):
        return math.inf
    return abs(new - old) / max(abs(old), abs(new))


def shared(old, new):
    """Say how many contents of both together both have."""
    return f"{(old & new).total()} of {(old | new).total()}"


def compare(study, old, new):
    """Compare the results of a study; figures that only the new checkout has are left out.

    Returns:
        a row of the table, whether nothing differs, and the figures that differ most.
    """
    missing = math.inf
    apart = {k: distance(v, new.figures.get(k, missing)) for k, v in old.figures.items()}
    worst = sorted((path for path, far in apart.items() if far), key=lambda p: (-apart[p], p))
    listed = [f"{p}: {old.figures[p]} -> {new.figures.get(p, 'missing')}" for p in worst[:10]]
    row = {
        "study": study,
        "figures": len(apart),
        "equal": len(apart) - len(worst),
        "largest rel. diff.": f"{max(apart.values(), default=0.0):.3g}",
        "immunized weights": shared(old.weights, new.weights),
        "weight hashes": shared(old.hashes, new.hashes),
        "tensors": shared(old.tensors, new.tensors),
        "stage numbers": shared(old.values, new.values),
        "seconds old, new": f"{old.seconds:.0f}, {new.seconds:.0f}",
    }
    return row, not worst and old[1:-1] == new[1:-1], listed


def main():
    """Run and compare the chosen studies; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="checkout whose numbers count")
    parser.add_argument("--new", type=Path, required=True, help="checkout to compare with it")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=[*STUDIES], metavar="NAME")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="2: both at once")
    parser.add_argument("--keep", type=Path, help="an empty folder for outputs, which stay there")
    arguments = parser.parse_args()
    checkouts = arguments.old.resolve(), arguments.new.resolve()
    rows, outcomes = [], []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(arguments.jobs) as pool:
        base = (arguments.keep or Path(temporary)).resolve()
        for study in arguments.only:
            folders = [base / study / side for side in ("old", "new")]
            try:
                old, new = pool.map(run, checkouts, [STUDIES[study]] * 2, folders)
            except RuntimeError as error:
                print(f"{study} FAILED in {error}", flush=True)
                outcomes.append(2)
                continue
            row, same, listed = compare(study, old, new)
            print(f"{study}: {'equal' if same else 'DIFFERENT'}", *listed, sep="\n  ", flush=True)
            rows.append(row)
            outcomes.append(0 if same else 1)
    print(pd.DataFrame(rows).to_string(index=False))
    return max(outcomes)


if __name__ == "__main__":
    sys.exit(main())
