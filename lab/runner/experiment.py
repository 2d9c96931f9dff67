"""One run: immunize, attack, evaluate, record, report."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lab.core import record as records
from lab.core.cache import StageCache
from lab.core.errors import RankFailed, UserError, config_key_of
from lab.core.fingerprint import state_hash
from lab.core.progress import progress
from lab.core.types import BASELINE, Scores
from lab.runner.assemble import assemble, check_cases, check_groups
from lab.runner.dry_run import plan
from lab.runner.losses import FailedStages, affects_all_stages, facts, is_recoverable
from lab.runner.pipeline import Cell, Pipeline
from lab.runner.run_record import record_of
from lab.runner.spread import SerialExecutor
from lab.tracking import Trackers

log = logging.getLogger(__name__)


class Run:
    """The state of one run, from which a record can be made at any moment, after a failure too."""

    def __init__(self, cfg: DictConfig, folder: Path, ranks: SerialExecutor | None = None) -> None:
        check_groups(cfg)
        self.cfg, self.folder, self.ranks = cfg, folder, ranks or SerialExecutor()
        self.computed: set[str] = (
            set()
        )  # keys of stages that this run's other processes may have computed
        self.waiting: list[Cell] = []
        self.started, self.clock = time.time(), time.monotonic()
        self.status = "ok"
        self.error: dict[str, Any] | None = None
        self.cells: list[dict[str, Any]] = []
        self.hits = self.misses = 0
        self.skipped: dict[str, str] = {}
        self.scores: list[Scores] = []
        self.losses = FailedStages()
        self.made: Pipeline | None = None  # by `prepare`

    @property
    def pipeline(self) -> Pipeline:
        if self.made is None:
            raise RuntimeError("prepare() comes first")
        return self.made

    # ---- execution

    def prepare(self, trackers: Trackers | None = None) -> Pipeline:
        cfg = self.cfg
        if cfg.threads is not None:
            if not isinstance(cfg.threads, int) or cfg.threads < 1:
                raise UserError("threads", cfg.threads, "must be a whole number ≥ 1, or null.")
            torch.set_num_threads(cfg.threads)
        torch.set_deterministic_debug_mode(
            "warn"
        )  # `use_deterministic_algorithms` imports the whole compiler, seconds
        parts = assemble(cfg)
        store = StageCache(cfg.paths.cache, force=cfg.force)
        self.made = Pipeline(parts, store, trackers.log if trackers else None)
        for seed in parts.seeds:
            check_cases(parts, self.made.data(seed).cases)
        return self.made

    def execute(self) -> None:
        pipeline = self.pipeline
        self._stages(list(pipeline.immunize_cells()), "immunize")
        diverged = self.ranks.same([[*place, error] for place, error in pipeline.diverged.items()])
        pipeline.diverged = {(case, seed): error for case, seed, error in diverged}
        if not pipeline.seeds:
            # every case diverged: nothing is left to attack or to evaluate, and the record says so
            return
        self._stages(list(pipeline.attack_cells()), "attack")
        self._leave_out()
        names = self.applicable()
        self._spread([pipeline.eval_cell(name) for name in names], "eval")
        for name in names if self.ranks.main else []:
            cell = pipeline.eval_cell(name)
            if self._do(cell):
                self._take(cell, pipeline.scores(name))
        first = self.losses.first
        told = self.ranks.same(None if first is None else facts(first))
        if told is not None:
            raise first or RankFailed(**told)

    def _leave_out(self) -> None:
        """Go on without the attacks that failed."""
        lost = self.ranks.same(self.losses.attacks)
        for name, told in lost.items():
            self.pipeline.notes[f"attack {name} failed and is left out: {told}"] = None
        self.pipeline.attacks = tuple(name for name in self.pipeline.attacks if name not in lost)

    def _stages(self, cells: list[Cell], label: str) -> None:
        self._spread(cells, label)
        for cell in progress(cells, label) if self.ranks.main else []:
            self._do(cell)

    def _spread(self, cells: list[Cell], label: str) -> None:
        """Let all processes compute what is missing, so that the main one finds it in the cache."""
        self.waiting = cells
        self.computed |= self.ranks.compute(self.pipeline.store, cells, self._parts, label)
        self.waiting = []

    def _parts(self, cell: Cell) -> int:
        """Into how many parts a stage can be split; the baseline model's immunization costs
        nothing.
        """
        if cell.stage != "immunize":
            return 1
        if cell.label["model"] == BASELINE:
            return 0
        hook = getattr(self.pipeline.parts.model_names[cell.label["model"]].obj, "shards", None)
        cases = self.pipeline.data(cell.label["seed"]).cases
        return (
            1
            if hook is None
            else int(hook(next(case for case in cases if case.name == cell.label["case"])))
        )

    def applicable(self) -> list[str]:
        """Metric families that this run can compute; the others are noted in ``skipped``."""
        chosen = []
        for name, part in self.pipeline.parts.metrics.items():
            if part.obj.needs_models > len(self.pipeline.model_names):
                self.skipped[name] = (
                    "compares with the baseline model, and immunize=none is the baseline model"
                )
            elif part.obj.needs_attack and not self.pipeline.attacks:
                asked = self.losses.attacks
                self.skipped[name] = (
                    f"needs an attack, and {'none is left' if asked else 'attacks=none'}"
                )
            else:
                chosen.append(name)
        return chosen

    def _do(self, cell: Cell) -> bool:
        """Compute or read a stage; whether it is there."""
        labels = _labels(cell)
        entry = {"stage": cell.stage, "key": cell.key, "status": "failed", **labels}
        self.cells.append(entry)
        if self.losses.has(cell):
            entry["status"] = "pending"
            return False
        if cell.key in self.ranks.failed:
            self.losses.add(cell, RankFailed(**self.ranks.failed[cell.key]))
            return False
        log.info("stage %s", cell.title)
        try:
            artifact, hit = self.pipeline.store.get(*cell.place, cell.compute, cell.parents)
        except KeyboardInterrupt:
            entry["status"] = "pending"
            raise
        except Exception as error:
            if not is_recoverable(cell, error):
                raise
            self.losses.add(cell, error)
            return False
        hit = hit and cell.key not in self.computed
        log.info("%s %s %s", "read" if hit else "computed", cell.stage, cell.key)
        self.hits, self.misses = self.hits + hit, self.misses + (not hit)
        entry |= {"status": "ok", "seconds": artifact.seconds}
        if cell.stage == "immunize" and artifact.values["error"] is not None:
            entry["status"] = "diverged"
            self._diverged(labels, artifact.values["error"])
        elif cell.stage == "immunize":
            entry["weights"] = state_hash(artifact.tensors)
            self._cut_short(labels, artifact.values["history"])
        elif cell.stage == "attack" and artifact.values["status"] == "diverged":
            entry["status"] = "diverged"
        return True

    def _take(self, cell: Cell, scores: Scores) -> None:
        """Keep the figures of a metric family; one that would write over another's is lost."""
        for part in ("metrics", "curves", "tables", "images"):
            taken = {name for other in self.scores for name in getattr(other, part)} & {
                *getattr(scores, part)
            }
            if taken:
                told = (
                    f"{cell.label['attack']} writes {part}.{min(taken)}, which another "
                    "family does, too"
                )
                self.losses.add(cell, ValueError(f"eval.{told}; give it another name"))
                self.cells[-1]["status"] = "failed"
                return
        self.scores.append(scores)

    def _diverged(self, labels: dict[str, Any], error: dict[str, Any]) -> None:
        self.pipeline.diverged[labels["case"], labels["seed"]] = error
        self.status = "diverged"
        where = f"{labels['model']} on case {labels['case']}, seed {labels['seed']}"
        log.warning(
            "%s diverged after step %s: %s", where, error["last_good_step"], error["message"]
        )
        if self.error is None:
            self.error = {
                "type": "Diverged",
                "message": f"{where}: {error['message']}",
                "key": "immunize",
                "last_good_step": error["last_good_step"],
            }

    def _cut_short(self, labels: dict[str, Any], history: dict[str, list[float]]) -> None:
        """Tell of an immunizer that went back to its last good weights: it logs ``diverged`` =
        1.
        """
        ends = [
            step
            for step, ended in zip(history["step"], history.get("diverged", []), strict=False)
            if ended == 1
        ]
        if ends:
            where = f"{labels['model']} on case {labels['case']}, seed {labels['seed']}"
            told = (
                f"{where} left the finite numbers at step {ends[0]:g}; its last good "
                "weights were attacked."
            )
            log.warning(told)
            self.pipeline.notes[told] = None

    # ---- end

    def fail(self, error: BaseException) -> None:
        """Remember why the run ended; called once, from the outermost handler."""
        self.status = "preempted" if isinstance(error, KeyboardInterrupt) else "failed"
        message = (
            "interrupted; the same command continues where it stopped"
            if self.status == "preempted"
            else str(error)
        )
        if isinstance(error, RankFailed) and error is self.losses.first:
            message = error.message  # as from one process
        key = None if affects_all_stages(error) else config_key_of(error)
        if isinstance(error, UserError | RankFailed):
            key = error.key
        step = getattr(error, "step", None)
        if self.status == "preempted" and self.cells and self.cells[-1]["status"] == "pending":
            step = self.pipeline.store.checkpointed(self.cells[-1]["stage"], self.cells[-1]["key"])
        kind = error.type if isinstance(error, RankFailed) else type(error).__name__
        self.error = {"type": kind, "message": message, "key": key, "last_good_step": step}
        failed = (
            error.cell if isinstance(error, RankFailed) else getattr(self.ranks.now, "key", None)
        )
        for cell in self.waiting:  # the processes were at these
            status = "ok" if self.pipeline.store.has(*cell.place, cell.parents) else "pending"
            if cell.key == failed:
                status = "pending" if self.status == "preempted" else "failed"
            self.cells.append(
                {"stage": cell.stage, "key": cell.key, "status": status, **_labels(cell)}
            )

    def finish(self, trackers: Trackers | None) -> Path:
        """Write the record, render the report, hand both to the trackers, print the summary."""
        from eval.report.html import render  # here: plots and tests take seconds to import
        from eval.report.summary import summary

        body = record_of(self)
        body["images"] = records.write_images(self.folder, records.images_of(self.scores))
        path = self.folder / "record.json"
        records.write(body, path)
        report = render([records.read(path)], self.folder / "report.html")
        if trackers is not None:
            trackers.finish(path, report)
        print(summary(body))
        print(f"report: {relative(report)}")
        print(f"record: {relative(path)}", flush=True)
        return path


