"""The training of every attacker on a text-to-image model: stages, snapshots, divergence, resume.

Random draws depend on (seed, concept, step) alone. So every model and every attacker sees the same
images, noise and timesteps, and a resumed attack continues bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attacks.diffusion.data import Draw, Material, variants
from attacks.diffusion.options import AttackOptions, TrainingOptions
from lab.core.captions import captions, spoken
from lab.core.data import CaptionedImages, Concept
from lab.core.errors import Diverged, UserError
from lab.core.optimizer_state import restore_state, state_tensors
from lab.core.seeding import generator
from lab.core.training import train
from lab.core.types import Budget, Checkpoint, Trajectory
from lab.models.diffusion import DiffusionModel, Text

# updates between two saves; snapshots are saved as well. What is saved never changes the result
SAVE_STEPS = 50
# batches whose mean loss is compared with the first one: a single loss depends too much on its
# timestep
WINDOW = 10
_CHUNK = 32  # rows of one evaluation pass


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
        images = task.train.pick(range(len(task.train))[: attack.pictures])
        self.train = self._material(
            images, variants(images.images, attack.augmentation, seed, task.name)
        )
        self.test = self._material(task.reference, [task.reference.images])
        self.prior = (
            Material.of(model, [task.prior.images], task.prior.prompts)
            if attack.prior_weight
            else None
        )
        self.cached: dict[str, Text] = {}

    def _material(self, images: CaptionedImages, augmented: list[Tensor]) -> Material:
        written = captions(self.task, images, self.attack.template, self.token)
        return Material.of(self.model, augmented, written)

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

    def _loss(self, material: Material, drawn: Draw) -> Tensor:
        """Return the loss of every row of ``drawn``, [b]."""
        return self.model.loss(drawn.z, self._text(material, drawn.rows), drawn.noise, drawn.t)

    def advance(self, step: int) -> float:
        """Do update ``step`` of the attack; return the loss on the concept's batch before it."""
        attack, model = self.attack, self.model
        g = generator(self.seed, "attack", self.task.name, step)
        drawn = self.train.draw(attack.batch_size, model.timesteps, g)
        if self.prior is None:
            loss = concept = self._loss(self.train, drawn).mean()
        else:
            g = generator(self.seed, "attack prior", self.task.name, step)
            prior = self.prior.draw(attack.batch_size, model.timesteps, g)
            text = Text.cat(
                [self._text(self.train, drawn.rows), self._text(self.prior, prior.rows)]
            )
            z, noise, t = (
                torch.cat(pair)
                for pair in ((drawn.z, prior.z), (drawn.noise, prior.noise), (drawn.t, prior.t))
            )
            losses = model.loss(z, text, noise, t)
            concept = losses[: attack.batch_size].mean()
            loss = concept + attack.prior_weight * losses[attack.batch_size :].mean()
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()
        if all(parameter.grad is None for parameter in self.parameters):
            reason = "the loss depends on none of them; `open` must put them into the model."
            raise UserError(attack.key, list(self.moving.parameters), reason)
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
        every = material.evenly(self.model.timesteps, g)
        losses = []
        for start in range(0, len(every.rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            chunk = Draw(every.z[part], every.noise[part], every.t[part], every.rows[part])
            losses.append(self._loss(material, chunk).double())
        return float(torch.cat(losses).mean())

    def prompts(self, attack: AttackOptions) -> dict[str, list[str]]:
        """Return the prompts that images are generated by, by family."""
        prompts = {}
        for family in attack.families:
            lines = self.task.prompts[family]
            if self.attack.template == "token":
                lines = tuple(spoken(line, self.task.words, self.token) for line in lines)
            prompts[family] = [lines[i % len(lines)] for i in range(attack.sampling.count)]
        return prompts

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and optimizer state."""
        return state_tensors(self.parameters, self.optimizer)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`."""
        restore_state(self.parameters, self.optimizer, tensors)


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
        self.index, stage = index, self.plan[index]
        return ConceptLearner(stage.training, self.model, stage.task, self.steps, self.seed)

    def close(self) -> None:
        """End the stage: what it trained becomes a plain part of the model."""
        for name, value in self.learner.tensors().items():
            if name.startswith("parameter."):
                self.earlier[f"stage.{self.index}.{name}"] = value.to("cpu", copy=True)
        for name, value in self.learner.moving.weights().items():
            if name.startswith("embedding."):
                self.words[name] = value.clone()
        self.learner.moving.close()

    def step(self, step: int) -> None:
        """Do update ``step`` of the attack, with the snapshot that is due after it.

        Raises:
            Diverged: the loss left the finite range or exploded.
        """
        begins = step in (0, self.plan[self.index].stop)
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
            raise Diverged("the loss left the finite range or exploded", step)

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
        tensors = {f"stage.{self.index}.{k}": v for k, v in self.learner.tensors().items()}
        samples = {f"samples.{k}": v for k, v in self.trajectory.samples.items()}
        guard = {"first": self.first, "recent": self.recent, "since": self.since}
        trajectory = {"steps": self.trajectory.steps, "values": self.trajectory.values}
        return {**self.earlier, **tensors, **samples}, {**trajectory, **guard, "stage": self.index}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from `state`: earlier stages are opened, filled in and closed again."""
        self.trajectory = Trajectory(values["steps"], values["values"])
        self.trajectory.samples = _part(tensors, "samples")
        self.first, self.recent, self.since = values["first"], values["recent"], values["since"]
        for index in range(values["stage"] + 1):
            if index:
                self.close()
                self.learner = self._open(index)
            self.learner.restore(_part(tensors, f"stage.{index}"))

    def info(self) -> dict[str, Any]:
        """Return what the record says of the attack; of the last stage where there are several."""
        options = self.learner.attack
        names = ("optimizer", "lr", "schedule", "batch_size", "augmentation", "template")
        info = {name: getattr(options, name) for name in (*names, "prior_weight")}
        info |= {"attack": self.attack.name, "pictures": len(self.learner.train)}
        if options.template == "token":
            info["expression"] = self.learner.token
        info["parameters"] = sum(p.numel() for p in self.learner.parameters)
        info["prompts"] = self.learner.prompts(self.attack)
        return {**info, "form": self.learner.moving.form, **self.learner.moving.info}


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
    diverged = False
    try:
        train(
            trainee,
            budget.steps,
            label=f"{attack.name} on {task.name}",
            checkpoint=checkpoint,
            save_every=SAVE_STEPS,
            save_after=trainee.snapshots,
        )
    except Diverged as error:
        if not trainee.trajectory.steps:
            raise Diverged("the loss is not finite before the first update", 0) from error
        diverged = True
    trajectory = trainee.trajectory
    trajectory.info = trainee.info()
    if diverged:
        trajectory.status = "diverged"
        return trajectory
    weights = trainee.learner.moving.weights()
    if len(trainee.plan) > 1:
        trainee.close()
        weights = trainee.words | _changed(model, trainee.model)
        trajectory.info["form"] = "delta"
    if attack.keep_weights:
        trajectory.weights = {k: v.detach().clone().contiguous() for k, v in weights.items()}
    return trajectory


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def _changed(model: DiffusionModel, copy: DiffusionModel) -> dict[str, Tensor]:
    """Return the parameters whose values differ in ``copy``, under their own names."""
    parts = {"unet": (model.unet, copy.unet)}
    for i, pair in enumerate(zip(model.text_encoders, copy.text_encoders, strict=True)):
        parts[f"text_encoder_{i + 1}" if i else "text_encoder"] = pair
    changed = {}
    for prefix, (before, after) in parts.items():
        old = before.state_dict()
        for name, value in after.state_dict().items():
            # learned words have enlarged one table
            if value.shape == old[name].shape and not torch.equal(value, old[name]):
                changed[f"{prefix}.{name}"] = value
    return changed
