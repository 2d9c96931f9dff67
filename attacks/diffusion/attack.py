"""Options that every attacker on a text-to-image model shares, and what such an attacker has to say
of itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attacks.diffusion.data import AUGMENTATIONS, check_data
from attacks.diffusion.export import check_form
from attacks.trajectory import schedule_factor
from lab.core.captions import TEMPLATES
from lab.core.data import Concept, ConceptCase, Kind
from lab.core.errors import UserError, nearest
from lab.core.options import choice, count, flag, names, number, unread
from lab.core.prompts import text
from lab.core.types import Attacker, Budget, Checkpoint, Trajectory
from lab.models.diffusion import DiffusionModel
from lab.scenarios.concepts import sampling

OPTIMIZERS = ("adamw", "sgd")


@dataclass
class Moving:
    """What an attacker trains on its copy of the model.

    Attributes:
        parameters: by name.
        form: how `attacks.diffusion.export` writes ``weights``: ``lora`` | ``unet`` | ``delta``.
        weights: what a user would load; see `attacks.diffusion.export` for the names.
        close: makes the change a plain part of the copy, so that another stage can build on it.
        text: whether encoded prompts change while it trains.
        info: facts for the record.
    """

    parameters: dict[str, nn.Parameter]
    form: str
    weights: Callable[[], dict[str, Tensor]]
    close: Callable[[], None] = lambda: None
    text: bool = False
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class ConceptBase(Attacker):
    """What every attacker on a text-to-image model is told besides how to train.

    Args:
        name: key under ``attacks``.
        explosion: an attack whose loss exceeds this multiple of its first value has diverged.
        families: prompt families that pictures are generated for at every snapshot; empty = none.
        sampling: how they are generated; None = the defaults of `lab.core.data.Sampling`.
        keep_weights: whether the trajectory holds the final weights.
        search: None, or a budgeted search for the best options (`attacks.diffusion.search`).

    Raises:
        UserError: an option that is unknown or out of range.
    """

    _: KW_ONLY
    name: str
    explosion: float = 10.0
    families: Any = ("name",)
    sampling: Any = None
    keep_weights: bool = True
    search: Any = None

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    def __post_init__(self) -> None:
        self.explosion = number(f"{self.key}.explosion", self.explosion, above=1)
        self.families = names(f"{self.key}.families", self.families)
        self.sampling = sampling(self.sampling, f"{self.key}.sampling")
        flag(f"{self.key}.keep_weights", self.keep_weights)
        self.search = self._parsed_search()

    def _parsed_search(self) -> Any:
        from attacks.diffusion.search import Search

        return None if self.search is None else Search.parse(self.key, self.search)

    def _check_search(self) -> None:
        """Every value of the search's space must be one that the attacker takes."""
        if self.search is not None:
            for option, values in self.search.space.items():
                for value in values:
                    self.varied({option: value})

    @property
    def key(self) -> str:
        return f"attacks.{self.name}"

    @abstractmethod
    def varied(self, setting: Mapping[str, Any]) -> ConceptBase:
        """The same attacker with the options ``setting``, without a search of its own.

        Raises:
            UserError: an option that it does not have, or that a search must not touch.
        """

    @abstractmethod
    def plan(self, task: Concept, budget: Budget) -> list[tuple[ConceptAttack, Concept, int]]:
        """Who trains on what until which step."""

    @abstractmethod
    def check_task(self, task: Concept) -> None:
        """Raises `UserError` where ``task`` lacks what the options ask for
        (`attacks.diffusion.data.check_data`).
        """

    def texts(self) -> dict[str, str]:
        """Config key → what becomes a part of prompts; hook of
        `lab.runner.assemble.check_cases`.
        """
        return {f"{self.key}.sampling.negative": self.sampling.negative}

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        """Before anything runs: `check_task` for every concept, with every setting that a search
        will try, and `check_unread`.
        """
        self.check_unread()
        for case in cases:
            for task in case.tasks:
                self.check_task(task)
                if self.search is not None:
                    self.search.check(self, task)

    @abstractmethod
    def check_unread(self) -> None:
        """Raises `UserError` for an option that nothing reads, which would be a claim in the
        record.
        """

    @abstractmethod
    def dry_open(self, model: DiffusionModel, task: Concept) -> None:
        """Before anything runs: what moves can be set up in a copy of ``model``; hook of
        `lab.runner.assemble.check_cases`.

        Raises:
            UserError: a model whose layers, precision or tokenizer the options do not suit.
        """

    def __call__(
        self,
        model: DiffusionModel,
        task: Concept,
        *,
        seed: int,
        budget: Budget,
        checkpoint: Checkpoint | None,
    ) -> Trajectory:
        """See `lab.core.types.Attacker`; ``samples`` holds the generations of every snapshot.

        Raises:
            UserError: a budget or a concept that cannot be trained on.
            Diverged: the loss is not finite before the first update.
        """
        from attacks.diffusion.trainer import run

        self.check_task(task)
        if self.search is not None:
            found: Trajectory = self.search(
                self, model, task, seed=seed, budget=budget, checkpoint=checkpoint
            )
            return found
        return run(self, model, task, seed=seed, budget=budget, checkpoint=checkpoint)


