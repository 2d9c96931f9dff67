"""The training of every attacker on a text-to-image model: material, updates, snapshots, resume.

Random draws depend on (seed, concept, step) alone. So every model and every attacker sees the same
images, noise and timesteps, and a resumed attack continues bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.diffusion.options import AttackOptions, TrainingOptions, trained_parts
from lab.core.data import CaptionedImages, Concept
from lab.core.errors import Diverged, UserError
from lab.core.prompts import captions, spoken
from lab.core.seeding import generator
from lab.core.training import restore_state, state_tensors, train
from lab.core.types import Budget, Checkpoint, Trajectory
from lab.models.diffusion import DiffusionModel, Text

EVALUATIONS = 32  # loss terms of one evaluation, timesteps spread evenly over the schedule
# updates between two saves; snapshots are saved as well. What is saved never changes the result
SAVE_STEPS = 50
# batches whose mean loss is compared with the first one: a single loss depends too much on its
# timestep
WINDOW = 10
_CHUNK = 32  # rows of one evaluation pass
_CROPS = 4  # seeded crops of every image, encoded once like the image itself
_SMALLEST = 0.75  # side of the smallest crop


def variants(images: Tensor, augmentation: str, seed: int, *labels: object) -> list[Tensor]:
    """Return the images, then their mirror images (``flip``) or `_CROPS` seeded crops of each
    (``crop``).
    """
    if augmentation == "none":
        return [images]
    if augmentation == "flip":
        return [images, images.flip(-1)]
    g = generator(seed, "crops", *labels)
    side, augmented = images.shape[-1], [images]
    for _ in range(_CROPS):
        cut = []
        for image in images:
            share, top, left = torch.rand(3, generator=g).tolist()
            size = round(side * (_SMALLEST + (1 - _SMALLEST) * share))
            y, x = round(top * (side - size)), round(left * (side - size))
            part = image[None, :, y : y + size, x : x + size].float()
            cut.append(F.interpolate(part, (side, side), mode="bilinear", antialias=True)[0])
        augmented.append(torch.stack(cut).round().clamp(0, 255).to(torch.uint8))
    return augmented


class Draw(NamedTuple):
    """Latents ``z`` [b, c, h, w], their ``noise``, timesteps ``t`` [b] and the images' ``rows``."""

    z: Tensor
    noise: Tensor
    t: Tensor
    rows: list[int]


class Material(NamedTuple):
    """Images as latents, encoded once: ``mean`` and ``std`` [n, variants, c, h, w], and a caption
    each.
    """

    mean: Tensor
    std: Tensor
    captions: tuple[str, ...]

    @staticmethod
    def encode(model: DiffusionModel, images: Sequence[Tensor], texts: Sequence[str]) -> Material:
        """Encode ``images``, one tensor [n, 3, s, s] per variant."""
        means, stds = zip(*(model.posterior(variant) for variant in images), strict=True)
        return Material(torch.stack(means, 1), torch.stack(stds, 1), tuple(texts))

    def draw(self, batch: int, timesteps: int, g: torch.Generator) -> Draw:
        """Draw a random batch; an image repeats only where there are fewer than ``batch``."""
        n, shape = len(self.captions), (batch, *self.mean.shape[2:])
        few = batch > n
        rows = torch.randint(n, (batch,), generator=g) if few else torch.randperm(n, generator=g)
        rows = rows[:batch]
        variant = torch.randint(self.mean.shape[1], (batch,), generator=g)
        t = torch.randint(timesteps, (batch,), generator=g)
        spread, noise = (torch.randn(shape, generator=g).to(self.mean) for _ in range(2))
        z = self.mean[rows, variant] + self.std[rows, variant] * spread
        return Draw(z, noise, t.to(z.device), rows.tolist())

    def evenly(self, timesteps: int, g: torch.Generator) -> Draw:
        """Return a fixed evaluation: every image in turn, even timesteps, posterior means."""
        count = max(len(self.captions), EVALUATIONS)
        rows = torch.arange(count) % len(self.captions)
        t = ((torch.arange(count) + 0.5) * timesteps / count).long()
        z = self.mean[rows, 0]
        return Draw(z, torch.randn(z.shape, generator=g).to(z), t.to(z.device), rows.tolist())


