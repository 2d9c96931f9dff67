"""What a search may vary and what it is after: the group ``search`` of the config, read and
checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eval.report.labels import typed
from lab.core.errors import UserError, nearest
from lab.core.options import count

KEY = "search"
_SCALARS = (bool, int, float, str, type(None))
_FIELDS = ("trials", "startup", "seed", "space", "objectives")
_ABSENT = object()


@dataclass(frozen=True)
class Range:
    """One dimension: ``choices``, or ``low`` … ``high``, on a logarithmic scale or in steps; whole
    where all are.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None

    @staticmethod
    def read(option: str, given: Any) -> Range:
        """
        Raises:
            UserError: neither a list of choices nor a range that Optuna can draw from.
        """
        key, name = f"immunize.{option}", f"{KEY}.space.{option}"
        if isinstance(given, list):
            if len(given) < 2 or not all(isinstance(v, _SCALARS) for v in given):
                raise UserError(
                    name,
                    given,
                    "a list needs two choices or more, each a number, a word, true or null.",
                )
            return Range(key, choices=tuple(given))
        if not isinstance(given, dict) or not {"low", "high"} <= set(given) <= {
            "low",
            "high",
            "log",
            "step",
        }:
            raise UserError(
                name,
                given,
                "must be a list of choices or {low: A, high: B}, with log: true or step: S.",
            )
        found = Range(key, **given)
        numbers = [found.low, found.high, *([] if found.step is None else [found.step])]
        if (
            any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers)
            or found.low >= found.high
        ):
            raise UserError(name, given, "low and high must be numbers, low below high.")
        if found.log and (found.low <= 0 or found.step is not None):
            raise UserError(name, given, "a logarithmic range has low > 0 and no step.")
        if found.step is not None and found.step <= 0:
            raise UserError(name, given, "step must be > 0.")
        return found

    @property
    def whole(self) -> bool:
        return all(
            isinstance(v, int) for v in (self.low, self.high, 1 if self.step is None else self.step)
        )

    def holds(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not self.low <= value <= self.high
        ):
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-9

    def draw(self, trial: Any) -> Any:
        """What ``trial``, one of Optuna's, proposes; fractions to four digits, so that a user can
        type them.
        """
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(
                self.key, int(self.low), int(self.high), step=step, log=self.log
            )
        return float(
            format(
                trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log),
                ".4g",
            )
        )

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key}: {', '.join(map(typed, self.choices))}"
        how = (
            " (logarithmic)"
            if self.log
            else ""
            if self.step is None
            else f" in steps of {self.step:g}"
        )
        return f"{self.key}: {self.low:g} … {self.high:g}{how}"


@dataclass(frozen=True)
class Plan:
    """The group ``search``.

    Attributes:
        trials: how many runs; the first one has the preset's own values. startup: drawn at random
            before TPE's model is used. seed: of the sampler. space: one range per option of the
            immunizer. objectives: a word → metric of the record.
    """

    trials: int
    startup: int
    seed: int
    space: tuple[Range, ...]
    objectives: dict[str, str]

    @staticmethod
    def read(cfg: DictConfig) -> Plan:
        """
        Raises:
            UserError: a key that is missing or cannot work, or a scenario whose test concepts would
                be used.
        """
        if not isinstance(cfg.get(KEY), DictConfig):
            raise UserError(
                "action",
                KEY,
                "comes with its space and objectives: `python run.py sweeps=tune_kappa`.",
            )
        given: dict[str, Any] = OmegaConf.to_container(cfg[KEY], resolve=True)  # type: ignore[assignment]
        for name in given:
            if name not in _FIELDS:
                raise UserError(
                    f"{KEY}.{name}", given[name], f"there is no such key; {nearest(name, _FIELDS)}"
                )
        split = cfg.scenario.get("split")
        if split not in (None, "validation"):
            told = (
                "settings are chosen on validation concepts, never on those that tables "
                "report: validation."
            )
            raise UserError("scenario.split", split, told)
        objectives = {str(k): str(v) for k, v in (given.get("objectives") or {}).items()}
        if len(objectives) < 2:
            raise UserError(
                f"{KEY}.objectives",
                objectives,
                "needs two metrics or more, e.g. {protection: asr_auc}.",
            )
        return Plan(
            count(f"{KEY}.trials", given.get("trials")),
            count(f"{KEY}.startup", given.get("startup"), 0),
            count(f"{KEY}.seed", given.get("seed"), 0),
            _space(cfg, given.get("space") or {}),
            objectives,
        )


def _space(cfg: DictConfig, given: dict[str, Any]) -> tuple[Range, ...]:
    if not given:
        raise UserError(f"{KEY}.space", given, "names no option to search.")
    found = []
    for option, value in given.items():
        one, name = Range.read(str(option), value), f"{KEY}.space.{option}"
        preset = OmegaConf.select(cfg, one.key, default=_ABSENT)
        if preset is _ABSENT:
            raise UserError(name, value, f"{cfg.immunize.name} has no option {one.key}.")
        if not one.holds(preset):
            raise UserError(
                name,
                value,
                f"must hold the preset's own value, {typed(preset)}, which is tried first.",
            )
        found.append(one)
    return tuple(found)
