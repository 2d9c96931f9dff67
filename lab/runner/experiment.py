"""One run: immunize, attack, evaluate, record, report (docs/how_a_run_works.md)."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch.distributed import DistError

from lab.core import record as records
from lab.core.cache import Artifact, StageCache
from lab.core.distributed import PeerLost
from lab.core.errors import Diverged, RunFailed, UserError, explain
from lab.core.hashing import state_hash
from lab.core.provenance import provenance
from lab.core.types import Scores
from lab.models.devices import limit_threads
from lab.runner.assemble import assemble, check_cases, open_attacks
from lab.runner.batch import relative
from lab.runner.executors import Executor
from lab.runner.pipeline import Pipeline, Stage
from lab.runner.plan import StagePlan
from lab.tracking.trackers import Trackers

log = logging.getLogger(__name__)
progress_log = logging.getLogger("progress")
VERDICT_METRICS = ("verdict", "verdict_share")


def is_recoverable(stage: Stage, error: Exception) -> bool:
    """Return True if the run can continue without this stage.

    Every later stage needs the immunized model, and a `UserError` is for the user to fix first.
    """
    return not (
        stage.kind == "immunize" or isinstance(error, UserError) or affects_all_stages(error)
    )


def affects_all_stages(error: BaseException) -> bool:
    """Return True if the next stage would fail in the same way: a full disk, a lost device."""
    return isinstance(error, OSError | DistError | PeerLost) or "CUDA error" in str(error)


def describe(
    error: BaseException,
    stage: Stage | None = None,
    rank: int | None = None,
) -> RunFailed:
    """Return ``error`` as plain values; a `RunFailed` is returned as it is.

    Args:
        stage: the stage that ran.
        rank: of this process, in a run of several.
    """
    if isinstance(error, RunFailed):
        return error
    key = None if stage is None or affects_all_stages(error) else stage.part
    return RunFailed(
        type=type(error).__name__,
        message=str(error),
        user_message=explain(error),
        key=error.key if isinstance(error, UserError) else key,
        step=error.step if isinstance(error, Diverged) else None,
        stage=stage.key if stage else None,
        rank=rank,
        traceback="".join(traceback.format_exception(error)),
    )


def clear_verdicts(results: dict[str, Any], failed: Collection[str]) -> None:
    """Remove the verdicts if an attack failed: it may be the one that breaks the model.

    Args:
        results: ``metrics``, ``curves`` and ``tables`` of a record.
        failed: names of the attacks that did.
    """
    if not failed:
        return
    note = f"{', '.join(failed)} failed: a verdict needs every attack that was asked for"
    for name in VERDICT_METRICS:
        if name in results["metrics"]:
            results["metrics"][name] |= {"value": None, "low": None, "high": None, "note": note}
    tables = results["tables"]
    for name in ("verdict", "audit_verdict"):
        tables.pop(name, None)
    if "seed_values" in tables:
        tables["seed_values"] = [
            row for row in tables["seed_values"] if row["metric"] not in VERDICT_METRICS
        ]


@dataclass(frozen=True)
class StageResult:
    """What all processes learn about a stage that one of them computed or read.

    Attributes:
        hit: the cache had it.
        values: what an immunization logged, and its error if it diverged.
        weights: hash of what an immunization changed.
    """

    status: Literal["ok", "diverged", "failed", "pending"]
    hit: bool = False
    seconds: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    failure: RunFailed | None = None


class Run:
    """The state of a run, from which a record can be made at any moment, after a failure too."""

    def __init__(self, cfg: DictConfig, folder: Path, executor: Executor | None = None) -> None:
        self.cfg, self.folder = cfg, folder
        self.executor = executor or Executor()
        self.started, self.clock = time.time(), time.monotonic()
        self.status = "ok"
        self.error: dict[str, Any] | None = None
        self.stages: list[dict[str, Any]] = []
        self.hits = 0
        self.skipped: dict[str, str] = {}
        self.scores: list[Scores] = []
        self.failure: RunFailed | None = None  # what the run ends with, after everything else
        # kind of stage → name of an attack or a metric → reason
        self.failed: dict[str, dict[str, str]] = {"attack": {}, "eval": {}}
        self.waiting: list[Stage] = []  # the stages in progress, here or in other processes
        self.current: Stage | None = None  # what this process computes
        self.failed_parts: set[str] = set()  # config keys of what failed in this process
        self.pipeline = build_pipeline(cfg)
        self.plan = StagePlan(cfg, self.pipeline, self.applicable_metrics())

    def execute(self) -> None:
        """Compute all stages that the cache lacks.

        Raises:
            RunFailed: at the end, on the main process, if an attack or a metric failed.
        """
        pipeline = self.pipeline
        if self.executor.is_main:
            progress_log.info(self.plan.describe())
        self._compute_stages(list(pipeline.immunize_stages()))
        if pipeline.seeds:  # else every case diverged, which the record says
            pipeline.find_settled_tasks()
            if pipeline.settled_tasks:  # their attacks are planned no more
                self.plan = StagePlan(self.cfg, pipeline, self.applicable_metrics())
            self._compute_stages(list(pipeline.attack_stages()))
            self._leave_out_failed_attacks()
            stages = [pipeline.eval_stage(name) for name in self.applicable_metrics()]
            self._compute_stages(stages)
            for stage in stages:
                if stage.metric not in self.failed["eval"] and self.executor.is_main:
                    self._collect_scores(stage)
        if self.failure is not None and self.executor.is_main:
            raise self.failure

    def applicable_metrics(self) -> list[str]:
        """Return the metrics that this run can compute; the others are noted in ``skipped``."""
        names = []
        for name, part in self.pipeline.parts.metrics.items():
            if part.obj.needs_models > len(self.pipeline.model_names):
                self.skipped[name] = (
                    "compares with the baseline model, and immunize=none is the baseline model"
                )
            elif part.obj.needs_attack and not self.pipeline.attacks:
                reason = "none is left" if self.failed["attack"] else "attacks=none"
                self.skipped[name] = f"needs an attack, and {reason}"
            else:
                names.append(name)
        return names

    def _compute_stages(self, stages: list[Stage]) -> None:
        """Let the executor compute ``stages``, and note the results."""
        self.waiting = list(stages)
        for result in self.executor.map(self.run_stage, stages, self.pipeline.shards):
            self._note(self.waiting.pop(0), result)

    def run_stage(self, stage: Stage) -> StageResult:
        """Compute or read one stage in this process."""
        if stage.part in self.failed_parts:  # in another stage of the same attack
            return StageResult("pending")
        if self.executor.is_main:
            self.plan.announce(stage, self.executor.facts().get("processes", 1))
        self.current = stage
        try:
            artifact, hit = self.pipeline.compute(stage)
        except Exception as error:
            if not is_recoverable(stage, error):
                raise
            failure = describe(error, stage, self.executor.rank)
            log.warning("%s failed, the others go on: %s", stage.title, failure)
            log.info("%s", failure.traceback)
            self.failed_parts.add(stage.part)
            result = StageResult("failed", failure=failure)
        else:
            result = _result(stage, artifact, hit)
            log.info("%s %s %s", "read" if hit else "computed", stage.kind, stage.key)
        self.current = None
        self.plan.finish(stage, result.seconds)
        return result

    def _note(self, stage: Stage, result: StageResult) -> None:
        """Note what became of a stage, the same on every process."""
        status = "pending" if stage.attack in self.failed["attack"] else result.status
        entry: dict[str, Any] = {
            "kind": stage.kind,
            "key": stage.key,
            "status": status,
            **stage.labels,
        }
        self.stages.append(entry)
        if status == "failed" and result.failure is not None:
            self._add_failure(stage, result.failure)
        if status not in ("ok", "diverged"):
            return
        self.hits += result.hit
        if not result.hit:
            self.pipeline.cache.trust([stage.key])
        entry["seconds"] = result.seconds
        if result.weights is not None:
            entry["weights"] = result.weights
        where = f"{stage.model} on case {stage.case}, seed {stage.seed}"
        history, error = result.values.get("history", {}), result.values.get("error")
        if error is not None:
            step, message = error["last_good_step"], error["message"]
            log.warning("%s diverged after step %s: %s", where, step, message)
            self.pipeline.diverged[str(stage.case), int(stage.seed or 0)] = error
            self.status = "diverged"
            self.error = self.error or _error("Diverged", f"{where}: {message}", "immunize", step)
        elif 1 in history.get("diverged", []):
            last = history["step"][history["diverged"].index(1)]
            note = (
                f"{where} left the finite numbers at step {last:g}; its last good weights were "
                "attacked."
            )
            log.warning(note)
            self.pipeline.notes[note] = None

    def _add_failure(self, stage: Stage, failure: RunFailed) -> None:
        """Note that ``stage`` failed; of an attack or a metric the first failure counts."""
        reason = f"{failure.type}: {failure.message}"
        self.failed[stage.kind].setdefault(str(stage.metric or stage.attack), reason)
        self.failure = self.failure or failure

    def _leave_out_failed_attacks(self) -> None:
        for name, reason in self.failed["attack"].items():
            self.pipeline.notes[f"attack {name} failed and is left out: {reason}"] = None
        self.pipeline.attacks = tuple(
            name for name in self.pipeline.attacks if name not in self.failed["attack"]
        )

    def _collect_scores(self, stage: Stage) -> None:
        """Keep the scores of a metric; one that would write over another's has failed."""
        scores = self.pipeline.scores(str(stage.metric))
        try:
            records.scores_json([*self.scores, scores])
            records.merged([*self.scores, scores], "images")
        except ValueError as error:
            self._add_failure(stage, describe(error, stage))
            next(s for s in self.stages if s["key"] == stage.key)["status"] = "failed"
        else:
            self.scores.append(scores)

    # ---- end

    def fail(self, error: BaseException) -> RunFailed:
        """Note why the run ended, and what is known of the stages in progress."""
        failure = describe(error, self.current, self.executor.rank)
        preempted = isinstance(error, KeyboardInterrupt)
        for stage in self.waiting:
            status: Literal["ok", "failed", "pending"] = "pending"
            if self.pipeline.cache.has(*stage.place, stage.parents):
                status = "ok"
            elif stage.key == failure.stage and not preempted:
                status = "failed"
            self._note(stage, StageResult(status))
        self.status, step, message = "failed", failure.step, failure.message
        if preempted:
            self.status = "preempted"
            message = "interrupted; the same command continues where it stopped"
            if self.current:
                step = self.pipeline.cache.checkpointed(*self.current.place)
        self.error = _error(failure.type, message, failure.key, step)
        return failure

    def finish(self, trackers: Trackers | None) -> Path:
        """Write the record and the report, hand both to the trackers, print the summary."""
        from eval.report.html import render  # plots and tests take seconds to import
        from lab.runner.terminal import summarize, summarize_shortly

        body = self.record()
        body["images"] = records.write_images(self.folder, records.merged(self.scores, "images"))
        path = self.folder / "record.json"
        records.write(body, path)
        report = render([records.read(path)], self.folder / "report.html")
        tracked = trackers.finish(path, report) if trackers is not None else []
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            print(summarize_shortly(body))
        else:
            print(summarize(body, bool(self.cfg.get("verbose"))))
            print(*tracked, f"report: {relative(report)}", sep="\n")
        print(f"record: {relative(path)}", flush=True)
        return path

    def record(self) -> records.Record:
        """Return the record of what is known now."""
        cfg, pipeline = self.cfg, self.pipeline
        seeds = list(pipeline.parts.seeds)
        done = sum(stage["status"] in ("ok", "diverged") for stage in self.stages)
        facts = {
            **provenance(self.started, time.monotonic() - self.clock),
            **self.executor.facts(),
            "cache_hits": self.hits,
            "cache_misses": done - self.hits,
            "data_hash": pipeline.data_hash,
            "weight_hash": pipeline.weight_hash(),
        }
        results = records.scores_json(self.scores)
        if rows := records.seed_values(self.scores, seeds):
            results["tables"]["seed_values"] = rows
        clear_verdicts(results, self.failed["attack"])
        return {
            "schema": records.SCHEMA_VERSION,
            "name": f"{cfg.name}/{cfg.immunize.name}",
            "status": self.status,
            "scenario": str(cfg.scenario.name),
            "backbone": str(cfg.backbone.name),
            "immunizer": str(cfg.immunize.name),
            "attacks": list(cfg.attacks),
            "seeds": seeds,
            "config": records.clean(OmegaConf.to_container(cfg, resolve=True)),
            "notes": [*filter(None, [cfg.remark]), *pipeline.notes],
            "stages": self.stages,
            "error": self.error,
            "skipped": self.skipped | self.failed["eval"],
            "provenance": facts,
            **results,
        }


