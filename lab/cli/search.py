"""`action=search`: settings of an immunizer, searched for protection, utility and benign learning
by Optuna.

The plug-in hydra-optuna-sweeper (1.3.0) is not used: it holds Optuna below version 3, whose storage
fails with a current SQLAlchemy, so that an interrupted search could not go on. No storage is needed
here: the sampler is seeded and stages are cached, so the same command proposes the same trials,
reads the finished ones from the cache and goes on.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import optuna
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import Field, ValidationError

from eval.report import pareto
from eval.report.labels import typed
from eval.report.pareto import Trial
from lab.cli.actions import publish
from lab.cli.callbacks import describe_cost
from lab.cli.errors import report_error
from lab.core import record as records
from lab.core.cache import write_atomically
from lab.core.config import Count, Index, options, user_error
from lab.core.errors import UserError, defect, explain
from lab.runner.batch import claim
from lab.runner.experiment import relative

log = logging.getLogger(__name__)
Scalar = bool | int | float | str | None


@options
class Plan:
    """The group ``search`` of the config.

    Attributes:
        trials: how many runs; the first one has the preset's own values. startup: drawn at random
            before TPE's model is used. seed: of the sampler. space: options of the immunizer → a
            list of choices or a range. objectives: a word → metric of the record.
    """

    trials: Count
    startup: Index
    seed: Index
    space: Annotated[dict[str, list[Scalar] | dict[str, Scalar]], Field(min_length=1)]
    objectives: Annotated[dict[str, str], Field(min_length=2)]

    @staticmethod
    def read(cfg: DictConfig) -> Plan:
        """Read and check ``cfg.search``.

        Raises:
            UserError: a key that is missing or cannot work, or a scenario whose test concepts would
                be used.
        """
        if not isinstance(cfg.get("search"), DictConfig):
            fix = "comes with its space and objectives: `python run.py sweeps=tune_kappa`."
            raise UserError("action", "search", fix)
        split = cfg.scenario.get("split")
        if split not in (None, "validation"):
            fix = "settings are chosen on validation concepts, never on those that tables report."
            raise UserError("scenario.split", split, fix)
        plain: Any = OmegaConf.to_container(cfg.search, resolve=True)
        try:
            plan = Plan(**plain)
        except ValidationError as error:
            raise user_error(error, "search", Plan) from None
        for key, distribution in plan.distributions().items():
            preset = OmegaConf.select(cfg, key, default=_ABSENT)
            if not _contains(distribution, preset):
                fix = f"must hold the preset's own value, {preset}, which is tried first."
                raise UserError(f"search.space.{key.partition('.')[2]}", distribution, fix)
        return plan

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return Optuna's distribution of every searched config key.

        Raises:
            UserError: a range that Optuna cannot draw from.
        """
        found: dict[str, BaseDistribution] = {}
        for option, space in self.space.items():
            try:
                found[f"immunize.{option}"] = _distribution(space)
            except (TypeError, ValueError) as error:
                raise UserError(f"search.space.{option}", space, str(error)) from None
        return found


def _distribution(space: Any) -> BaseDistribution:
    """Return a list of choices, or ``{low, high, log, step}``, as Optuna's; whole where all are."""
    if isinstance(space, list):
        return CategoricalDistribution(space)
    is_whole = all(isinstance(space.get(key, 1), int) for key in ("low", "high", "step"))
    return IntDistribution(**space) if is_whole else FloatDistribution(**space)


_ABSENT = "no such option"


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (TypeError, ValueError):
        return False


