"""Options that attackers on a text-to-image model share, and what such an attacker provides."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from typing_extensions import Self

from attacks.diffusion.export import check_form
from lab.core.config import (
    Count,
    Flag,
    Index,
    Names,
    NonNegative,
    Positive,
    Prompt,
    Text,
    config,
)
from lab.core.data import Concept, Kind, Sampling
from lab.core.errors import UserError
from lab.core.types import Attacker, Budget
from lab.models.diffusion import DiffusionModel


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

    def check(self, key: str) -> Self:
        """Check that the attacker ``key`` can train this and that its result can be written.

        Raises:
            UserError: no parameters, half precision, in which small updates are lost, or see
                `attacks.diffusion.export.check_form`.
        """
        if not self.parameters:
            raise UserError(
                key, "no parameters", "`open` names nothing to train in `Moving.parameters`."
            )
        check_form(key, self.form, self.weights(), self.info)
        dtypes = {p.dtype for p in self.parameters.values()} & {torch.float16, torch.bfloat16}
        if dtypes:
            reason = "attackers that move the model's own weights train in float32; or take lora."
            raise UserError("backbone.dtype", dtypes.pop(), reason)
        return self


def trained_parts(model: DiffusionModel) -> dict[str, nn.Module]:
    """Return the parts that an attacker may train, by the names that diffusers gives them."""
    encoders = {f"text_encoder_{i}": net for i, net in enumerate(model.text_encoders[1:], start=2)}
    return {"unet": model.unet, "text_encoder": model.text_encoders[0], **encoders}


class Stage(NamedTuple):
    """A part of an attack: who trains on which concept until which step."""

    training: TrainingOptions
    task: Concept
    stop: int


@config
class AttackOptions(Attacker, ABC):
    """Options of every attacker on a text-to-image model besides how it trains.

    Args:
        name: key under ``attacks``.
        explosion: an attack whose loss exceeds this multiple of its first value has diverged.
        families: prompt families that images are generated for at every snapshot; empty = none.
        sampling: how they are generated; None = the defaults of `lab.core.data.Sampling`.
        keep_weights: whether the trajectory holds the final weights.
    """

    name: Text
    explosion: Annotated[float, Field(strict=True, gt=1)] = 10.0
    families: Names = ("name",)
    sampling: Annotated[Sampling, BeforeValidator(lambda value: value or {})] = Sampling()
    keep_weights: Flag = True

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    @property
    def key(self) -> str:
        """The config key of the attacker."""
        return f"attacks.{self.name}"

    @abstractmethod
    def varied(self, setting: Mapping[str, Any]) -> Self:
        """Return the same attacker with the options ``setting``, without a search of its own.

        Raises:
            UserError: an option that it does not have, or that a search must not touch.
        """

    @abstractmethod
    def plan(self, task: Concept, budget: Budget) -> list[Stage]:
        """Return the stages of the attack, in order."""

    @abstractmethod
    def check_task(self, task: Concept) -> None:
        """Raise `UserError` where ``task`` lacks what the options ask for."""

    @abstractmethod
    def dry_open(self, model: DiffusionModel, task: Concept) -> None:
        """Set up what moves in a copy of ``model``, before anything runs.

        Raises:
            UserError: the layers, precision or tokenizer of the model do not suit the options.
        """

    def texts(self) -> dict[str, str]:
        """Return what becomes a part of prompts, by config key."""
        return {f"{self.key}.sampling.negative": self.sampling.negative}


@config
class TrainingOptions(AttackOptions):
    """How an attacker fine-tunes a copy of a text-to-image model on ``task.train``.

    Args:
        optimizer: ``adamw`` | ``sgd`` (heavy ball, 0.9), both as in torch.
        lr: learning rate.
        weight_decay: of either optimizer.
        schedule: ``constant`` | ``cosine`` | ``linear``, after ``warmup`` steps of a linear rise.
        warmup: steps.
        batch_size: images per step; as many prior images come on top.
        clip: largest norm of the gradient; None = no limit.
        template: captions of the training images: ``name`` | ``token`` | ``description``
            (`lab.core.prompts.captions`). With ``token`` the prompts of every family speak of the
            token too: in place of the concept's words, or in front where a prompt lacks them.
        token: what stands for the concept with ``template=token``.
        pictures: how many of the training images are used; None = all.
        augmentation: ``none`` | ``flip`` | ``crop``.
        prior_weight: weight of the loss on ``task.prior`` (prior preservation, arXiv 2208.12242); 0
            = off.

    The other options are those of `AttackOptions`.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: Index = 0
    batch_size: Count = 8
    clip: Positive | None = 1.0
    template: Literal["name", "token", "description"] = "name"
    token: Prompt = "sks"
    pictures: Count | None = None
    augmentation: Literal["none", "flip", "crop"] = "none"
    prior_weight: NonNegative = 0.0

    @abstractmethod
    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        """Choose, or add, what moves in ``model``, a copy whose parameters are all frozen."""

    def expression(self, task: Concept) -> str:
        """Return what stands for the concept's words with ``template=token``."""
        return self.token

    def learned_words(self) -> str | None:
        """Return the words of a token that it adds to the tokenizer; None where it adds none."""
        return None

    def plan(self, task: Concept, budget: Budget) -> list[Stage]:
        return [Stage(self, task, budget.steps)]

    def texts(self) -> dict[str, str]:
        return {**super().texts(), f"{self.key}.token": self.token}

    def dry_open(self, model: DiffusionModel, task: Concept) -> None:
        self.open(model.copy(), task, 0).check(self.key)

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of update ``step`` (0 … ``total`` - 1)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        step, total = step - self.warmup, max(total - self.warmup, 1)
        if self.schedule == "cosine":
            return self.lr * (0.5 * (1 + math.cos(math.pi * step / total)))
        return self.lr * (1 - step / total) if self.schedule == "linear" else self.lr

    def check_task(self, task: Concept) -> None:
        count, lines = len(task.train), [f for f, prompts in task.prompts.items() if prompts]
        described = bool(task.train.described) or "description" in lines
        lacking = [family for family in self.families if family not in lines]
        for fine, key, value, reason in (
            (count, "scenario.train", 0, "has no training images; give at least one."),
            (len(task.reference), "scenario.reference", 0, "has no image to compare with."),
            (
                (self.pictures or 0) <= count,
                f"{self.key}.pictures",
                self.pictures,
                f"has {count} training images; take at most these, or null for all.",
            ),
            (
                not lacking,
                f"{self.key}.families",
                lacking,
                f"has prompts of the families {', '.join(lines)} only.",
            ),
            (
                described or self.template != "description",
                f"{self.key}.template",
                self.template,
                "has no captions and no prompts by description; use name or token.",
            ),
            (
                len(task.prior) or not self.prior_weight,
                f"{self.key}.prior_weight",
                self.prior_weight,
                "has no prior images; set 0 or give it some (prior: FOLDER).",
            ),
        ):
            if not fine:
                raise UserError(key, value, f"concept {task.name} {reason}")