def _result(stage: Stage, artifact: Artifact, hit: bool) -> StageResult:
    """Return what all processes learn of an artifact."""
    values = artifact.values
    if stage.kind != "immunize":
        return StageResult(values.get("status", "ok"), hit, artifact.seconds)
    if values["error"] is not None:
        return StageResult("diverged", hit, artifact.seconds, values)
    return StageResult("ok", hit, artifact.seconds, values, state_hash(artifact.tensors))


def _error(type: str, message: str, key: str | None, step: int | None) -> dict[str, Any]:
    return {"type": type, "message": message, "key": key, "last_good_step": step}


def build_pipeline(cfg: DictConfig) -> Pipeline:
    """Build all parts and load the data; nothing is computed yet.

    Raises:
        UserError: a key that cannot work, parts that do not fit together, data that are missing.
    """
    limit_threads(cfg.threads)
    # `use_deterministic_algorithms` imports the whole compiler, which takes seconds
    torch.set_deterministic_debug_mode("warn")
    parts = assemble(cfg)
    pipeline = Pipeline(parts, StageCache(cfg.paths.cache, force=cfg.force))
    for seed in parts.seeds:
        check_cases(parts, pipeline.data(seed).cases)
    open_attacks(parts, pipeline.data(parts.seeds[0]).cases[0])
    return pipeline


