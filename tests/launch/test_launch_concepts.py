"""`launch=cpu` with a text-to-image immunizer: within one immunization the concepts are spread over the processes."""

import re

import pytest
import torch
from processes import ended, found_records, start
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

RUN = [
    "experiment=relearn", "scenario=relearn_styles_quick", "immunize=mima", "immunize.steps=3", "immunize.batch_size=2",
    "attacks=none", "eval=[utility]", "eval.utility.count=4", "eval.utility.features=false", "tracker=none",
    "threads=1",
]  # fmt: skip


def immunized(folder):
    """Tensors of the immunized arm's stage, by the stage's key."""
    found = {path.parent.name: load_file(path) for path in folder.rglob("cache/immunize/*/*/*.safetensors")}
    return {key: tensors for key, tensors in found.items() if tensors}


def test_processes_share_the_concepts_and_give_the_weights_of_one(tmp_path):
    """Of three processes, two have a concept each; the third takes part in what all compute."""
    processes = 3
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    ended(start(tmp_path / "one", *RUN))
    ended(start(tmp_path / "two", *RUN, "launch=cpu", f"launch.num_processes={processes}"))
    one, two = immunized(tmp_path / "one"), immunized(tmp_path / "two")
    assert one.keys() == two.keys()
    assert len(one) == 1
    (alone,), (shared,) = one.values(), two.values()
    assert alone.keys() == shared.keys()
    change = sum((alone[k].double() - shared[k].double()).square().sum() for k in alone) ** 0.5
    assert change <= 1e-5 * sum(v.double().square().sum() for v in alone.values()) ** 0.5
    assert all(torch.isfinite(v).all() for v in shared.values())
    records = [found_records(tmp_path / name)[0] for name in ("one", "two")]
    assert [r["provenance"].get("processes", 1) for r in records] == [1, processes]
    for name, score in records[0]["metrics"].items():
        other = records[1]["metrics"][name]["value"]
        assert other == score["value"] or score["low"] <= other <= score["high"], name
    logs = [path.read_text() for path in (tmp_path / "two").rglob("ranks/*.log")]
    assert len(logs) == processes - 1
    assert any(re.search(r"stage immunize mima mosaic_neon 0, with processes \[[012], [012]\]", log) for log in logs)
    assert not any("Traceback" in log for log in logs)
