"""Attackers of text-to-image models: what a method provides, the options that all share, and how
an attack is trained, measured and searched.

Random draws depend on (seed, concept, step) alone. So every model and every attacker sees the same
images, noise and timesteps, and a resumed attack continues bit for bit.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from attacks import optimizers
from attacks.diffusion.material import Material, variants
from attacks.search import Search, Trials, run_trials
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
    user_error,
)
from lab.core.data import CaptionedImages, Concept, ConceptCase, Kind, Sampling
from lab.core.errors import Diverged, UserError
from lab.core.prompts import captions, in_turn, spoken
from lab.core.seeding import generator
from lab.core.slugs import setting_name
from lab.core.training import (
    Schedule,
    part_of,
    restore_state,
    schedule_factor,
    state_tensors,
    train,
)
from lab.core.types import Attacker, Budget, Checkpoint, Trajectory, changed_tensors
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion import Text as EncodedText
from lab.models.symmetries import canonicalize

NOT_OWN_WEIGHTS = "controlnet, ip_adapter and a donor's adapters are no model to train further"
HELD_OUT = 0.25  # share of the training images that trials of a search are scored by
# updates between two saves; snapshots are saved as well. What is saved never changes the result
SAVE_STEPS = 50
# batches whose mean loss is compared with the first one: a single loss depends too much on its
# timestep
WINDOW = 10
_CHUNK = 32  # rows of one evaluation pass
# of names of weights
_PREFIXES = (
    *("unet.", "text_encoder.", "text_encoder_2.", "embedding."),
    *("controlnet.", "image_proj.", "ip_adapter."),
)


@dataclass
class Moving:
    """What an attacker trains on its copy of the model.

    Attributes:
        parameters: by name.
        convert: gives from ``parameters`` what a user would load, see `attacks.diffusion.export`.
        close: makes the change a plain part of the copy, so that another stage can build on it.
        text: whether encoded prompts change while it trains.
        move: takes the place of a step along the gradient: called with the number of steps done and
            of all steps.
        condition: gets the latents [n, c, s, s] whose images the model is given next, and whether
            guidance asks for each of them twice.
        info: facts for the record; with a complete U-Net its ``unet_config``.
        results: gives the facts that training decides.
    """

    parameters: dict[str, nn.Parameter]
    convert: Callable[[dict[str, nn.Parameter]], Mapping[str, Tensor]] = dict
    close: Callable[[], None] = lambda: None
    text: bool = False
    move: Callable[[int, int], None] | None = None
    condition: Callable[[Tensor, bool], None] = lambda latents, guided: None
    info: dict[str, Any] = field(default_factory=dict)
    results: Callable[[], dict[str, Any]] = dict

    def weights(self) -> dict[str, Tensor]:
        """Return the weights as they are now."""
        return dict(self.convert(self.parameters))

    @property
    def form(self) -> str:
        """How `attacks.diffusion.export` writes the weights: ``lora`` | ``unet`` | ``controlnet`` |
        ``ip_adapter`` | ``delta``.
        """
        if any(".lora_" in name for name in self.parameters):
            return "lora"
        if any(name.startswith("ip_adapter.") for name in self.parameters):
            return "ip_adapter"
        whole = [form for form in ("unet", "controlnet") if f"{form}_config" in self.info]
        return whole[0] if whole else "delta"

    def check(self, key: str) -> Self:
        """Check that the attacker ``key`` can train this and that its result can be written.

        Raises:
            UserError: no parameters, weights by other names, or half precision, in which small
                updates are lost.
        """
        if not self.parameters:
            reason = "`open` names nothing to train in `Moving.parameters`."
            raise UserError(key, "no parameters", reason)
        for name in self.weights():
            if not name.startswith(_PREFIXES):
                reason = f"names of weights begin with one of {', '.join(_PREFIXES)}"
                raise UserError(key, name, reason)
        dtypes = {p.dtype for p in self.parameters.values()} & {torch.float16, torch.bfloat16}
        if dtypes:
            reason = "attackers other than lora train in float32: use fp32, or attacks=[lora]."
            raise UserError("backbone.dtype", dtypes.pop(), reason)
        return self


def trained_parts(model: DiffusionModel) -> dict[str, nn.Module]:
    """Return the parts that an attacker may train, by the names that diffusers gives them."""
    encoders = {f"text_encoder_{i}": net for i, net in enumerate(model.text_encoders[1:], start=2)}
    return {"unet": model.unet, "text_encoder": model.text_encoders[0], **encoders}


def check_layers(
    own: Mapping[str, nn.Parameter], other: Mapping[str, nn.Parameter], key: str, path: str
) -> None:
    """Check that another model has the layers of the attacked one.

    Raises:
        UserError: it has not; names the config key ``key`` and the model's ``path``.
    """
    if {k: p.shape for k, p in own.items()} != {k: p.shape for k, p in other.items()}:
        fix = "has other layers than the attacked model; take one of the same architecture."
        raise UserError(key, path, fix)


def open_unet(model: DiffusionModel) -> Moving:
    """Let all of the U-Net move.

    Weights: ``unet.NAME``, complete; ``info`` carries the config they load with.
    """
    return Moving(
        {f"unet.{name}": parameter for name, parameter in model.unet.named_parameters()},
        lambda _: {f"unet.{k}": v for k, v in model.unet.state_dict().items()},
        info={"unet_config": json.loads(model.unet.to_json_string())},
    )


class Phase(NamedTuple):
    """A part of an attack: who trains on which concept until which step."""

    training: ConceptAttack
    task: Concept
    stop: int


@config
class ConceptBase(Attacker):
    """An attacker on a text-to-image model.

    Args:
        name: key under ``attacks``.
        explosion: an attack whose loss exceeds this multiple of its first value has diverged.
        families: prompt families that images are generated for at every snapshot; empty = none.
        sampling: how they are generated; None = the defaults of `lab.core.data.Sampling`.
        keep_weights: whether the trajectory holds the final weights.
        search: None, or a budgeted search for the best options (`attacks.search.Search`).
    """

    name: Text
    explosion: Annotated[float, Field(strict=True, gt=1)] = 10.0
    families: Names = ("name",)
    sampling: Annotated[Sampling, BeforeValidator(lambda value: value or {})] = Sampling()
    keep_weights: Flag = True
    search: Search | None = None

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    def __post_init__(self) -> None:
        """Check that the attacker takes every value of the search's space."""
        for option, values in self.search.space.items() if self.search else ():
            for value in values:
                self.varied({option: value})

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

    def variants(self) -> Mapping[str, tuple[Self, dict[str, Any]]]:
        """Return one attack per setting of a search without ``steps``."""
        if self.search is None or self.search.steps is not None:
            return {}
        settings = {setting_name(self.name, s): s for s in self.search.settings(0, "")}
        return {
            name: (replace(self.varied(s), name=name), {**s, "name": name, "search": None})
            for name, s in settings.items()
        }

    @abstractmethod
    def plan(self, task: Concept, budget: Budget) -> list[Phase]:
        """Return the stages of the attack, in order."""

    @abstractmethod
    def images_per_step(self) -> int:
        """Return the batch size, without prior images."""

    def check_budget(self, budget: Budget) -> None:
        settings = [] if self.search is None else self.search.combinations()
        for attack in [self, *map(self.varied, settings)]:
            budget.in_updates(attack.images_per_step())

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

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        """Check every concept with every setting that a search may try, before anything runs."""
        tried = [{}, *(self.search.combinations() if self.search else ())]
        for task in (task for case in cases for task in case.tasks):
            for setting in tried:
                self.varied(setting).check_task(task)
            if self.search is not None:
                self.held_out(task, self.search, 0)

    def held_out(self, task: Concept, search: Search, seed: int) -> Concept:
        """Split the attacker's training images at random into ``train`` and ``reference``.

        Raises:
            UserError: fewer than two training images.
        """
        own = self.images if isinstance(self, ConceptAttack) else None
        counts = search.space.get("images", (own,))
        n = len(range(len(task.train))[: None if None in counts else max(counts)])
        if n < 2:
            reason = f"concept {task.name} has {n} training images; a search needs 2."
            raise UserError(f"{self.key}.search", search.mode, reason)
        order = torch.randperm(n, generator=generator(seed, "attack search split", task.name))
        cut = max(1, round(HELD_OUT * n))
        train, reference = (task.train.pick(rows.tolist()) for rows in (order[cut:], order[:cut]))
        return replace(task, train=train, own=task.train.pick([]), reference=reference)

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

        With a search, ``info["search"]`` holds every trial with its score (None: diverged).

        Raises:
            UserError: a concept that cannot be trained on.
            Diverged: the loss is not finite before the first update.
        """
        self.check_task(task)
        search = self.search
        if search is None:
            return run(self, model, task, seed=seed, budget=budget, checkpoint=checkpoint)
        if search.steps is None:
            reason = "runs every setting as an attack of its own; call those of `variants`."
            raise UserError(f"{self.key}.search.steps", None, reason)
        split, trial_budget = self.held_out(task, search, seed), Budget(search.steps, 1, at=())
        settings = search.settings(seed, task.name)

        def trial(scores: Trials) -> float | None:
            tried = replace(
                self.varied(settings[len(scores)]),
                families=("name",) if search.score else (),
                keep_weights=False,
            )
            trajectory = run(tried, model, split, seed=seed, budget=trial_budget, checkpoint=None)
            if trajectory.status != "ok":
                return None
            if search.score is None:
                return trajectory.values["test_loss"][-1]
            score = float(search.score(trajectory.samples["name"][-1], split.reference))
            return -score if math.isfinite(score) else None

        scores, checkpoint = run_trials(len(settings), trial, checkpoint)
        good = [(score, i) for i, score in enumerate(scores) if score is not None]
        best = settings[min(good)[1]] if good else {}
        trajectory = run(
            self.varied(best), model, task, seed=seed, budget=budget, checkpoint=checkpoint
        )
        measure = "held_out_loss"
        if search.score is not None:
            measure = f"minus {getattr(search.score, '__name__', 'the given score')}"
        trials = [{"setting": s, "score": score} for s, score in zip(settings, scores, strict=True)]
        trajectory.info["search"] = {
            "mode": search.mode,
            "steps": search.steps,
            "score": measure,
            "trials": trials,
            "best": best,
        }
        return trajectory


@config
class ConceptAttack(ConceptBase):
    """Fine-tunes a copy of a text-to-image model on ``task.train``; a subclass says what moves
    (`open`).

    Args:
        optimizer: ``adamw`` | ``sgd`` | ``muon`` | ``soap``, see `attacks.optimizers.build`.
        lr: learning rate.
        weight_decay: of the optimizer.
        schedule: ``constant`` | ``cosine`` | ``linear``, after ``warmup`` steps of a linear rise.
        warmup: steps.
        batch_size: images per step; as many prior images come on top.
        clip: largest norm of the gradient; None = no limit.
        template: captions of the training images: ``name`` | ``token`` | ``description``
            (`lab.core.prompts.captions`). With ``token`` the prompts of every family name the
            token too: in place of the concept's words, or in front where a prompt lacks them.
        token: what stands for the concept with ``template=token``.
        images: how many of the training images are used; None = all.
        augmentation: ``none`` | ``flip`` | ``crop``.
        prior_weight: weight of the loss on ``task.prior`` (prior preservation, arXiv 2208.12242); 0
            = off.
        canonicalize: first undo what a change of attention weights that leaves the function equal
            can do to training (`lab.models.symmetries.canonicalize`).

    The other options are those of `ConceptBase`.
    """

    optimizer: optimizers.Name = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    schedule: Schedule = "constant"
    warmup: Index = 0
    batch_size: Count = 8
    clip: Positive | None = 1.0
    template: Literal["name", "token", "description"] = "name"
    token: Prompt = "sks"
    images: Count | None = None
    augmentation: Literal["none", "flip", "crop"] = "none"
    prior_weight: NonNegative = 0.0
    canonicalize: Flag = False

    @model_validator(mode="after")
    def _check_canonicalize(self) -> Self:
        if self.canonicalize and not self.trains_own_weights:
            raise ValueError(f"canonicalize must be false: {NOT_OWN_WEIGHTS}")
        return self

    @property
    def trains_own_weights(self) -> bool:
        """Whether the result is a model of the same layers, which can be trained further."""
        return True

    def trained_model(self, model: DiffusionModel) -> DiffusionModel:
        """Return the model that is trained: ``model``, the attacked copy, or another one whose
        `Moving.parameters` are then put into ``model``.
        """
        return model

    @abstractmethod
    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        """Choose, or add, what moves in ``model``, a copy whose parameters are all frozen."""

    def expression(self, task: Concept) -> str:
        """Return what stands for the concept's words with ``template=token``."""
        return self.token

    def learned_words(self) -> str | None:
        """Return the words of a token that it adds to the tokenizer; None where it adds none."""
        return None

    def varied(self, setting: Mapping[str, Any]) -> Self:
        key = f"{self.key}.search.space"
        for option in setting.keys() & {f.name for f in fields(ConceptBase)}:
            raise UserError(f"{key}.{option}", setting[option], "cannot be searched.")
        try:
            return replace(self, **setting, search=None)
        except ValidationError as error:
            raise user_error(error, key, type(self)) from None

    def plan(self, task: Concept, budget: Budget) -> list[Phase]:
        return [Phase(self, task, budget.steps)]

    def images_per_step(self) -> int:
        return self.batch_size

    def texts(self) -> dict[str, str]:
        return {**super().texts(), f"{self.key}.token": self.token}

    def fingerprint(self) -> str:
        return optimizers.package_version(self.optimizer)

    def dry_open(self, model: DiffusionModel, task: Concept) -> None:
        self.open(model.copy(), task, 0).check(self.key)

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of update ``step`` (0 … ``total`` - 1)."""
        return self.lr * schedule_factor(self.schedule, step, total, self.warmup)

    def check_task(self, task: Concept) -> None:
        count, lines = len(task.train), [f for f, prompts in task.prompts.items() if prompts]
        described = bool(task.train.described) or "description" in lines
        lacking = [family for family in self.families if family not in lines]
        for fine, key, value, reason in (
            (count, "scenario.train", 0, "has no training images; give at least one."),
            (len(task.reference), "scenario.reference", 0, "has no image to compare with."),
            (
                (self.images or 0) <= count,
                f"{self.key}.images",
                self.images,
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


class ConceptLearner:
    """One stage: what moves, its material and its optimizer.

    Args:
        model: a copy that the stage may change.
        steps: of the whole attack, for the schedule.
    """

    def __init__(
        self, attack: ConceptAttack, model: DiffusionModel, task: Concept, steps: int, seed: int
    ) -> None:
        if attack.canonicalize:
            canonicalize(model.unet)
        self.attack, self.task, self.steps, self.seed = attack, task, steps, seed
        self.model = attack.trained_model(model)
        self.moving = attack.open(self.model, task, seed).check(attack.key)
        self.receiver = attack.open(model, task, seed) if self.model is not model else None
        self.token = attack.expression(task)
        self.parameters = list(self.moving.parameters.values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = optimizers.build(
            attack.optimizer, self.parameters, lr=attack.lr, weight_decay=attack.weight_decay
        )
        self.images = task.train.pick(range(len(task.train))[: attack.images])
        augmented = variants(self.images.images, attack.augmentation, seed, task.name)
        self.train = self._material(self.images, augmented)
        self.test = self._material(task.reference, [task.reference.images])
        self.sources = {"attack": self.train}  # by the label of its random draws
        if attack.prior_weight:
            prior = Material.encode(model, [task.prior.images], task.prior.prompts)
            self.sources["attack prior"] = prior
        self.cached: dict[str, EncodedText] = {}

    def _material(self, images: CaptionedImages, augmented: list[Tensor]) -> Material:
        lines = captions(self.task, images, self.attack.template, self.token)
        return Material.encode(self.model, augmented, lines)

    def _text(self, material: Material, rows: list[int]) -> EncodedText:
        """Return the captions of ``rows``, encoded once where the text encoder does not move."""
        lines = [material.captions[row] for row in rows]
        if self.moving.text:
            return self.model.text(lines)
        new = [line for line in dict.fromkeys(lines) if line not in self.cached]
        if new:
            with torch.no_grad():
                encoded = self.model.text(new)
            self.cached |= {line: encoded[i : i + 1] for i, line in enumerate(new)}
        return EncodedText.cat([self.cached[line] for line in lines])

    def advance(self, step: int) -> float:
        """Do update ``step`` of the attack; return the loss on the concept's batch before it."""
        attack, batch = self.attack, self.attack.batch_size
        drawn, texts = [], []
        for label, material in self.sources.items():
            g = generator(self.seed, label, self.task.name, step)
            drawn.append(material.draw(batch, self.model.timesteps, g))
            texts.append(self._text(material, drawn[-1].rows))
        parts = zip(*((draw.z, draw.noise, draw.t) for draw in drawn), strict=True)
        z, noise, t = (torch.cat(part) for part in parts)
        self.moving.condition(z, False)
        with torch.set_grad_enabled(self.moving.move is None):
            losses = self.model.loss(z, EncodedText.cat(texts), noise, t)
        loss = concept = losses[:batch].mean()
        if len(drawn) > 1:
            loss = concept + attack.prior_weight * losses[batch:].mean()
        if self.moving.move is not None:
            self.moving.move(step + 1, self.steps)
            return float(concept.detach())
        if not loss.requires_grad:
            reason = "the loss depends on none of them; `open` must put them into the model."
            raise UserError(attack.key, list(self.moving.parameters), reason)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if attack.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, attack.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = attack.rate(step, self.steps)
        self.optimizer.step()
        return float(concept.detach())

    @torch.no_grad()
    def transplant(self) -> None:
        """Put what was trained on another model into the attacked one."""
        if self.receiver is not None:
            for name, parameter in self.receiver.parameters.items():
                parameter.copy_(self.moving.parameters[name])

    @torch.no_grad()
    def evaluate(self, material: Material, label: str) -> float:
        """Return the mean loss over `Material.evenly`, equal in every model."""
        g = generator(self.seed, f"attack {label}", self.task.name)
        every, losses = material.evenly(self.model.timesteps, g), []
        for start in range(0, len(every.rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            text = self._text(material, every.rows[part])
            self.moving.condition(every.z[part], False)
            loss = self.model.loss(every.z[part], text, every.noise[part], every.t[part])
            losses.append(loss.double())
        return float(torch.cat(losses).mean())

    def prompts(self, attack: ConceptBase) -> dict[str, list[str]]:
        """Return the prompts that images are generated by, by family."""
        prompts = {family: self.task.prompts[family] for family in attack.families}
        if self.attack.template == "token":  # they name the token as training does
            prompts = {
                family: tuple(spoken(line, self.task.words, self.token) for line in lines)
                for family, lines in prompts.items()
            }
        return {k: in_turn(lines, attack.sampling.count) for k, lines in prompts.items()}


class AttackTrainee:
    """The stages of one attack with its trajectory so far (a `lab.core.training.Trainee`)."""

    def __init__(
        self, attack: ConceptBase, model: DiffusionModel, task: Concept, seed: int, budget: Budget
    ) -> None:
        self.attack, self.model, self.seed, self.steps = attack, model.copy(), seed, budget.steps
        self.plan, self.snapshots = attack.plan(task, budget), frozenset(budget.snapshots())
        self.trajectory = Trajectory([], {})
        self.first = 0.0  # loss before the first update of the stage
        self.recent: list[float] = []  # losses of the last WINDOW batches
        self.since: list[float] = []  # losses of the batches since the last snapshot
        self.earlier: dict[str, Tensor] = {}  # parameters that earlier stages ended with
        self.words: dict[str, Tensor] = {}  # that earlier stages have learned
        self.learner = self._open(0)

    def _open(self, index: int) -> ConceptLearner:
        self.index, (training, task, self.stop) = index, self.plan[index]
        return ConceptLearner(training, self.model, task, self.steps, self.seed)

    def _state(self) -> dict[str, Tensor]:
        tensors = state_tensors(self.learner.parameters, self.learner.optimizer)
        return {f"stage.{self.index}.{name}": value for name, value in tensors.items()}

    def close(self) -> None:
        """End the stage: what it trained becomes a plain part of the model."""
        weights, state = self.learner.moving.weights(), self._state()
        self.words |= {
            k: v.detach().clone() for k, v in weights.items() if k.startswith("embedding.")
        }
        self.earlier |= {k: v.to("cpu", copy=True) for k, v in state.items() if ".parameter." in k}
        self.learner.moving.close()

    def step(self, step: int) -> None:
        """Do update ``step`` of the attack, with the snapshot that is due after it.

        Raises:
            Diverged: the loss left the finite range or exploded.
        """
        begins = step in (0, self.stop)
        if begins and step:
            self.close()
            self.learner = self._open(self.index + 1)
        if begins:  # other images have other losses: they explode from where they begin
            self.first, self.recent = self.learner.evaluate(self.learner.train, "train"), []
        if step == 0:
            self._measure(0)
        loss = self.learner.advance(step)
        self.recent = [*self.recent, loss][-WINDOW:]
        self.since.append(loss)
        if len(self.recent) == WINDOW:
            self._check(sum(self.recent) / WINDOW, self.first, step)
        self._check(loss, math.inf, step)
        if step + 1 in self.snapshots:
            self._measure(step + 1)

    def _check(self, loss: float, first: float, step: int) -> None:
        if not math.isfinite(loss) or loss > self.attack.explosion * first:
            when = "exploded" if self.trajectory.steps else "is not finite before the first update"
            raise Diverged(f"the loss {when}", step)

    def _measure(self, step: int) -> None:
        """Append a snapshot, unless the loss has left the finite range or exploded."""
        loss, values = self.learner.evaluate(self.learner.test, "test"), self.trajectory.values
        train_loss = sum(self.since) / len(self.since) if self.since else self.first
        self._check(train_loss, math.inf, step)
        self._check(loss, values["test_loss"][0] if step else math.inf, step)
        self.trajectory.steps.append(step)
        for name, value in (("train_loss", train_loss), ("test_loss", loss)):
            values.setdefault(name, []).append(value)
        self.learner.transplant()
        sampling, samples = self.attack.sampling, self.trajectory.samples
        means = self.learner.train.mean[:, 0]
        rows = torch.arange(sampling.count) % len(means)
        self.learner.moving.condition(means[rows], sampling.guided)
        for family, prompts in self.learner.prompts(self.attack).items():
            # latents depend on (seed, concept, family) only
            latents = self.model.latents(sampling.count, self.seed, self.learner.task.name, family)
            images = self.model.generate(prompts, latents, sampling)[None]
            samples[family] = torch.cat([samples[family], images]) if step else images
        self.since = []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return parameters of all stages so far, the optimizer's state and the trajectory."""
        samples = {f"samples.{k}": v for k, v in self.trajectory.samples.items()}
        return {**self.earlier, **self._state(), **samples}, {
            "steps": self.trajectory.steps,
            "values": self.trajectory.values,
            "first": self.first,
            "recent": self.recent,
            "since": self.since,
            "stage": self.index,
        }

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from `state`: earlier stages are opened, filled in and closed again."""
        samples = part_of(tensors, "samples.")
        self.trajectory = Trajectory(values["steps"], values["values"], samples=samples)
        self.first, self.recent, self.since = values["first"], values["recent"], values["since"]
        for index in range(values["stage"] + 1):
            if index:
                self.close()
                self.learner = self._open(index)
            stage = part_of(tensors, f"stage.{index}.")
            restore_state(self.learner.parameters, self.learner.optimizer, stage)

    def info(self) -> dict[str, Any]:
        """Return what the record says of the attack; of the last stage where there are several."""
        options, moving = self.learner.attack, self.learner.moving
        training = ("optimizer", "lr", "schedule", "batch_size", "augmentation", "prior_weight")
        return {
            **({name: getattr(options, name) for name in training} if moving.move is None else {}),
            "template": options.template,
            "attack": self.attack.name,
            "images": len(self.learner.images),
            **({"expression": self.learner.token} if options.template == "token" else {}),
            "parameters": sum(p.numel() for p in self.learner.parameters),
            "prompts": self.learner.prompts(self.attack),
            "form": moving.form,
            **moving.info,
            **moving.results(),
        }


def run(
    attack: ConceptBase,
    model: DiffusionModel,
    task: Concept,
    *,
    seed: int,
    budget: Budget,
    checkpoint: Checkpoint | None,
) -> Trajectory:
    """Train a copy of ``model`` along ``budget`` and measure at its snapshots.

    ``train_loss`` is the mean over the batches since the snapshot before (at step 0 over a fixed
    draw of all training images), ``test_loss`` the loss on ``task.reference`` at fixed timesteps
    and noise.

    Returns:
        the trajectory. Where numbers blow up it ends there with status ``diverged`` and without
        weights.

    Raises:
        UserError: a model of half precision.
        Diverged: the loss is not finite before the first update.
    """
    batch = attack.images_per_step()
    updates = budget.in_updates(batch)
    trainee = AttackTrainee(attack, model, task, seed, updates)
    try:
        train(
            trainee,
            updates.steps,
            label=f"{attack.name} on {task.name}",
            checkpoint=checkpoint,
            save_every=SAVE_STEPS,
            save_after=trainee.snapshots,
        )
    except Diverged:
        if not trainee.trajectory.steps:
            raise
        trainee.trajectory.status = "diverged"
    trajectory = trainee.trajectory
    if budget.unit == "images":
        trajectory.steps = [step * batch for step in trajectory.steps]
    trajectory.info, weights = trainee.info(), {}
    if trajectory.status == "ok":
        weights = trainee.learner.moving.weights()
    if weights and (len(trainee.plan) > 1 or trainee.learner.attack.canonicalize):
        trainee.close()
        weights, trajectory.info["form"] = trainee.words | _changed(model, trainee.model), "delta"
    if attack.keep_weights:
        trajectory.weights = {k: v.detach().clone().contiguous() for k, v in weights.items()}
    return trajectory


def _changed(model: DiffusionModel, copy: DiffusionModel) -> dict[str, Tensor]:
    """Return the parameters whose values differ in ``copy``, under their own names."""
    parts = trained_parts(model)
    changed = {}
    for part, net in trained_parts(copy).items():
        old = parts[part].state_dict()
        for name, value in changed_tensors(parts[part], net).items():
            if value.shape == old[name].shape:  # learned words have enlarged one table
                changed[f"{part}.{name}"] = value
    return changed