def run_once(cfg: DictConfig, folder: Path, executor: Executor | None = None) -> Path | None:
    """Run what ``cfg`` selects into ``folder``; return the path of the record.

    Several processes all call this; the main one alone records and prints, and the others return
    None, as ``dry_run`` does. After a failure the record is written, then it is raised. Input that
    is refused before any stage begins leaves no record.

    Raises:
        UserError, KeyboardInterrupt: as they come.
        RunFailed: any other exception.
    """
    run = Run(cfg, folder, executor)
    if cfg.dry_run:
        print(f"plan of {cfg.name}/{cfg.immunize.name}")
        print(*run.plan.lines(), run.plan.describe(), sep="\n")
        return None
    is_main = run.executor.is_main
    trackers = start_trackers(run) if is_main else None
    try:
        run.execute()
    except (Exception, KeyboardInterrupt) as error:
        cause = run.executor.cause(error)
        failure = run.fail(cause)
        if is_main:
            write_failed_record(run, trackers)
        if isinstance(cause, UserError | KeyboardInterrupt):
            raise cause from None
        raise failure from (error if error is not failure else None)
    return run.finish(trackers) if is_main else None


def start_trackers(run: Run) -> Trackers:
    """Print the folder, remove what an earlier run left there, and start the trackers."""
    progress_log.info("run folder: %s", relative(run.folder))
    run.folder.mkdir(parents=True, exist_ok=True)
    trackers = Trackers(run.cfg, run.folder)
    for name in ("record.json", "report.html"):
        (run.folder / name).unlink(missing_ok=True)
    run.pipeline.on_log = trackers.log
    return trackers


def write_failed_record(run: Run, trackers: Trackers | None = None) -> None:
    """Write the record of a run that failed, where the disk allows it."""
    try:
        run.finish(trackers)
    except OSError as error:
        print(f"no record could be written to {run.folder}: {error}", file=sys.stderr)
