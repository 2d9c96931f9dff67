"""`action=search`: settings of an immunizer, searched for protection, utility and benign learning
by Optuna.

The plug-in hydra-optuna-sweeper (1.3.0) is not used: it holds Optuna below version 3, whose storage
fails with a current SQLAlchemy, so that an interrupted search could not go on. No storage is needed
here: the sampler is seeded and stages are cached, so the same command proposes the same trials,
reads the finished ones from the cache and goes on.
"""

from __future__ import annotations

import copy
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
from pydantic import Field

from eval.report import pareto
from eval.report.pareto import Trial
from eval.report.words import typed
from lab.cli.callbacks import describe_cost, exit_code
from lab.cli.errors import EXIT_USER, report_error
from lab.cli.tables import publish
from lab.cluster import launch
from lab.core import record as records
from lab.core.config import Count, Index, bind, options
from lab.core.errors import UserError, as_user_error, nearest
from lab.core.hashing import write_atomically
from lab.runner.batch import claim, relative
from lab.runner.experiment import describe

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
        plan = bind(Plan, plain, "search")
        for option in plan.space:
            if option not in cfg.immunize:
                fix = f"there is no such option; {nearest(option, map(str, cfg.immunize))}"
                raise UserError(f"search.space.{option}", plan.space[option], fix)
        return plan


def _distribution(space: Any) -> BaseDistribution:
    """Return a list of choices, or ``{low, high, log, step}``, as Optuna's; whole where all are."""
    if isinstance(space, list):
        return CategoricalDistribution(space)
    is_whole = all(isinstance(space.get(key, 1), int) for key in ("low", "high", "step"))
    return IntDistribution(**space) if is_whole else FloatDistribution(**space)


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
    with as_user_error("search.space", plan.space, "Optuna cannot draw from it."):
        space = {f"immunize.{option}": _distribution(s) for option, s in plan.space.items()}
    preset = {key: OmegaConf.select(cfg, key) for key in space}
    study = optuna.create_study(
        directions=["minimize"] * len(plan.objectives),
        sampler=optuna.samplers.TPESampler(seed=plan.seed, n_startup_trials=plan.startup),
    )
    study.enqueue_trial(preset)
    trials: list[Trial] = []
    paths = [folder / f"{i}-{cfg.immunize.name}" / "record.json" for i in range(plan.trials)]
    for number, path in enumerate(paths):
        proposed = study.ask(space)
        rounded = {  # to four digits, which a user can type
            key: float(format(value, ".4g")) if isinstance(value, float) else value
            for key, value in proposed.params.items()
        }
        trial = _run(cfg, plan, path.parent, number, rounded if number else preset)
        if trial.failure is None:
            signs = {"higher": -1, "lower": 1}
            study.tell(proposed, [m["value"] * signs[m["better"]] for m in trial.metrics.values()])
        else:
            study.tell(proposed, state=optuna.trial.TrialState.FAIL)
        trials.append(trial)
        best = {done.number for done in study.best_trials}
        _write(folder, plan, trials, best)
    finished = [records.read(path) for path in paths if path.is_file()]
    publish(finished, folder)
    print(f"\n{pareto.to_markdown(plan.objectives, trials, best)}")
    print(f"search: {relative(folder / 'pareto.md')} (also .csv, .html)")
    refused = [EXIT_USER for path in paths if not path.is_file()]
    return max([*map(exit_code, finished), *refused])


def _run(cfg: DictConfig, plan: Plan, folder: Path, number: int, values: dict[str, Any]) -> Trial:
    """Run one trial and read its objectives; a failure is its result.

    Raises:
        Exception: the first trial, the preset's own run, failed.
    """
    changes = [f"{key}={typed(value)}" for key, value in values.items()]
    log.info("trial %d of %d: %s", number + 1, plan.trials, " ".join(changes))
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    overrides = OmegaConf.create([*HydraConfig.get().overrides.task, *changes])
    write_atomically(folder / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(overrides).encode())
    trial_cfg = copy.deepcopy(cfg)
    for key, value in {"action": "run", **values}.items():
        OmegaConf.update(trial_cfg, key, value)
    try:
        with claim(folder):
            launch.launch(trial_cfg, folder)
        metrics = _objectives(records.read(folder / "record.json"), plan)
    except Exception as error:
        if number == 0:
            raise
        report_error(error)
        return Trial(number, values, {}, describe(error).user_message or str(describe(error)))
    return Trial(number, values, metrics)


def _objectives(record: records.Record, plan: Plan) -> dict[str, Any]:
    """Return the score of every objective.

    Raises:
        UserError: the run has no result, or lacks an objective with a better side.
    """
    if record["status"] != "ok":
        raise UserError("search", record["status"], record["error"]["message"])
    scores = {name: record["metrics"].get(metric) for name, metric in plan.objectives.items()}
    for name, score in scores.items():
        if score is None or score["value"] is None or score["better"] == "neutral":
            fix = "has no value, or no better side, in this run; choose another metric."
            raise UserError(f"search.objectives.{name}", plan.objectives[name], fix)
    return scores


def _write(folder: Path, plan: Plan, trials: list[Trial], best: set[int]) -> None:
    """Write the table after every trial, so that an interrupted search has it too."""
    tables = {"md": pareto.to_markdown, "csv": pareto.to_csv, "html": pareto.to_html}
    for suffix, write in tables.items():
        write_atomically(folder / f"pareto.{suffix}", write(plan.objectives, trials, best).encode())
