"""The stages of one run: what determines each, how it is computed, and how metrics read them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lab.core import record as records
from lab.core.cache import Artifact, Place, StageCache
from lab.core.data import ConceptCase, ScenarioData
from lab.core.errors import Diverged, UserError
from lab.core.hashing import digest, fingerprint, model_settings, stage_key, without_sampling
from lab.core.provenance import computing
from lab.core.training import part_of
from lab.core.types import (
    BASELINE,
    AnyCase,
    AnyTask,
    Budget,
    Checkpoint,
    FeatureModel,
    ImageGrid,
    Model,
    Score,
    Scores,
    Trajectory,
    changed_tensors,
)
from lab.runner.assemble import Parts

LogHook = Callable[[str, int, dict[str, float]], None]


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        key: hash of everything that determines its result.
        parents: the artifacts that it is computed from.
        shards: parts that processes can compute together; 0 for a stage that costs nothing.
        model, case, seed, attack, task, metric: what it is about; None where that has no meaning.
    """

    kind: Literal["immunize", "attack", "eval"]
    key: str
    compute: Callable[[Checkpoint], Artifact]
    parents: tuple[Place, ...] = ()
    shards: int = 1
    model: str | None = None
    case: str | None = None
    seed: int | None = None
    attack: str | None = None
    task: str | None = None
    metric: str | None = None

    @property
    def place(self) -> Place:
        return self.kind, self.key

    @property
    def labels(self) -> dict[str, Any]:
        """What it is about, as a record has it."""
        names = ("model", "case", "seed", "attack", "task", "metric")
        return {name: getattr(self, name) for name in names}

    @property
    def title(self) -> str:
        """What it does, in words."""
        if self.metric is not None:
            return f"evaluate {self.metric}"
        if self.attack is not None:
            place = f"{self.task} ({self.case})" if self.case != self.task else self.task
            return f"attack {self.attack} on {place}, {self.model}, seed {self.seed}"
        what = "load the baseline of" if self.model == BASELINE else "immunize"
        return f"{what} {self.case}, seed {self.seed}"

    @property
    def part(self) -> str:
        """The config key of the part that computes it."""
        keys = {"attack": f"attacks.{self.attack}", "eval": f"eval.{self.metric}"}
        return keys.get(self.kind, "immunize")


