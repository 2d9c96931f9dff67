"""Stages for `DistributedExecutor`, importable by name as `ranks_together` needs it."""

import os
from pathlib import Path

import torch

from lab.core.cache import Artifact, StageCache
from lab.core.distributed import team
from lab.core.errors import Diverged, RunFailed
from lab.core.hashing import stage_key
from lab.runner.executors import DistributedExecutor, ProcessStates
from lab.runner.experiment import describe
from lab.runner.pipeline import Stage

SHARDS = {"light": 0, "one": 1, "two": 2, "three": 3}


def make_stages(folder, names):
    """Return a stage per name; its kind is the part before the dash.

    Each leaves a file that says which process computed it.
    """

    def make(name):
        def compute(checkpoint):
            (folder / f"{name}.{os.environ['RANK']}").touch()
            if name.startswith("bad"):
                raise ValueError("a defect")
            if name.startswith("metric"):
                from torchmetrics import MeanMetric

                # one process computes a metric: it must not wait for the others
                metric = MeanMetric(sync_on_compute=False)
                metric.update(float(name[-1]))
                return Artifact({"mean": float(metric.compute())})
            return _sum(checkpoint, diverges=name.startswith("diverges"))

        return Stage("immunize", stage_key(name=name), compute, model=name)

    return [make(name) for name in names]


def _sum(checkpoint, diverges):
    """Σ n over 6 terms in two halves, with a checkpoint between them."""
    total, begun = torch.zeros(1), 0
    saved = checkpoint.load()
    if saved is not None:
        total, begun = saved[0]["total"], saved[1]["begun"]

    def compute(n):
        if diverges and n == 2:
            raise Diverged("no number", 1)
        return {"x": torch.full((1,), float(n))}

    for half in range(begun, 2):
        team().reduce_in_order(
            3, lambda n, half=half: compute(n + 3 * half), lambda _, term: total.add_(term["x"])
        )
        checkpoint.save({"total": total.clone()}, {"begun": half + 1})
    team().assert_equal({"total": total})
    return Artifact({"resumed_at": begun, "size": team().size}, {"total": total})


def execute(root, names):
    """Compute the stages; return what this process then knows."""
    folder = Path(root)
    states = ProcessStates(folder / "ranks")
    executor = DistributedExecutor(states, lambda: False, 60.0)
    store = StageCache(folder / "cache")
    stages = make_stages(folder, names)

    def shards(stage):
        return 0 if store.has(*stage.place) else SHARDS.get(str(stage.model).partition("-")[0], 1)

    def compute(stage):
        artifact, hit = store.get(*stage.place, stage.compute, stage.parents)
        return artifact.values | {k: float(t) for k, t in artifact.tensors.items()} | {"hit": hit}

    try:
        results = executor.map(compute, stages, shards)
    except Exception as error:
        cause = executor.cause(error)
        failure = describe(cause, rank=executor.rank)
        if not isinstance(cause, RunFailed):
            states.write(executor.rank or 0, "failed", failure)
        return {}, {"cause": str(failure), "echo": isinstance(cause, RunFailed)}
    return {}, {"results": results, "facts": executor.facts()}
