"""The stages of a run before they are computed: which the cache has, how long the others take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod
from statistics import mean

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from lab.runner.pipeline import Pipeline, Stage

log = logging.getLogger("progress")  # conf/hydra/job_logging/quiet.yaml shows it on the terminal

# seconds for a step of an immunization, a step of an attack, and a metric on two CPU cores: rough;
# those of diffusion were measured in the first run
STEP_SECONDS = {
    "linear": {"immunize": 0.02, "attack": 0.01, "eval": 0.5},
    "deep": {"immunize": 0.1, "attack": 0.1, "eval": 2.0},
    "diffusion": {"immunize": 1.0, "attack": 0.11, "eval": 6.0},
}
SAMPLING_SECONDS = 0.013  # for a sampler step of one image; an attack generates at each snapshot


class StagePlan:
    """The stages of a run in order, and an estimate of their time.

    A stage takes as long as those of its part in this run so far, or else as many steps as it has
    times `STEP_SECONDS`.

    Attributes:
        stages: all stages.
        missing: titles of those that the cache lacks; keys change where an attack fails.
        costly: those of them that take time; a baseline is only loaded.
    """

    def __init__(self, cfg: DictConfig, pipeline: Pipeline, metrics: Sequence[str]) -> None:
        self.stages = [
            *pipeline.immunize_stages(),
            *pipeline.attack_stages(),
            *(pipeline.eval_stage(name) for name in metrics),
        ]
        absent = [s for s in self.stages if not pipeline.cache.has(*s.place, s.parents)]
        self.missing = {stage.title for stage in absent}
        self.costly = {stage.title for stage in absent if stage.shards}
        self.measured: dict[str, list[float]] = {}  # part → seconds in this run
        steps = {
            "immunize": cfg.immunize.get("steps") or cfg.immunize.get("epochs") or 1,
            "attack": pipeline.budget.steps,
            "eval": 1,
        }
        default = STEP_SECONDS[pipeline.parts.backbone.kind]
        self.default = {stage: default[stage] * steps[stage] for stage in steps}
        sampling = OmegaConf.select(cfg, "scenario.sampling", default=None)
        if sampling:
            images = sampling.count * len(pipeline.budget.snapshots())
            self.default["attack"] += SAMPLING_SECONDS * images * sampling.steps
        # trials of searches, as a mean over the attacks
        searches = [node.get("search") for node in cfg.attacks.values()]
        trials = sum(
            (s.get("steps") or 0) * (s.get("trials") or prod(map(len, s.space.values())))
            for s in searches
            if s
        )
        self.default["attack"] += default["attack"] * trials / max(len(searches), 1)

    def seconds(self, stage: Stage) -> float:
        """Return the estimated time of a stage; 0 for one that is cached or costs nothing."""
        if stage.title not in self.costly:
            return 0.0
        known = self.measured.get(stage.part)
        return mean(known) if known else self.default[stage.kind]

    def describe(self) -> str:
        """Return how many stages there are, how many are cached, and the time of the others."""
        counts = f"{len(self.stages)} stages, {len(self.stages) - len(self.missing)} cached"
        if not self.costly:
            return counts
        return f"{counts}, about {_minutes(sum(map(self.seconds, self.stages)))} on two CPU cores"

    def lines(self) -> list[str]:
        """Return a line for each stage."""
        lines = []
        for stage in self.stages:
            time = _minutes(self.seconds(stage)) if stage.title in self.missing else "cached"
            lines.append(f"  {time:>8}  {stage.key[:12]}  {stage.title}")
        return lines

    def announce(self, stage: Stage, processes: int) -> None:
        """Log that a missing stage begins, and when the run will end."""
        if stage.title in self.missing:
            number = [other.title for other in self.stages].index(stage.title)
            left = sum(map(self.seconds, self.stages[number:])) / processes
            eta = tqdm.format_interval(left)
            log.info("[%d/%d] %s … ETA %s", number + 1, len(self.stages), stage.title, eta)

    def finish(self, stage: Stage, seconds: float | None) -> None:
        """Note how long a stage took."""
        if stage.title in self.costly and seconds is not None:
            self.measured.setdefault(stage.part, []).append(seconds)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"
