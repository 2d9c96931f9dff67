"""Every attack by itself: what its search chose, and how often its pictures show the concept along
it.
"""

from __future__ import annotations

from typing import Any

from eval.generation.generations import DETECTED, EvaluatedRun
from lab.core.types import BASELINE, RunView, Trajectory


def attack_rows(run: RunView, board: EvaluatedRun) -> list[dict[str, Any]]:
    """One row per seed, case, concept, attack and model.

    ``trials`` of ``search`` were made on this model, and ``chosen`` is the best of them;
    ``at_STEP``: share of the pictures asked for by name in which the detector sees the concept,
        null beyond the end of an attack that diverged.
    """
    tasks = {
        (seed, case.name, t.name): (case, t)
        for seed in run.seeds
        for case in run.cases(seed)
        for t in case.tasks
    }
    width = len(str(board.plan[-1]))  # columns stand in the order of their names
    out = []
    for cell, role in board.roles.items():
        case, task = tasks[cell.seed, cell.case, cell.concept]
        common = {"concept": cell.concept, "role": role, "case": cell.case, "seed": cell.seed}
        for attack in board.attacks:
            for model_name in board.model_names:
                reading = board.at(cell, model_name, attack)
                shares = reading.values[DETECTED].mean(1)
                row = {
                    **common,
                    "attack": attack,
                    "model": model_name if model_name == BASELINE else "immunized",
                }
                row |= {
                    "status": reading.status,
                    **searched(run.trajectory(model_name, attack, case, task, cell.seed)),
                }
                seen = [float(share) if i < reading.end else None for i, share in enumerate(shares)]
                row |= {
                    f"at_{step:0{width}d}": share
                    for step, share in zip(board.plan, seen, strict=True)
                }
                out.append(row)
    return out


def searched(trajectory: Trajectory) -> dict[str, Any]:
    """How an attack's options were searched, in words: ``grid of 14 steps by held_out_loss``; all
    None without one.
    """
    search = trajectory.info.get("search")
    if not search:
        return {"search": None, "trials": None, "chosen": None}
    chosen = ", ".join(f"{key}={value}" for key, value in search["best"].items())
    return {
        "search": f"{search['mode']} of {search['steps']} steps by {search['score']}",
        "trials": len(search["trials"]),
        "chosen": chosen or "nothing: every trial diverged",
    }
