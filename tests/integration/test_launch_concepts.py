"""`launch=cpu` with a text-to-image immunizer: within one immunization the concepts are spread over
the processes.
"""

import pytest
import torch
from processes import ended, found_records, start
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

RUN = [
    "experiment=relearn",
    "scenario=relearn_quick",
    "immunize=mima",
    "immunize.steps=6",
    "immunize.batch_size=1",
    "immunize.prior_batch_size=1",
    "attacks=none",
    "eval=[utility]",
    "eval.utility.count=4",
    "eval.utility.features=false",
    "tracker=none",
    "threads=1",
    "scenario.own=8",
    "scenario.train=4",
    "scenario.prior=8",
    "scenario.reference=4",
    "scenario.keep=16",
    "scenario.unrelated=8",
    "scenario.regularizers=20",
    "erase.preserve=20",
]


def immunized(folder):
    """Tensors of the immunized model's stage."""
    found = [load_file(path) for path in folder.rglob("cache/immunize/*/*/*.safetensors")]
    (tensors,) = [one for one in found if one]
    return tensors


def run(folder, processes):
    """Weights and record of the run in so many processes."""
    folder.mkdir()
    ended(
        start(
            folder,
            *RUN,
            *(["launch=cpu", f"launch.num_processes={processes}"] if processes > 1 else []),
        )
    )
    return immunized(folder), found_records(folder)[0]


def test_1_2_and_3_processes_give_the_same_weights_after_6_steps(tmp_path):
    """Of three processes, two have a concept each; the third takes part in what all compute."""
    alone, record = run(tmp_path / "1", 1)
    for processes in (2, 3):
        folder = tmp_path / str(processes)
        shared, other = run(folder, processes)
        assert alone.keys() == shared.keys()
        for name, tensor in alone.items():
            assert torch.isfinite(shared[name]).all(), name
            assert (
                tensor.double() - shared[name].double()
            ).norm() <= 1e-5 * tensor.double().norm(), name
        assert other["provenance"]["processes"] == processes
        for name, score in record["metrics"].items():
            value = other["metrics"][name]["value"]
            assert value == score["value"] or score["low"] <= value <= score["high"], name
        logs = [path.read_text() for path in folder.rglob("ranks/*.log")]
        assert len(logs) == processes - 1
        assert any(
            f"stage immunize stained-glass_guitar, seed 0, with {processes} processes" in log
            for log in logs
        )
        assert not any("Traceback" in log for log in logs)
