"""`action=search`: settings of an immunizer that trade protection, utility and benign learning,
found by Optuna.

The plug-in hydra-optuna-sweeper (1.3.0) is not used: it holds Optuna below version 3, whose storage
fails with a current SQLAlchemy, so that an interrupted search could not go on. No storage is needed
here: the sampler is seeded and stages are cached, so the same command proposes the same trials,
reads the finished ones from the cache and goes on.
"""

from __future__ import annotations

import copy
import json
import logging
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eval.report import pareto
from eval.report.labels import typed
from eval.report.pareto import Trial
from lab.cli.callbacks import sweep_codes
from lab.cli.search_space import KEY, Plan
from lab.core import record as records
from lab.core.errors import UserError
from lab.core.hashing import write_atomically
from lab.runner.batch import claimed
from lab.runner.experiment import relative
from lab.runner.failures import explain

log = logging.getLogger(__name__)


def search(cfg: DictConfig) -> None:
    """Run the trials one after another, each a run below this run's folder; writes the table after
    each.

    A trial that fails, or lacks an objective, is told, stays in the table and does not stop the
    others; only the first one, the preset itself, does.

    Raises:
        UserError: see `Plan.read`; Optuna is missing; the preset's own run has no result.
    """
    from hydra.core.hydra_config import HydraConfig

    from lab.cli.actions import publish
    from lab.cli.callbacks import told_cost

    plan, folder = Plan.read(cfg), Path(HydraConfig.get().runtime.output_dir)
    if cfg.dry_run:
        print(f"{cfg.name}, one after another: {told_cost(plan.trials, cfg.sweep)}")
        print("\n".join(f"  {one}" for one in plan.space))
        print(
            "  objectives: "
            + ", ".join(f"{name} = {metric}" for name, metric in plan.objectives.items())
        )
        return
    optuna = _optuna()
    trials = [
        _run(cfg, plan, folder, 0, {one.key: OmegaConf.select(cfg, one.key) for one in plan.space})
    ]
    _write(folder, plan, trials)
    study = _study(optuna, plan, trials[0])
    while len(trials) < plan.trials:
        asked = study.ask()
        found = _run(
            cfg, plan, folder, len(trials), {one.key: one.draw(asked) for one in plan.space}
        )
        _tell(optuna, study, asked, found)
        trials.append(found)
        _write(folder, plan, trials)
    write_atomically(folder / "pareto.html", pareto.to_html(plan.objectives, trials).encode())
    paths = [_place(cfg, folder, t.number) / "record.json" for t in trials]
    publish([records.read(path) for path in paths if path.is_file()], folder)
    print(f"\n{pareto.to_markdown(plan.objectives, trials)}")
    print(f"search: {relative(folder / 'pareto.md')} (also .csv, .html, .json)")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as missing:
        told = 'needs the package optuna: `pip install "immunization-bench[search]"`.'
        raise UserError("action", KEY, told) from missing
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, plan: Plan, preset: Trial) -> Any:
    """Optuna's study; directions are those of the metrics, and the preset's run is its first
    trial.
    """
    sides = [
        "maximize" if preset.metrics[name]["better"] == "higher" else "minimize"
        for name in plan.objectives
    ]
    sampler = optuna.samplers.TPESampler(seed=plan.seed, n_startup_trials=plan.startup)
    study = optuna.create_study(directions=sides, sampler=sampler)
    study.enqueue_trial(dict(preset.values))
    first = study.ask()
    for one in plan.space:
        one.draw(first)
    _tell(optuna, study, first, preset)
    return study


def _tell(optuna: Any, study: Any, asked: Any, found: Trial) -> None:
    if found.failure is not None:
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(asked, [metric["value"] for metric in found.metrics.values()])


def _place(cfg: DictConfig, folder: Path, number: int) -> Path:
    return folder / f"{number}-{cfg.immunize.name}"


def _run(cfg: DictConfig, plan: Plan, folder: Path, number: int, values: dict[str, Any]) -> Trial:
    """One trial, as a run of its own; what goes wrong in it is its result, but for the first
    one.
    """
    from lab.cluster.launch import launch

    place, failure = _place(cfg, folder, number), None
    changes = [f"{key}={typed(value)}" for key, value in values.items()]
    log.info("trial %d of %d: %s", number + 1, plan.trials, " ".join(changes))
    _write_overrides(place, changes)
    try:
        with claimed(place, "run", False):
            launch(changed(cfg, values), place)
    except Exception as error:
        if number == 0:
            raise
        told = explain(error)
        failure = told or f"{type(error).__name__}: {error}"
        if told is None:
            traceback.print_exc()
        sweep_codes.append(2 if told else 1)
        log.warning("trial %d failed, the search goes on: %s", number, failure)
    return outcome_of(place / "record.json", number, values, plan, failure)


def changed(cfg: DictConfig, values: dict[str, Any]) -> DictConfig:
    """The config of one trial."""
    found = copy.deepcopy(cfg)
    found.action = "run"
    for key, value in values.items():
        OmegaConf.update(found, key, value)
    return found


def _write_overrides(place: Path, changes: list[str]) -> None:
    """As Hydra does beside a run, so that trackers name the run by what was changed."""
    from hydra.core.hydra_config import HydraConfig

    (place / ".hydra").mkdir(parents=True, exist_ok=True)
    given = [*HydraConfig.get().overrides.task, *changes]
    write_atomically(
        place / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(given)).encode()
    )


def outcome_of(
    path: Path, number: int, values: dict[str, Any], plan: Plan, failure: str | None
) -> Trial:
    """The objectives of a trial by its record; one that lacks an objective has failed.

    Raises:
        UserError: the preset's own run lacks one, or an objective is a metric without a better
            side.
    """
    if failure is not None and number > 0 and not path.is_file():
        return Trial(number, values, {}, failure)
    record = records.read(path)
    found = {name: record["metrics"].get(metric) for name, metric in plan.objectives.items()}
    if failure is None and record["status"] != "ok":
        failure = record["error"]["message"] if record["error"] else record["status"]
    for name, metric in plan.objectives.items():
        one = found[name]
        if failure is None and (one is None or one["value"] is None):
            failure = (
                f"no {metric}: {one['note'] if one else 'no evaluator of this run measures it'}"
            )
        if one is not None and one["better"] == "neutral":
            raise UserError(
                f"{KEY}.objectives.{name}",
                metric,
                "has no better side; choose a metric that has one.",
            )
    if failure is not None and number == 0:
        raise UserError(KEY, "the preset's own run", f"has no result to start from: {failure}")
    return Trial(
        number, values, {name: one for name, one in found.items() if one is not None}, failure
    )


def _write(folder: Path, plan: Plan, trials: list[Trial]) -> None:
    """After every trial, so that an interrupted search has its table too."""
    for name, text in (
        ("md", pareto.to_markdown(plan.objectives, trials)),
        ("csv", pareto.to_csv(plan.objectives, trials)),
        (
            "json",
            json.dumps(records.clean(pareto.to_json(plan.objectives, trials)), indent=1) + "\n",
        ),
    ):
        write_atomically(folder / f"pareto.{name}", text.encode())