class Pipeline:
    """Stages of a run over its models, cases, seeds, attacks and metrics: a `RunView`.

    Attributes:
        diverged: (case, seed) → why its immunization ended.
        settled_tasks: names of the tasks whose result every metric knows before any attack.
        notes: sentences for the record, in order.
    """

    def __init__(self, parts: Parts, cache: StageCache) -> None:
        self.parts, self.cache = parts, cache
        self.on_log: LogHook | None = None
        self.scenario = parts.scenario.name
        self.model_names = tuple(parts.model_names)
        self.attacks = tuple(parts.attacks)
        self.budget = parts.budget
        self.diverged: dict[tuple[str, int], dict[str, Any]] = {}
        self.settled_tasks = frozenset[str]()
        self.data_hash: dict[str, str] = {}
        self.notes: dict[str, None] = {}
        self._last: tuple[tuple[int, str], Model] | None = None
        self._data: dict[int, ScenarioData] = {}
        self._identity: dict[tuple[int, str], dict[str, str]] = {}

    # ---- data and original models

    def data(self, seed: int) -> ScenarioData:
        """Load the cases of ``seed`` once."""
        if seed not in self._data:
            loaded = self.parts.scenario.load(seed)
            self._data[seed] = loaded
            self.data_hash[str(seed)] = loaded.data_hash
            self.notes.update(dict.fromkeys(loaded.notes))
        return self._data[seed]

    def original(self, case: AnyCase, seed: int) -> Model:
        """Return θ_0, what the backbone builds less what ``erase`` takes out; the caller's own."""
        if self._last is None or self._last[0] != (seed, case.name):
            model = self.parts.backbone.build(case, seed)
            model = self.parts.eraser.obj(model, without_sampling(case), seed=seed)
            self._last = ((seed, case.name), model)
        return self._last[1].copy()

    def identity(self, case: AnyCase, seed: int) -> dict[str, str]:
        """Return hashes of the case's data and of θ_0."""
        if (seed, case.name) not in self._identity:
            model = self.original(case, seed)
            self._identity[seed, case.name] = {
                "data": fingerprint(without_sampling(case)),
                "weights": digest(*model.state_dict().values()),
            } | model_settings(model)
        return self._identity[seed, case.name]

    def weight_hash(self) -> dict[str, str]:
        """Return per seed one hash over θ_0 of every case that was needed."""
        known: dict[str, dict[str, str]] = {}
        for (seed, case), hashes in sorted(self._identity.items()):
            known.setdefault(str(seed), {})[case] = hashes["weights"]
        return {seed: stage_key(weights=weights) for seed, weights in known.items()}

    # ---- stages

    def compute(self, stage: Stage) -> tuple[Artifact, bool]:
        """Return the artifact of ``stage`` and whether the cache had it."""
        return self.cache.get(*stage.place, stage.compute, stage.parents)

    def immunize_stage(self, model_name: str, case: AnyCase, seed: int) -> Stage:
        part = self.parts.model_names[model_name]
        upstream = {"case": self.identity(case, seed), "backbone": self.parts.backbone_identity}
        key = stage_key(part=part.identity, seed=seed, computing=computing(), **upstream)

        def compute(checkpoint: Checkpoint) -> Artifact:
            rows: list[tuple[int, dict[str, float]]] = []

            def log(step: int, **values: float) -> None:
                rows.append((step, {k: float(v) for k, v in values.items()}))
                if self.on_log is not None:
                    self.on_log(f"immunize/{case.name}/seed{seed}", step, rows[-1][1])

            before = model = self.original(case, seed)
            weights = self.identity(case, seed)["weights"]
            if part.obj.before_erasure:
                model = self.parts.backbone.build(case, seed)
                weights = digest(*model.state_dict().values())
            error: dict[str, Any] | None = None
            changed: dict[str, Tensor] = {}
            try:
                visible = without_sampling(case).for_immunizer()
                after = part.obj(model, visible, seed=seed, checkpoint=checkpoint, log=log)
            except Diverged as stopped:
                error = {"message": str(stopped), "last_good_step": stopped.step}
            else:
                if digest(*model.state_dict().values()) != weights:
                    fix = "changed the model that it was given; copy it first (`model.copy()`)."
                    raise UserError("immunize", part.obj.name, fix)
                if part.obj.before_erasure:
                    after = self.parts.eraser.obj(after, without_sampling(case), seed=seed)
                changed = self._changed(model_name, before, after, case)
            names = dict.fromkeys(name for _, values in rows for name in values)
            history: dict[str, list[float]] = {
                "step": [step for step, _ in rows],
                **{name: [values.get(name, math.nan) for _, values in rows] for name in names},
            }
            return Artifact({"history": history, "error": error}, changed)

        return Stage(
            "immunize",
            key,
            compute,
            shards=0 if model_name == BASELINE else int(part.obj.shards(case)),
            model=model_name,
            case=case.name,
            seed=seed,
        )

    def _changed(
        self, model_name: str, before: Model, after: Any, case: AnyCase
    ) -> dict[str, Tensor]:
        """Return the tensors that an immunizer changed.

        Raises:
            UserError: it changed nothing, the names and shapes of parameters, or one that an
                immunizer may not change.
        """
        method = self.parts.model_names[model_name].obj
        check_immunized(after, before.state_dict(), method.name)
        changed = changed_tensors(before, after)
        if not changed and model_name != BASELINE:
            fix = f"left every weight of case {case.name} as it was; nothing would be compared."
            raise UserError("immunize", method.name, fix)
        if refused := [name for name in changed if not method.may_change(name)]:
            fix = f"changed {refused[0]}: an attacker puts back the published autoencoder."
            raise UserError("immunize", method.name, fix)
        return changed

    def attack_stage(
        self, model_name: str, attack: str, case: AnyCase, task: AnyTask, seed: int
    ) -> Stage:
        part = self.parts.attacks[attack]
        source = self.immunize_stage(model_name, case, seed)
        key = stage_key(
            part=part.identity,
            upstream=source.key,
            task=task.name,
            seed=seed,
            budget=dataclasses.asdict(self.budget),
        )

        def compute(checkpoint: Checkpoint) -> Artifact:
            model = self.model(model_name, case, seed)
            try:
                trajectory = part.obj(
                    model, task, seed=seed, budget=self.budget, checkpoint=checkpoint
                )
            except Diverged as error:
                fix = (
                    f"its model cannot be attacked (case {case.name}, {attack} on {task.name}): "
                    f"{error}; lower the step size of what made it, or check attacks.{attack}."
                )
                key = "backbone" if model_name == BASELINE else "immunize"
                raise UserError(key, self.parts.model_names[model_name].obj.name, fix) from error
            side = None if isinstance(model, FeatureModel) else model.image_size
            check_trajectory(trajectory, attack, self.budget, side)
            fields = ("steps", "values", "status", "info")
            tensors = {
                **{f"weights/{name}": t for name, t in trajectory.weights.items()},
                **{f"samples/{name}": t for name, t in trajectory.samples.items()},
            }
            return Artifact({name: getattr(trajectory, name) for name in fields}, tensors)

        return Stage(
            "attack",
            key,
            compute,
            (source.place,),
            model=model_name,
            case=case.name,
            seed=seed,
            attack=attack,
            task=task.name,
        )

    def eval_stage(self, metric: str) -> Stage:
        part = self.parts.metrics[metric]
        upstream = [
            *self.immunize_stages(),
            *(self.attack_stages() if part.obj.needs_attack else ()),
        ]
        cases = [case for seed in self.seeds for case in self.cases(seed)]
        samplings = {
            dataclasses.astuple(case.sampling) for case in cases if isinstance(case, ConceptCase)
        }
        sampling = {"sampling": sorted(samplings)} if samplings else {}

        def compute(_: Checkpoint) -> Artifact:
            scores = part.obj(self)
            check_scores(scores, metric)
            grids = {
                name: {"rows": grid.rows, "columns": grid.columns, "caption": grid.caption}
                for name, grid in scores.images.items()
            }
            values = dataclasses.asdict(dataclasses.replace(scores, images={})) | {"images": grids}
            return Artifact(values, {name: grid.images for name, grid in scores.images.items()})

        key = stage_key(part=part.identity, upstream=[stage.key for stage in upstream], **sampling)
        return Stage("eval", key, compute, tuple(stage.place for stage in upstream), metric=metric)

    def immunize_stages(self) -> Iterator[Stage]:
        for seed in self.parts.seeds:
            for case in self.data(seed).cases:
                for model_name in self.model_names:
                    yield self.immunize_stage(model_name, case, seed)

    def attack_stages(self) -> Iterator[Stage]:
        """Yield the attacks on every case that did not diverge, without ``settled_tasks``."""
        for seed in self.seeds:
            for case in self.cases(seed):
                for task in (task for task in case.tasks if task.name not in self.settled_tasks):
                    for model_name in self.model_names:
                        for attack in self.attacks:
                            yield self.attack_stage(model_name, attack, case, task, seed)

    def find_settled_tasks(self) -> None:
        """Ask the metrics for ``settled_tasks``; an audit generates images for that."""
        metrics = [part.obj for part in self.parts.metrics.values()]
        each = [
            metric.settled_tasks(self)
            for metric in metrics
            if metric.needs_attack and metric.needs_models <= len(self.model_names)
        ]
        self.settled_tasks = frozenset.intersection(*each) if each else frozenset()

    def shards(self, stage: Stage) -> int:
        """Return the shards of ``stage``; 0 for one that the cache has."""
        return 0 if self.cache.has(*stage.place, stage.parents) else stage.shards

    # ---- RunView

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(seed for seed in self.parts.seeds if self.cases(seed))

    def cases(self, seed: int) -> tuple[AnyCase, ...]:
        return tuple(c for c in self.data(seed).cases if (c.name, seed) not in self.diverged)

    def model(self, model_name: str, case: AnyCase, seed: int) -> Model:
        model = self.original(case, seed)
        artifact, _ = self.compute(self.immunize_stage(model_name, case, seed))
        model.load_state_dict({**model.state_dict(), **artifact.tensors})
        return model

    def history(self, case: AnyCase, seed: int) -> dict[str, list[float]]:
        artifact, _ = self.compute(self.immunize_stage(self.model_names[-1], case, seed))
        return artifact.values["history"]

    def trajectory(
        self, model_name: str, attack: str, case: AnyCase, task: AnyTask, seed: int
    ) -> Trajectory:
        artifact, _ = self.compute(self.attack_stage(model_name, attack, case, task, seed))
        weights, samples = (
            part_of(artifact.tensors, f"{kind}/") for kind in ("weights", "samples")
        )
        return Trajectory(weights=weights, samples=samples, **artifact.values)

    def cached(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        joined = stage_key(kept=key, computing=computing())
        artifact, _ = self.cache.get("eval", joined, lambda _: Artifact(tensors=compute()))
        return artifact.tensors

    def scores(self, metric: str) -> Scores:
        """Return what a metric computed."""
        artifact, _ = self.compute(self.eval_stage(metric))
        values = artifact.values
        metrics = {name: Score(**item) for name, item in values["metrics"].items()}
        images = {
            name: ImageGrid(
                artifact.tensors[name], tuple(g["rows"]), tuple(g["columns"]), g["caption"]
            )
            for name, g in values["images"].items()
        }
        return Scores(metrics, values["curves"], values["tables"], images)


# ---- checks of what methods return, before anything is claimed from it


def check_immunized(after: Any, before: Mapping[str, Tensor], name: str) -> None:
    """Check the model that the immunizer ``name`` returned.

    Raises:
        UserError: no model, or one whose parameters are not those of ``before``.
    """
    if not isinstance(after, torch.nn.Module):
        raise UserError("immunize", name, f"must return a model, not {type(after).__name__}.")
    states = after.state_dict(), before
    shapes = [{key: tuple(x.shape) for key, x in state.items()} for state in states]
    if shapes[0] != shapes[1]:
        differ = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
        fix = f"returned a model whose {', '.join(differ[:3])} is not as in its input."
        raise UserError("immunize", name, fix)


def check_trajectory(trajectory: Any, attack: str, budget: Budget, side: int | None = None) -> None:
    """Check that a trajectory was measured at the snapshots of ``budget`` and is finite.

    An attack that was followed for too short a time would otherwise count as one that the model
    resisted.

    Args:
        side: of generated images in pixels, for a text-to-image model.

    Raises:
        UserError: names the attack and what to return instead.
    """

    def require(holds: bool, fix: str) -> None:
        if not holds:
            raise UserError(f"attacks.{attack}", attack, f"{fix} (lab.core.types.Trajectory).")

    require(isinstance(trajectory, Trajectory), "must return a Trajectory")
    steps, snapshots = trajectory.steps, list(budget.snapshots())
    if budget.unit == "images":  # an update of several images passes over snapshots
        needed = {0, budget.horizon, budget.steps, *steps}
        snapshots = [snapshot for snapshot in snapshots if snapshot in needed]
    short = steps == snapshots[: len(steps)] and trajectory.status == "diverged" and bool(steps)
    require(
        steps == snapshots or short,
        f"returned the steps {steps}, not the snapshots of the budget {snapshots}; only a "
        "diverged trajectory may end earlier",
    )
    for name in ("train_loss", "test_loss", *trajectory.values):
        values = trajectory.values.get(name, [])
        require(len(values) == len(steps), f"needs a value of {name} at each of its steps")
        require(
            all(math.isfinite(value) for value in values),
            f"returned a {name} that is not finite; end before it with the status diverged",
        )
    for family, images in trajectory.samples.items():
        size = side or images.shape[-1]
        shape = (len(steps), *images.shape[1:2], 3, size, size)
        fits = images.dtype == torch.uint8 and images.shape == shape
        require(fits, f"must return samples of {family} as torch.uint8 {list(shape)}")


def check_scores(scores: Any, metric: str) -> None:
    """Check that a record can hold what a metric returned.

    Raises:
        ValueError: names the metric; the run goes on without it.
    """
    if not isinstance(scores, Scores):
        raise ValueError(f"eval.{metric} must return Scores, not {type(scores).__name__}")
    reason = records.violation(records.scores_json([scores]))
    for name, curve in scores.curves.items():
        if len({len(line) for key, line in curve.items() if key not in ("x", "y", "log")}) > 1:
            reason = f"curves/{name}: its lines differ in length"
    if reason is not None:
        raise ValueError(f"eval.{metric} returned wrong Scores: {reason} (lab.core.types.Scores)")
