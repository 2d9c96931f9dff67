"""`dry_run=true`: what a run would compute and what it would read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.runner.experiment import Run


def plan(run: Run) -> None:
    """Print the stages of a run with hits and misses; computes nothing."""
    pipeline = run.prepare()
    cells = [*pipeline.immunize_cells(), *pipeline.attack_cells()]
    cells += [pipeline.eval_cell(name) for name in run.applicable()]
    hits = 0
    print(
        f"plan of {run.cfg.name}/{run.cfg.immunize.name}: models {', '.join(pipeline.model_names)}"
    )
    for cell in cells:
        hit = pipeline.store.has(*cell.place, cell.parents)
        hits += hit
        print(f"  {'hit ' if hit else 'miss'}  {cell.key[:12]}  {cell.title}")
    print(f"{len(cells)} stages, {hits} hits, {len(cells) - hits} misses")