class ConceptLearner:
    """One stage: what moves, its material and its optimizer.

    Args:
        model: a copy that the stage may change.
        steps: of the whole attack, for the schedule.
    """

    def __init__(
        self, attack: TrainingOptions, model: DiffusionModel, task: Concept, steps: int, seed: int
    ) -> None:
        self.attack, self.model, self.task, self.steps, self.seed = attack, model, task, steps, seed
        self.moving = attack.open(model, task, seed).check(attack.key)
        self.token = attack.expression(task)
        self.parameters = list(self.moving.parameters.values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        decay = attack.weight_decay
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self.parameters, lr=attack.lr, weight_decay=decay)
            if attack.optimizer == "adamw"
            else torch.optim.SGD(self.parameters, lr=attack.lr, weight_decay=decay, momentum=0.9)
        )
        self.images = task.train.pick(range(len(task.train))[: attack.pictures])
        augmented = variants(self.images.images, attack.augmentation, seed, task.name)
        self.train = self._material(self.images, augmented)
        self.test = self._material(task.reference, [task.reference.images])
        self.sources = {"attack": self.train}  # by the label of its random draws
        if attack.prior_weight:
            prior = Material.encode(model, [task.prior.images], task.prior.prompts)
            self.sources["attack prior"] = prior
        self.cached: dict[str, Text] = {}

    def _material(self, images: CaptionedImages, augmented: list[Tensor]) -> Material:
        lines = captions(self.task, images, self.attack.template, self.token)
        return Material.encode(self.model, augmented, lines)

    def _text(self, material: Material, rows: list[int]) -> Text:
        """Return the captions of ``rows``, encoded once where the text encoder does not move."""
        lines = [material.captions[row] for row in rows]
        if self.moving.text:
            return self.model.text(lines)
        new = [line for line in dict.fromkeys(lines) if line not in self.cached]
        if new:
            with torch.no_grad():
                encoded = self.model.text(new)
            self.cached |= {line: encoded[i : i + 1] for i, line in enumerate(new)}
        return Text.cat([self.cached[line] for line in lines])

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
        losses = self.model.loss(z, Text.cat(texts), noise, t)
        loss = concept = losses[:batch].mean()
        if len(drawn) > 1:
            loss = concept + attack.prior_weight * losses[batch:].mean()
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
    def evaluate(self, material: Material, label: str) -> float:
        """Return the mean loss over `Material.evenly`, equal in every model."""
        g = generator(self.seed, f"attack {label}", self.task.name)
        every, losses = material.evenly(self.model.timesteps, g), []
        for start in range(0, len(every.rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            text = self._text(material, every.rows[part])
            loss = self.model.loss(every.z[part], text, every.noise[part], every.t[part])
            losses.append(loss.double())
        return float(torch.cat(losses).mean())

    def prompts(self, attack: AttackOptions) -> dict[str, list[str]]:
        """Return the prompts that images are generated by, by family."""
        prompts = {family: self.task.prompts[family] for family in attack.families}
        if self.attack.template == "token":  # they speak of the token as training does
            prompts = {
                family: tuple(spoken(line, self.task.words, self.token) for line in lines)
                for family, lines in prompts.items()
            }
        count = attack.sampling.count
        return {k: [lines[i % len(lines)] for i in range(count)] for k, lines in prompts.items()}


class AttackTrainee:
    """The stages of one attack with its trajectory so far (a `lab.core.training.Trainee`)."""

    def __init__(
        self, attack: AttackOptions, model: DiffusionModel, task: Concept, seed: int, budget: Budget
    ) -> None:
        self.attack, self.model, self.seed, self.steps = attack, model.copy(), seed, budget.steps
        self.plan, self.snapshots = attack.plan(task, budget), frozenset(budget.snapshots())
        self.trajectory = Trajectory([], {})
        self.first = 0.0  # loss before the first update of the stage
        self.recent: list[float] = []  # losses of the last WINDOW batches
        self.since: list[float] = []  # losses of the batches since the last snapshot: sum, number
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
        self.words |= {k: v.clone() for k, v in weights.items() if k.startswith("embedding.")}
        parameters = {k: v.to("cpu", copy=True) for k, v in state.items() if ".parameter." in k}
        self.earlier |= parameters
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
        self.since = [self.since[0] + loss, self.since[1] + 1] if self.since else [loss, 1.0]
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
        train_loss = self.since[0] / self.since[1] if self.since else self.first
        self._check(train_loss, math.inf, step)
        self._check(loss, values["test_loss"][0] if step else math.inf, step)
        self.trajectory.steps.append(step)
        for name, value in (("train_loss", train_loss), ("test_loss", loss)):
            values.setdefault(name, []).append(value)
        sampling, samples = self.attack.sampling, self.trajectory.samples
        for family, prompts in self.learner.prompts(self.attack).items():
            # latents depend on (seed, concept, family) only
            latents = self.model.latents(sampling.count, self.seed, self.learner.task.name, family)
            images = self.model.generate(prompts, latents, sampling)[None]
            samples[family] = torch.cat([samples[family], images]) if step else images
        self.since = []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return parameters of all stages so far, the optimizer's state and the trajectory."""
        samples = {f"samples.{k}": v for k, v in self.trajectory.samples.items()}
        guard = {"first": self.first, "recent": self.recent, "since": self.since}
        trajectory = {"steps": self.trajectory.steps, "values": self.trajectory.values}
        return {**self.earlier, **self._state(), **samples}, {
            **trajectory,
            **guard,
            "stage": self.index,
        }

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from `state`: earlier stages are opened, filled in and closed again."""
        samples = _part(tensors, "samples")
        self.trajectory = Trajectory(values["steps"], values["values"], samples=samples)
        self.first, self.recent, self.since = values["first"], values["recent"], values["since"]
        for index in range(values["stage"] + 1):
            if index:
                self.close()
                self.learner = self._open(index)
            stage = _part(tensors, f"stage.{index}")
            restore_state(self.learner.parameters, self.learner.optimizer, stage)

    def info(self) -> dict[str, Any]:
        """Return what the record says of the attack; of the last stage where there are several."""
        options, moving = self.learner.attack, self.learner.moving
        names = ("optimizer", "lr", "schedule", "batch_size", "augmentation", "template")
        info = {name: getattr(options, name) for name in (*names, "prior_weight")}
        info |= {"attack": self.attack.name, "pictures": len(self.learner.images)}
        if options.template == "token":
            info["expression"] = self.learner.token
        size = sum(p.numel() for p in self.learner.parameters)
        prompts = self.learner.prompts(self.attack)
        return {**info, "parameters": size, "prompts": prompts, "form": moving.form, **moving.info}


def run(
    attack: AttackOptions,
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
    trainee = AttackTrainee(attack, model, task, seed, budget)
    try:
        train(
            trainee,
            budget.steps,
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
    trajectory.info, weights = trainee.info(), {}
    if trajectory.status == "ok":
        weights = trainee.learner.moving.weights()
    if weights and len(trainee.plan) > 1:
        trainee.close()
        weights, trajectory.info["form"] = trainee.words | _changed(model, trainee.model), "delta"
    if attack.keep_weights:
        trajectory.weights = {k: v.detach().clone().contiguous() for k, v in weights.items()}
    return trajectory


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def _changed(model: DiffusionModel, copy: DiffusionModel) -> dict[str, Tensor]:
    """Return the parameters whose values differ in ``copy``, under their own names."""
    changed = {}
    for part, net in trained_parts(copy).items():
        old = trained_parts(model)[part].state_dict()
        for name, value in net.state_dict().items():
            # learned words have enlarged one table
            if value.shape == old[name].shape and not torch.equal(value, old[name]):
                changed[f"{part}.{name}"] = value
    return changed