@dataclass(eq=False)
class ConceptAttack(ConceptBase):
    """Fine-tunes a copy of a text-to-image model on ``task.train``.

    Args:
        optimizer: ``adamw`` | ``sgd`` (heavy ball, 0.9), both as in torch.
        lr: learning rate.
        weight_decay: of either optimizer.
        schedule: ``constant`` | ``cosine`` | ``linear``, after ``warmup`` steps of a linear rise.
        warmup: steps.
        batch_size: pictures per step; as many prior pictures come on top.
        clip: largest norm of the gradient; None = no limit.
        template: captions of the training pictures: ``name`` | ``token`` | ``description``
            (`lab.core.captions.captions`). With ``token`` the prompts of every family speak of the
            token too: in place of the concept's words, or in front where a prompt does not have
            them.
        token: what stands for the concept with ``template=token``.
        pictures: how many of the training pictures are used; None = all.
        augmentation: ``none`` | ``flip`` | ``crop``.
        prior_weight: weight of the loss on ``task.prior`` (prior preservation, arXiv 2208.12242); 0
            = off.

    The other options are those of `ConceptBase`.

    Raises:
        UserError: an option that is unknown or out of range.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: str = "constant"
    warmup: int = 0
    batch_size: int = 8
    clip: float | None = 1.0
    template: str = "name"
    token: str = "sks"
    pictures: int | None = None
    augmentation: str = "none"
    prior_weight: float = 0.0

    templates: ClassVar[tuple[str, ...]] = TEMPLATES
    by_token: ClassVar[tuple[str, ...]] = ("token",)  # options that template=token alone reads
    fixed: ClassVar[frozenset[str]] = frozenset(
        f.name for f in fields(ConceptBase)
    )  # never searched

    def __post_init__(self) -> None:
        super().__post_init__()
        key = self.key
        choice(f"{key}.optimizer", self.optimizer, OPTIMIZERS)
        self.lr = number(f"{key}.lr", self.lr, above=0)
        self.weight_decay = number(f"{key}.weight_decay", self.weight_decay, 0)
        choice(f"{key}.schedule", self.schedule, ("constant", "cosine", "linear"))
        count(f"{key}.warmup", self.warmup, 0)
        count(f"{key}.batch_size", self.batch_size)
        self.clip = None if self.clip is None else number(f"{key}.clip", self.clip, above=0)
        choice(f"{key}.template", self.template, self.templates)
        self.token = text(f"{key}.token", self.token)
        if self.pictures is not None:
            count(f"{key}.pictures", self.pictures)
        choice(f"{key}.augmentation", self.augmentation, AUGMENTATIONS)
        self.prior_weight = number(f"{key}.prior_weight", self.prior_weight, 0)
        self._check_search()

    def varied(self, setting: Mapping[str, Any]) -> ConceptAttack:
        known = [f.name for f in fields(self) if f.name not in self.fixed]
        for option in setting:
            if option not in known:
                key = f"{self.key}.search.space.{option}"
                raise UserError(
                    key, setting[option], f"no option to search; {nearest(option, known)}"
                )
        return replace(self, **setting, search=None)

    def texts(self) -> dict[str, str]:
        return {**super().texts(), f"{self.key}.token": self.token}

    def rate(self, step: int, total: int) -> float:
        """Learning rate of update ``step`` (0 … ``total`` - 1)."""
        if self.warmup >= total:
            told = f"the attack has {total} steps and would never reach its rate: take fewer."
            raise UserError(f"{self.key}.warmup", self.warmup, told)
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * schedule_factor(
            self.schedule, step - self.warmup, max(total - self.warmup, 1)
        )

    def expression(self, task: Concept) -> str:
        """What stands for the concept's words with ``template=token``."""
        return self.token

    def learns(self) -> str | None:
        """The words of a token that it adds to the tokenizer; None where it adds none."""
        return None

    @abstractmethod
    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        """Choose, or add, what moves in ``model``, a copy whose parameters are all frozen."""

    def dry_open(self, model: DiffusionModel, task: Concept) -> None:
        check_moving(self.key, self.open(model.copy(), task, 0))

    def check_task(self, task: Concept) -> None:
        check_data(
            self.key, task, self.template, self.families, self.prior_weight > 0, self.pictures
        )

    def check_unread(self) -> None:
        searched = self.search.space.get("template", ()) if self.search is not None else ()
        read, default = (
            "token" in (self.template, *searched),
            {f.name: f.default for f in fields(self)},
        )
        for option in self.by_token:
            unread(
                f"{self.key}.{option}",
                getattr(self, option),
                default[option],
                read,
                f"{self.key}.template=token",
            )

    def plan(self, task: Concept, budget: Budget) -> list[tuple[ConceptAttack, Concept, int]]:
        return [(self, task, budget.steps)]


def check_moving(key: str, moving: Moving) -> list[nn.Parameter]:
    """What moves, which has to be of full precision and in a form that can be written.

    Raises:
        UserError: nothing moves; half precision, in which small updates are lost; see `check_form`.
    """
    if not moving.parameters:
        raise UserError(
            key, "no parameters", "`open` names nothing to train in `Moving.parameters`."
        )
    check_form(key, moving.form, moving.weights(), moving.info)
    for parameter in moving.parameters.values():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            told = (
                "attackers that move the model's own weights train in float32; take fp32, "
                "or attack by lora."
            )
            raise UserError("backbone.dtype", parameter.dtype, told)
    return list(moving.parameters.values())
