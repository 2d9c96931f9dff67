"""What processes of `ranks_together.together` compute; importable by name, as their server needs
it.
"""

from contextlib import suppress
from functools import cache

import torch
from attack_examples import Interrupted, MemoryCheckpoint
from mima_examples import case, model, preset, run, with_targets
from tiny_diffusion import tiny_concept

import run as _entry  # noqa: F401  (names the resolvers that configs use)
from lab.core.distributed import working
from lab.core.errors import Diverged


@cache
def three_concepts():
    return with_targets((*case().targets, tiny_concept("sunset", "harmful", "style")))


def immunized(team, name, changes, halves=False):
    """Weights that moved and the rows of the log.

    Args:
        halves: go on from the first checkpoint of a run in one process.
    """
    rows = []
    immunizer = preset(name, **changes)
    checkpoint = None
    if halves:
        checkpoint = MemoryCheckpoint(fail_at=1)
        with suppress(Interrupted):
            run(immunizer, on=three_concepts(), checkpoint=checkpoint)
    with working(team):
        result = run(
            immunizer,
            on=three_concepts(),
            checkpoint=checkpoint,
            log=lambda step, **values: rows.append([step, values]),
        )
    old = model().state_dict()
    moved = {
        key: value for key, value in result.state_dict().items() if not torch.equal(value, old[key])
    }
    return moved, {"rows": rows}


def immunized_with_a_fault(team, name, changes, step):
    """The last process alters a weight by its last bit after the gradient of ``step``."""
    from immunize.mima.outer_loop import OuterLoop

    plain = OuterLoop.step

    def faulty(self, now):
        if now == step and team.rank == team.size - 1:
            weight = self.theta[self.objective.outer_names[0]].data.view(-1)
            weight[0] = torch.nextafter(weight[0], weight.new_tensor(torch.inf))
        return plain(self, now)

    OuterLoop.step = faulty
    return immunized(team, name, changes)


def shared(team):
    """One tensor of each dtype, of zero and of more dimensions, from the last process; and JSON
    with nan and inf.
    """
    own = {
        "half": torch.full((2, 3), float(team.rank), dtype=torch.bfloat16),
        "scalar": torch.tensor(team.rank + 0.5, dtype=torch.float64),
        "turned": (torch.arange(6.0).view(2, 3) + team.rank).t(),
        "empty": torch.empty(0, 4),
    }
    if team.rank != team.size - 1:
        own = {"unread": torch.zeros(1)}
    values = {"rank": team.rank, "wide": [float("inf"), "ä"]}
    values = team.broadcast_object(values, team.size - 1)
    gathered = sorted(team.gather({10 + team.rank: team.rank}).items())
    return team.broadcast(own, team.size - 1), values | {"gathered": gathered}


def summed(team, count):
    """A sum whose bits depend on the order of its terms; who computed which."""
    own = []
    order = []
    total = torch.zeros(3)

    def compute(n):
        own.append(n)
        return {"x": torch.tensor([10.0 ** (7 - 3 * n), 1 / (n + 3), (-1) ** n * 1e8 + n])}

    def add(n, term):
        order.append(n)
        total.add_(term["x"])

    team.reduce_in_order(count, compute, add)
    return {"total": total}, {"own": own, "order": order}


def failing(team, kind):
    """The term of concept 1 cannot be computed."""

    def compute(n):
        if n == 1:
            raise (
                Diverged("no number", 7) if kind == "Diverged" else FloatingPointError("no number")
            )
        return {"x": torch.ones(1)}

    try:
        team.reduce_in_order(3, compute, lambda n, term: None)
    except Diverged as error:
        return {}, {"raised": "Diverged", "message": str(error), "step": error.step}
    return {}, {}