def search(cfg: DictConfig, folder: Path) -> int:
    """Run the trials one after another, each a run below ``folder``; write the table after each.

    A trial that fails or lacks an objective stays in the table and does not stop the others; only
    the first one, the preset itself, does. Returns the worst exit code of the trials.

    Raises:
        UserError: see `Plan.read`; the preset's own run has no result.
    """
    plan = Plan.read(cfg)
    if cfg.dry_run:
        print(f"{cfg.name}: {plan.trials} trials, one after another; {describe_cost(cfg.sweep)}")
        print(OmegaConf.to_yaml(cfg.search))
        return 0
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = plan.distributions()
    preset, worst = _run(cfg, plan, folder, 0, {key: OmegaConf.select(cfg, key) for key in space})
    trials = [preset]
    _write(folder, plan, trials)
    better = [preset.metrics[name]["better"] for name in plan.objectives]
    study = optuna.create_study(
        directions=["maximize" if side == "higher" else "minimize" for side in better],
        sampler=optuna.samplers.TPESampler(seed=plan.seed, n_startup_trials=plan.startup),
    )
    study.enqueue_trial(dict(preset.values))
    _tell(study, study.ask(space), preset)
    while len(trials) < plan.trials:
        proposed = study.ask(space)
        values = {key: _round(value) for key, value in proposed.params.items()}
        trial, code = _run(cfg, plan, folder, len(trials), values)
        _tell(study, proposed, trial)
        trials.append(trial)
        worst = max(worst, code)
        _write(folder, plan, trials)
    write_atomically(folder / "pareto.html", pareto.to_html(plan.objectives, trials).encode())
    paths = [_folder(cfg, folder, trial.number) / "record.json" for trial in trials]
    publish([records.read(path) for path in paths if path.is_file()], folder)
    print(f"\n{pareto.to_markdown(plan.objectives, trials)}")
    print(f"search: {relative(folder / 'pareto.md')} (also .csv, .html, .json)")
    return worst


def _round(value: Any) -> Any:
    """Round a fraction to four digits, so that a user can type it."""
    return float(format(value, ".4g")) if isinstance(value, float) else value


def _tell(study: optuna.Study, proposed: optuna.Trial, trial: Trial) -> None:
    if trial.failure is not None:
        study.tell(proposed, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(proposed, [metric["value"] for metric in trial.metrics.values()])


def _folder(cfg: DictConfig, folder: Path, number: int) -> Path:
    return folder / f"{number}-{cfg.immunize.name}"


def _run(
    cfg: DictConfig, plan: Plan, folder: Path, number: int, values: dict[str, Any]
) -> tuple[Trial, int]:
    """Run one trial; a failure is its result, but for the first one. Returns its exit code, too."""
    from lab.cluster.launch import launch

    place, failure, code = _folder(cfg, folder, number), None, 0
    changes = [f"{key}={typed(value)}" for key, value in values.items()]
    log.info("trial %d of %d: %s", number + 1, plan.trials, " ".join(changes))
    (place / ".hydra").mkdir(parents=True, exist_ok=True)
    overrides = OmegaConf.create([*HydraConfig.get().overrides.task, *changes])
    write_atomically(place / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(overrides).encode())
    trial_cfg = copy.deepcopy(cfg)
    trial_cfg.action = "run"
    for key, value in values.items():
        OmegaConf.update(trial_cfg, key, value)
    try:
        with claim(place):
            launch(trial_cfg, place)
    except Exception as error:
        if number == 0:
            raise
        failure, code = explain(error) or defect(error), report_error(error)
        log.warning("trial %d failed, the search goes on", number)
    return _outcome(place / "record.json", number, values, plan, failure), code


def _outcome(
    path: Path, number: int, values: dict[str, Any], plan: Plan, failure: str | None
) -> Trial:
    """Read the objectives of a trial from its record; a trial that lacks one has failed.

    Raises:
        UserError: the preset's own run lacks one, or an objective is a metric without a better
            side.
    """
    if failure is not None and not path.is_file():
        return Trial(number, values, {}, failure)
    record = records.read(path)
    if failure is None and record["status"] != "ok":
        failure = record["error"]["message"] if record["error"] else record["status"]
    metrics = {}
    for name, metric in plan.objectives.items():
        score = record["metrics"].get(metric)
        if score is None or score["value"] is None:
            reason = score["note"] if score else "no evaluator of this run measures it"
            failure = failure or f"no {metric}: {reason}"
        elif score["better"] == "neutral":
            fix = "has no better side; choose a metric that has one."
            raise UserError(f"search.objectives.{name}", metric, fix)
        if score is not None:
            metrics[name] = score
    if failure is not None and number == 0:
        raise UserError("search", "the preset's own run", f"has no result to start from: {failure}")
    return Trial(number, values, metrics, failure)


def _write(folder: Path, plan: Plan, trials: list[Trial]) -> None:
    """Write the table after every trial, so that an interrupted search has it too."""
    content = records.clean(pareto.to_json(plan.objectives, trials))
    tables = {
        "md": pareto.to_markdown(plan.objectives, trials),
        "csv": pareto.to_csv(plan.objectives, trials),
        "json": json.dumps(content, indent=1) + "\n",
    }
    for name, text in tables.items():
        write_atomically(folder / f"pareto.{name}", text.encode())
