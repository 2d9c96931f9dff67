"""The training loop of every attacker on a text-to-image model: stages, snapshots, divergence,
resume.

Random draws depend on (seed, concept, step) alone. So every model and every attacker sees the same
pictures, noise and timesteps, and a resumed attack continues bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attacks.diffusion.attack import ConceptAttack, ConceptBase, check_moving
from attacks.diffusion.data import Draw, Material, prompts, variants
from lab.core.captions import captions
from lab.core.data import CaptionedImages, Concept, Sampling
from lab.core.errors import Diverged, UserError
from lab.core.optimizer_state import restore_state, state_tensors
from lab.core.progress import progress
from lab.core.seeding import generator
from lab.core.types import Budget, Checkpoint, Trajectory
from lab.models.diffusion import DiffusionModel, Text

# updates between two saves; snapshots are saved as well. What is saved never changes the result
SAVE_STEPS = 50
# batches whose mean loss is held against the first one: a single loss depends too much on its
# timestep
WINDOW = 10
_CHUNK = 32  # rows of one evaluation pass


def _first(pictures: CaptionedImages, count: int | None) -> CaptionedImages:
    return pictures if count is None else pictures.pick(range(len(pictures))[:count])


def _kept(value: Tensor) -> Tensor:
    """A copy in main memory, so that a checkpoint does not double what the accelerator holds."""
    return value.detach().to("cpu", copy=True).contiguous()


class Learner:
    """One stage: what moves, its material and its optimizer. ``model`` is a copy that the stage may
    change.
    """

    def __init__(
        self, attack: ConceptAttack, model: DiffusionModel, task: Concept, steps: int, seed: int
    ) -> None:
        self.attack, self.model, self.task, self.steps, self.seed = attack, model, task, steps, seed
        self.moving = attack.open(model, task, seed)
        self.parameters = check_moving(attack.key, self.moving)
        self.template, self.token = attack.template, attack.expression(task)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = self._optimizer()
        train = _first(task.train, attack.pictures)
        self.train = self._material(
            train, variants(train.images, attack.augmentation, seed, task.name)
        )
        self.test = self._material(task.reference, [task.reference.images])
        prior = [task.prior.images]
        self.prior = Material.of(model, prior, task.prior.prompts) if attack.prior_weight else None
        self.cached: dict[str, Text] = {}

    def _material(self, pictures: CaptionedImages, images: list[Tensor]) -> Material:
        return Material.of(
            self.model, images, captions(self.task, pictures, self.template, self.token)
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"lr": self.attack.lr, "weight_decay": self.attack.weight_decay}
        if self.attack.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters, **options)
        return torch.optim.SGD(self.parameters, momentum=0.9, **options)

    def _text(self, material: Material, rows: list[int]) -> Text:
        """Captions of ``rows``, encoded once where the text encoder does not move."""
        asked = [material.captions[row] for row in rows]
        if self.moving.text:
            return self.model.text(asked)
        new = [text for text in dict.fromkeys(asked) if text not in self.cached]
        if new:
            with torch.no_grad():
                encoded = self.model.text(new)
            self.cached |= {text: encoded[i : i + 1] for i, text in enumerate(new)}
        return Text.cat([self.cached[text] for text in asked])

    def advance(self, step: int) -> float:
        """Update number ``step`` of this stage's schedule; returns the loss on the concept's batch
        before it.
        """
        attack, model = self.attack, self.model
        drawn = self.train.draw(
            attack.batch_size, model.timesteps, generator(self.seed, "attack", self.task.name, step)
        )
        text = self._text(self.train, drawn.rows)
        if self.prior is not None:
            g = generator(self.seed, "attack prior", self.task.name, step)
            more = self.prior.draw(attack.batch_size, model.timesteps, g)
            text = Text.cat([text, self._text(self.prior, more.rows)])
            parts = zip((drawn.z, drawn.noise, drawn.t), (more.z, more.noise, more.t), strict=True)
            z, noise, t = (torch.cat(pair) for pair in parts)
        else:
            z, noise, t = drawn.z, drawn.noise, drawn.t
        losses = model.loss(z, text, noise, t)
        concept = losses[: attack.batch_size].mean()
        loss = concept
        if self.prior is not None:
            loss = concept + attack.prior_weight * losses[attack.batch_size :].mean()
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()
        if all(parameter.grad is None for parameter in self.parameters):
            told = (
                "moves parameters that the model's loss does not depend on; `open` must "
                "put them into the model."
            )
            raise UserError(attack.key, list(self.moving.parameters), told)
        if attack.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, attack.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = attack.rate(step, self.steps)
        self.optimizer.step()
        return float(concept.detach())

    @torch.no_grad()
    def evaluate(self, material: Material, label: str) -> float:
        """Mean loss over `Material.evenly`, equal in every model."""
        every = material.evenly(
            self.model.timesteps, generator(self.seed, f"attack {label}", self.task.name)
        )
        found = []
        for start in range(0, len(every.rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            some = Draw(every.z[part], every.noise[part], every.t[part], every.rows[part])
            found.append(
                self.model.loss(
                    some.z, self._text(material, some.rows), some.noise, some.t
                ).double()
            )
        return float(torch.cat(found).mean())

    def prompts(self, families: Sequence[str], count: int) -> dict[str, list[str]]:
        """Family → what pictures are asked for by."""
        return {
            family: prompts(self.task, family, self.template, self.token, count)
            for family in families
        }

    def generations(self, families: Sequence[str], sampling: Sampling) -> dict[str, Tensor]:
        """Family → uint8 [count, 3, s, s] from latents that depend on (seed, concept, family)
        only.
        """
        found = {}
        for family, asked in self.prompts(families, sampling.count).items():
            latents = self.model.latents(sampling.count, self.seed, self.task.name, family)
            found[family] = self.model.generate(asked, latents, sampling)
        return found

    def tensors(self) -> dict[str, Tensor]:
        return state_tensors(self.parameters, self.optimizer)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        restore_state(self.parameters, self.optimizer, tensors)


class _Run:
    """The trajectory so far, its guard against divergence, and its saved form."""

    def __init__(self, attack: ConceptBase, checkpoint: Checkpoint | None) -> None:
        self.attack, self.checkpoint = attack, checkpoint
        tensors, saved = (checkpoint.load() if checkpoint else None) or ({}, {})
        self.step = int(saved.get("step", 0))
        self.trajectory = Trajectory(
            list(saved.get("steps", [])), {k: list(v) for k, v in saved.get("values", {}).items()}
        )
        self.first = float(saved.get("first", 0.0))
        self.recent = [
            float(v) for v in saved.get("recent", [])
        ]  # losses of the last WINDOW batches
        self.since = [
            float(v) for v in saved.get("since", [])
        ]  # sum and number of the losses since the last snapshot
        self.samples = {
            k.removeprefix("samples."): v for k, v in tensors.items() if k.startswith("samples.")
        }
        self.stages: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("stage."):
                _, index, rest = name.split(".", 2)
                self.stages.setdefault(int(index), {})[rest] = value

    def fine(self, loss: float) -> bool:
        """Take the loss of an update; False when it left the finite range or exploded."""
        if not math.isfinite(loss):
            return False
        self.recent = [*self.recent, loss][-WINDOW:]
        self.since = [self.since[0] + loss, self.since[1] + 1] if self.since else [loss, 1.0]
        return (
            len(self.recent) < WINDOW
            or sum(self.recent) / WINDOW <= self.attack.explosion * self.first
        )

    def keep(self, step: int, learner: Learner) -> bool:
        """Append a snapshot; False, and nothing kept, when it has left the finite range or
        exploded.
        """
        train = self.since[0] / self.since[1] if self.since else self.first
        values = {"train_loss": train, "test_loss": learner.evaluate(learner.test, "test")}
        limit = self.attack.explosion * self.trajectory.values.get("test_loss", [math.inf])[0]
        if not all(map(math.isfinite, values.values())) or values["test_loss"] > limit:
            return False
        self.trajectory.steps.append(step)
        for name, value in values.items():
            self.trajectory.values.setdefault(name, []).append(value)
        for family, images in learner.generations(
            self.attack.families, self.attack.sampling
        ).items():
            before = self.samples.get(family)
            self.samples[family] = (
                images[None] if before is None else torch.cat([before, images[None]])
            )
        self.since = []
        return True

    def save(self, step: int, index: int, learner: Learner) -> None:
        if self.checkpoint is None:
            return
        self.stages[index] = {k: _kept(v) for k, v in learner.tensors().items()}
        tensors = {f"stage.{i}.{k}": v for i, part in self.stages.items() for k, v in part.items()}
        tensors |= {f"samples.{family}": images for family, images in self.samples.items()}
        values = {"step": step, "steps": self.trajectory.steps, "values": self.trajectory.values}
        self.checkpoint.save(
            tensors, {**values, "first": self.first, "recent": self.recent, "since": self.since}
        )


def _facts(attack: ConceptBase, learner: Learner) -> dict[str, Any]:
    """What the record says of the attack; of the last stage where there are several."""
    who = learner.attack
    facts = {
        "attack": attack.name,
        "optimizer": who.optimizer,
        "lr": who.lr,
        "schedule": who.schedule,
    }
    facts |= {
        "batch_size": who.batch_size,
        "pictures": len(learner.train),
        "augmentation": who.augmentation,
    }
    facts |= {"template": who.template, "prior_weight": who.prior_weight}
    if who.template == "token":
        facts["expression"] = learner.token
    facts |= {"parameters": sum(p.numel() for p in learner.parameters), "form": learner.moving.form}
    return {
        **facts,
        "prompts": learner.prompts(attack.families, attack.sampling.count),
        **learner.moving.info,
    }


def _total(
    model: DiffusionModel, copy: DiffusionModel, words: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What several stages changed together: parameters under their own names, and learned words."""
    found = dict(words)
    parts = {"unet": (model.unet, copy.unet)}
    for i, pair in enumerate(zip(model.text_encoders, copy.text_encoders, strict=True)):
        parts[f"text_encoder_{i + 1}" if i else "text_encoder"] = pair
    for prefix, (before, after) in parts.items():
        old = before.state_dict()
        for name, value in after.state_dict().items():
            if value.shape == old[name].shape and not torch.equal(
                value, old[name]
            ):  # words have enlarged one table
                found[f"{prefix}.{name}"] = value
    return found


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
    draw of all training pictures), ``test_loss`` the loss on ``task.reference`` at fixed timesteps
    and noise.

    Returns:
        the trajectory. Where numbers blow up it ends there with status ``diverged`` and without
        weights.

    Raises:
        UserError: a model of half precision.
        Diverged: the loss is not finite before the first update.
    """
    state, copy, marks = _Run(attack, checkpoint), model.copy(), set(budget.snapshots())
    trajectory, plan, start = state.trajectory, attack.plan(task, budget), 0
    words: dict[str, Tensor] = {}
    for index, (who, what, stop) in enumerate(plan):
        learner = Learner(who, copy, what, budget.steps, seed)
        trajectory.info = _facts(attack, learner)
        if not trajectory.steps:
            state.first = learner.evaluate(learner.train, "train")
            if not math.isfinite(state.first) or not state.keep(0, learner):
                raise Diverged("the loss is not finite before the first update", 0)
        elif (
            index and state.step <= start
        ):  # other pictures, other losses: they explode from where they begin
            state.first, state.recent = learner.evaluate(learner.train, "train"), []
        if index in state.stages:
            learner.restore(state.stages[index])
        begin = max(start, state.step)
        for step in progress(
            range(begin, stop), f"{who.name} on {task.name}", max(stop - begin, 0)
        ):
            fine = state.fine(learner.advance(step))
            if not fine or (step + 1 in marks and not state.keep(step + 1, learner)):
                trajectory.status, trajectory.samples = "diverged", state.samples
                return trajectory
            if step + 1 in marks or step + 1 == stop or (step + 1) % SAVE_STEPS == 0:
                state.save(step + 1, index, learner)
        start = stop
        if len(plan) > 1:
            final_state = learner.tensors().items()
            state.stages[index] = {
                k: _kept(v) for k, v in final_state if k.startswith("parameter.")
            }
            words |= {
                k: v.clone()
                for k, v in learner.moving.weights().items()
                if k.startswith("embedding.")
            }
            learner.moving.close()
    trajectory.samples = state.samples
    if len(plan) > 1:
        trajectory.info["form"] = "delta"
    if attack.keep_weights:
        final = learner.moving.weights() if len(plan) == 1 else _total(model, copy, words)
        trajectory.weights = {k: v.detach().clone().contiguous() for k, v in final.items()}
    return trajectory