def _labels(cell: Cell) -> dict[str, Any]:
    return {"model": None, "case": None, "seed": None, "attack": None, "task": None} | cell.label


def relative(path: Path) -> Path:
    """``path`` as seen from the working directory where that is possible."""
    here = Path.cwd()
    path = path.resolve()
    return path.relative_to(here) if path.is_relative_to(here) else path


def run_once(cfg: DictConfig, folder: Path, ranks: SerialExecutor | None = None) -> Path | None:
    """Run what ``cfg`` selects, into ``folder``. Returns the record's path (None for ``dry_run``).

    Where ``ranks`` are several processes, all of them call this; the main one alone records and
    speaks.

    A failure is a record too: it is written, then the exception goes on to the caller.
    """
    run = Run(cfg, folder, ranks)
    if cfg.dry_run:
        plan(run)
        return None
    if not run.ranks.main:
        run.prepare()
        run.execute()
        return None
    folder.mkdir(parents=True, exist_ok=True)
    trackers = None
    try:
        # of an earlier run in this folder: should this one be killed, nothing may be read as its
        # result
        for name in ("record.json", "report.html"):
            (folder / name).unlink(missing_ok=True)
        trackers = Trackers(cfg, folder)
        run.prepare(trackers)
        run.execute()
    except (Exception, KeyboardInterrupt) as error:
        run.fail(run.ranks.cause(error))
        try:
            run.finish(trackers)
        except OSError as unwritable:
            print(f"no record could be written to {folder}: {unwritable}", file=sys.stderr)
        raise
    return run.finish(trackers)
