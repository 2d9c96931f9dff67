"""The stages of one run: what determines each, how it is computed, and read access for the
metrics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.core.cache import Artifact, Place, StageCache, StageCheckpoint, stage_key
from lab.core.data import ConceptCase, ScenarioData
from lab.core.errors import Diverged, UserError, with_config_key
from lab.core.fingerprint import beside_weights, fingerprint, unpainted
from lab.core.provenance import computing
from lab.core.types import (
    BASELINE,
    AnyCase,
    AnyTask,
    ImageGrid,
    Model,
    Score,
    Scores,
    SeedScore,
    Trajectory,
    clone,
)
from lab.models.activations import digest
from lab.runner.assemble import Parts
from lab.runner.returned import check_immunized, check_scores, check_trajectory

LogHook = Callable[[str, int, dict[str, float]], None]


@dataclass(frozen=True)
class Cell:
    """One stage of a run."""

    stage: str
    key: str
    label: dict[str, Any]
    compute: Callable[[StageCheckpoint], Artifact]
    parents: tuple[Place, ...] = ()  # the artefacts that it is computed from

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute", with_config_key(self.part)(self.compute))

    @property
    def place(self) -> Place:
        return self.stage, self.key

    @property
    def title(self) -> str:
        return " ".join([self.stage, *(str(v) for v in self.label.values() if v is not None)])

    @property
    def part(self) -> str:
        """The config key of what computes it."""
        if self.stage == "immunize":
            return "immunize"
        return f"{'attacks' if self.stage == 'attack' else self.stage}.{self.label['attack']}"


class Pipeline:
    """Stages of one run over its models, cases, seeds, attacks and metrics. Implements
    `lab.core.types.RunView`.
    """

    def __init__(self, parts: Parts, store: StageCache, on_log: LogHook | None = None) -> None:
        self.parts, self.store, self.on_log = parts, store, on_log
        self.scenario = parts.scenario.name
        self.immunizer = parts.immunizer.obj.name
        self.model_names = tuple(parts.model_names)
        self.attacks = tuple(parts.attacks)
        self.budget = parts.budget
        self.diverged: dict[tuple[str, int], dict[str, Any]] = {}
        self._last: tuple[tuple[int, str], Model] | None = None
        self._data: dict[int, ScenarioData] = {}
        self._identity: dict[tuple[int, str], dict[str, str]] = {}
        self.data_hash: dict[str, str] = {}
        self.notes: dict[str, None] = {}

    # ---- data and original models

    def data(self, seed: int) -> ScenarioData:
        if seed not in self._data:
            with with_config_key("scenario"):
                loaded = self.parts.scenario.load(seed)
            if not loaded.cases:
                raise UserError("scenario", self.scenario, "has no cases.")
            self._data[seed] = loaded
            self.data_hash[str(seed)] = loaded.data_hash
            self.notes.update(dict.fromkeys(loaded.notes))
        return self._data[seed]

    def original(self, case: AnyCase, seed: int) -> Model:
        """θ_0: what the backbone builds, less what ``erase`` takes out. The caller's own; the last
        one is kept.
        """
        if self._last is None or self._last[0] != (seed, case.name):
            with with_config_key("backbone"):
                built = self.parts.backbone.build(case, seed)
            with with_config_key("erase"):
                built = self.parts.eraser.obj(built, unpainted(case), seed=seed)
            self._last = ((seed, case.name), built)
        return clone(self._last[1])

    def identity(self, case: AnyCase, seed: int) -> dict[str, str]:
        """Hashes of the case's data and of θ_0."""
        if (seed, case.name) not in self._identity:
            model = self.original(case, seed)
            found = {
                "data": fingerprint(unpainted(case)),
                "weights": digest(*model.state_dict().values()),
            }
            self._identity[seed, case.name] = found | beside_weights(model)
        return self._identity[seed, case.name]

    def weight_hash(self) -> dict[str, str]:
        """Per seed, one hash over θ_0 of every case that was needed."""
        known: dict[str, dict[str, str]] = {}
        for (seed, case), hashes in sorted(self._identity.items()):
            known.setdefault(str(seed), {})[case] = hashes["weights"]
        return {seed: stage_key(weights=weights) for seed, weights in known.items()}

    # ---- stages

    def immunize_cell(self, model_name: str, case: AnyCase, seed: int) -> Cell:
        part = self.parts.model_names[model_name]
        upstream = {"case": self.identity(case, seed), "backbone": self.parts.backbone_identity}
        key = stage_key(part=part.identity, seed=seed, computing=computing(), **upstream)

        def compute(checkpoint: StageCheckpoint) -> Artifact:
            rows: list[tuple[int, dict[str, float]]] = []

            def log(step: int, **values: float) -> None:
                rows.append((step, {k: float(v) for k, v in values.items()}))
                if self.on_log is not None:
                    self.on_log(f"immunize/{case.name}/seed{seed}", step, rows[-1][1])

            before = self.original(case, seed)
            error: dict[str, Any] | None = None
            tensors = {}
            try:
                after = part.obj(before, unpainted(case), seed=seed, checkpoint=checkpoint, log=log)
            except Diverged as stopped:
                error = {"message": str(stopped), "last_good_step": stopped.step}
            else:
                old = before.state_dict()
                if digest(*old.values()) != self.identity(case, seed)["weights"]:
                    told = (
                        "changed the model that it was given; let it copy that first "
                        "(lab.core.types.clone)."
                    )
                    raise UserError("immunize", model_name, told)
                tensors = {
                    k: v
                    for k, v in check_immunized(after, old, model_name).items()
                    if not v.equal(old[k])
                }
                if not tensors and model_name != BASELINE:
                    told = (
                        f"{model_name} left every weight of case {case.name} as it was; "
                        "nothing would be compared."
                    )
                    raise UserError("immunize", model_name, told)
            names = dict.fromkeys(name for _, values in rows for name in values)
            history: dict[str, list[float]] = {"step": [step for step, _ in rows]}
            history |= {name: [values.get(name, math.nan) for _, values in rows] for name in names}
            return Artifact({"history": history, "error": error}, tensors)

        return Cell(
            "immunize", key, {"model": model_name, "case": case.name, "seed": seed}, compute
        )

    def attack_cell(
        self, model_name: str, attack: str, case: AnyCase, task: AnyTask, seed: int
    ) -> Cell:
        part = self.parts.attacks[attack]
        source = self.immunize_cell(model_name, case, seed)
        key = stage_key(
            part=part.identity,
            upstream=source.key,
            task=task.name,
            seed=seed,
            budget=dataclasses.asdict(self.budget),
        )

        def compute(checkpoint: StageCheckpoint) -> Artifact:
            model = self.model(model_name, case, seed)
            try:
                found = part.obj(model, task, seed=seed, budget=self.budget, checkpoint=checkpoint)
            except Diverged as error:
                where = f"case {case.name}, {attack} on {task.name}"
                told = (
                    f"its model cannot be attacked ({where}): {error}; lower the step "
                    "size of what made it"
                )
                finite = all(
                    bool(torch.isfinite(value).all()) for value in model.state_dict().values()
                )
                told += (
                    f", or look at attacks.{attack}: the weights themselves are finite."
                    if finite
                    else "."
                )
                raise UserError(
                    "backbone" if model_name == BASELINE else "immunize", model_name, told
                ) from error
            check_trajectory(found, attack, self.budget, getattr(model, "image_size", None))
            values = {
                "steps": found.steps,
                "values": found.values,
                "status": found.status,
                "info": found.info,
            }
            samples = {f"samples/{family}": pictures for family, pictures in found.samples.items()}
            return Artifact(
                values, {**{f"weights/{name}": t for name, t in found.weights.items()}, **samples}
            )

        label = {
            "model": model_name,
            "case": case.name,
            "seed": seed,
            "attack": attack,
            "task": task.name,
        }
        return Cell("attack", key, label, compute, (source.place,))

    def eval_cell(self, metric: str) -> Cell:
        part = self.parts.metrics[metric]
        upstream = [*self.immunize_cells(), *(self.attack_cells() if part.obj.needs_attack else ())]
        cases = [case for seed in self.seeds for case in self.cases(seed)]
        drawn = {
            dataclasses.astuple(case.sampling) for case in cases if isinstance(case, ConceptCase)
        }
        beside = {"sampling": sorted(drawn)} if drawn else {}

        def compute(_: StageCheckpoint) -> Artifact:
            scores = part.obj(self)
            check_scores(scores, metric)
            grids = {
                name: {"rows": grid.rows, "columns": grid.columns, "caption": grid.caption}
                for name, grid in scores.images.items()
            }
            values = dataclasses.asdict(dataclasses.replace(scores, images={})) | {"images": grids}
            return Artifact(values, {name: grid.images for name, grid in scores.images.items()})

        key = stage_key(part=part.identity, upstream=[cell.key for cell in upstream], **beside)
        return Cell(
            "eval", key, {"attack": metric}, compute, tuple(cell.place for cell in upstream)
        )

    def immunize_cells(self) -> Iterator[Cell]:
        for seed in self.parts.seeds:
            for case in self.data(seed).cases:
                for model_name in self.model_names:
                    yield self.immunize_cell(model_name, case, seed)

    def attack_cells(self) -> Iterator[Cell]:
        """Attacks on every case that did not diverge."""
        for seed in self.seeds:
            for case in self.cases(seed):
                for task in case.tasks:
                    for model_name in self.model_names:
                        for attack in self.attacks:
                            yield self.attack_cell(model_name, attack, case, task, seed)

    # ---- RunView

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds with at least one case that did not diverge."""
        return tuple(seed for seed in self.parts.seeds if self.cases(seed))

    def cases(self, seed: int) -> tuple[AnyCase, ...]:
        return tuple(c for c in self.data(seed).cases if (c.name, seed) not in self.diverged)

    def _read(self, cell: Cell) -> Artifact:
        artifact, _ = self.store.get(*cell.place, cell.compute, cell.parents)
        return artifact

    def model(self, model_name: str, case: AnyCase, seed: int) -> Model:
        model = self.original(case, seed)
        tensors = self._read(self.immunize_cell(model_name, case, seed)).tensors
        model.load_state_dict({**model.state_dict(), **tensors})
        return model

    def history(self, case: AnyCase, seed: int) -> dict[str, list[float]]:
        return self._read(self.immunize_cell(self.immunizer, case, seed)).values["history"]

    def trajectory(
        self, model_name: str, attack: str, case: AnyCase, task: AnyTask, seed: int
    ) -> Trajectory:
        found = self._read(self.attack_cell(model_name, attack, case, task, seed))
        parts: dict[str, Any] = {"weights": {}, "samples": {}}
        for name, tensor in found.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        return Trajectory(**parts, **found.values)

    def cached(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        joined = stage_key(kept=key, computing=computing())
        artifact, _ = self.store.get("eval", joined, lambda _: Artifact(tensors=compute()))
        return artifact.tensors

    def scores(self, metric: str) -> Scores:
        artifact = self._read(self.eval_cell(metric))
        found = artifact.values
        return Scores(
            {
                name: (SeedScore if "per_seed" in item else Score)(**item)
                for name, item in found["metrics"].items()
            },
            found["curves"],
            found["tables"],
            {
                name: ImageGrid(
                    artifact.tensors[name], tuple(g["rows"]), tuple(g["columns"]), g["caption"]
                )
                for name, g in found["images"].items()
            },
        )
