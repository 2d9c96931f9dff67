"""`undo`: distil the model before erasure into a noised copy of itself, without the targets.

After UNDO (arXiv 2506.06278, for language models), carried over to diffusion by us. The student
starts at weights that forgot a share of everything,

    θ_s = (1 − α) θ_0 + α β ξ,  ξ Xavier noise (0 for vectors),

and learns again what the teacher θ_0 predicts, except for the targets, whose captions it learns to
read as their anchors:

    min E‖ε_s(x_t, c) − ε_0(x_t, c)‖²  +  E‖ε_s(x_t, c_target) − ε_0(x_t, c_anchor)‖².

x are samples of the teacher for kept captions and for anchors; no image of a target is used. θ_0 is
the model *before* the scenario erases anything. The erasure follows, so that an erased concept that
is no target can be learned again as from the baseline. With ``keep_text_layers`` keys and values of
cross-attention stay those of θ_0. Worthless where the model before erasure is public.

At the size of Stable Diffusion v1-4, in float32 on a CPU, 16 × 16 latents and batch 2, a step takes
212 s on one core, and memory peaks at 17.9 GiB: two U-Nets, gradients and two moments
(``tests/benchmarks/sd_layout.py``). Not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from immunize.merge.build import scope_names
from lab.core.config import (
    Count,
    Flag,
    Index,
    NonNegative,
    Positive,
    PositiveShare,
    Share,
    Text,
    config,
)
from lab.core.data import ConceptCase, Kind
from lab.core.errors import Diverged, UserError
from lab.core.prompts import in_turn
from lab.core.seeding import generator, shuffled
from lab.core.training import progress, restore_state, schedule_factor, state_tensors, train
from lab.core.types import Checkpoint, Immunizer, Log
from lab.models.diffusion import DiffusionModel

_LOG_EVERY = 20  # steps over which the logged loss is a mean


@config
class Undo(Immunizer):
    """Distillation into a noised copy.

    Args:
        alpha: share of the weights that is replaced by noise. beta: scale of the noise.
        keep_text_layers: leave the keys and values of cross-attention as they are. A target's
            caption then means to the other layers what it meant, and they have to lose the concept.
        keep_samples, target_samples: sampled images of captions to keep, and of anchors of each
            target.
        target_share: share of a batch that shows anchors of targets.
        steps, batch_size, lr, warmup: of AdamW; the rate falls on a half cosine.
        drop: share of captions that are replaced by the empty one.
        clip: largest norm of the gradient.
        sampling_steps: of the teacher's images, by DPM-Solver++.
        checkpoint_every: steps between saved states.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})
    before_erasure: ClassVar[bool] = True

    name: Text = "undo"
    alpha: Share = 0.5
    beta: NonNegative = 0.1
    keep_text_layers: Flag = False
    keep_samples: Count = 1536
    target_samples: Count = 192
    target_share: PositiveShare = 0.25
    steps: Count = 2000
    batch_size: Count = 32
    lr: Positive = 1e-3
    warmup: Index = 50
    drop: Share = 0.1
    clip: Positive = 1.0
    sampling_steps: Count = 4
    checkpoint_every: Count = 100

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        """Require that the scenario erases every target.

        Raises:
            UserError: there is nothing to undo.
        """
        for case in cases:
            erased = {e.name for e in case.erased}
            if unknown := [c.name for c in case.targets if c.name not in erased]:
                fix = (
                    f"{', '.join(unknown)} is not erased by the scenario, and undo removes what "
                    "the model knows; use scenario=relearn_styles or another one that erases"
                )
                raise UserError("immunize", self.name, fix)

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        training = _Distillation(self, model, _captions(self, case, seed), case, seed)
        train(
            training,
            self.steps,
            label=self.name,
            checkpoint=checkpoint,
            log=log,
            save_every=self.checkpoint_every,
        )
        return training.student


def _captions(options: Undo, case: ConceptCase, seed: int) -> list[tuple[str, str]]:
    """Return a caption of the student, and that of the teacher in its place, for each image.

    The first ``keep_samples`` are to keep, the same for both: unrelated ones, and those of erased
    concepts that are no targets. Those of the targets follow.
    """
    names = {c.name for c in case.targets}
    others = [e for e in case.erased if e.name not in names]
    pool = [*case.regularizers, *case.keep.prompts, *(p for e in others for p in e.prompts)]
    keep = in_turn(shuffled(list(dict.fromkeys(pool)), seed, "undo", "kept"), options.keep_samples)
    captions = [(text, text) for text in keep]
    for erasure in (e for e in case.erased if e.name in names):
        pairs = list(zip(erasure.prompts, erasure.anchors, strict=True))
        captions += in_turn(shuffled(pairs, seed, "undo", erasure.name), options.target_samples)
    return captions


def noised_copy(
    model: DiffusionModel, alpha: float, beta: float, seed: int, fixed: Container[str] = ()
) -> DiffusionModel:
    """Return a copy of ``model`` whose U-Net is (1 − α) θ_0 + α β ξ, ξ uniform by Xavier, but for
    the parameters ``fixed``.
    """
    copy = model.copy()
    with torch.no_grad():
        for name, weight in copy.unet.named_parameters():
            if name in fixed:
                continue
            noise = torch.zeros(weight.shape)
            if weight.ndim > 1:
                torch.nn.init.xavier_uniform_(noise, generator=generator(seed, "undo noise", name))
            weight.mul_(1 - alpha).add_(noise.to(weight), alpha=alpha * beta)
    return copy


class _Distillation:
    """The student in training. A `lab.core.training.Trainee`."""

    def __init__(
        self,
        options: Undo,
        teacher: DiffusionModel,
        captions: list[tuple[str, str]],
        case: ConceptCase,
        seed: int,
    ) -> None:
        self.options, self.teacher, self.captions, self.seed = options, teacher, captions, seed
        self.sampling = replace(case.sampling, sampler="dpm", steps=options.sampling_steps)
        fixed = scope_names(teacher.unet, "kv") if options.keep_text_layers else ()
        self.student = noised_copy(teacher, options.alpha, options.beta, seed, fixed)
        for name, weight in self.student.unet.named_parameters():
            weight.requires_grad_(name not in fixed)
        self.trained = [w for w in self.student.unet.parameters() if w.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=options.lr, weight_decay=0.0)
        self.bank: Tensor | None = None
        self.recent: list[float] = []

    def _sample(self) -> Tensor:
        """Return what the teacher draws for every caption, as scaled latents [n, c, s, s]."""
        parts = []
        starts = range(0, len(self.captions), 64)
        for start in progress(starts, f"{self.options.name}: samples of the teacher"):
            texts = [anchor for _, anchor in self.captions[start : start + 64]]
            noise = self.teacher.latents(len(texts), self.seed, "undo bank", start)
            parts.append(self.teacher.sample(texts, noise, self.sampling))
        return torch.cat(parts)

    def step(self, step: int) -> dict[str, float] | None:
        options, g = self.options, generator(self.seed, "undo", step)
        if self.bank is None:
            self.bank = self._sample()
        same, targets = (
            options.keep_samples,
            max(1, round(options.batch_size * options.target_share)),
        )
        index = torch.cat(
            [
                torch.randint(same, (max(1, options.batch_size - targets),), generator=g),
                torch.randint(same, len(self.captions), (targets,), generator=g),
            ]
        )
        dropped = (torch.rand(len(index), generator=g) < options.drop).tolist()
        student, teacher = (
            ["" if empty else texts[i] for i, empty in zip(index.tolist(), dropped, strict=True)]
            for texts in zip(*self.captions, strict=True)
        )
        z = self.bank[index].to(self.student.device)
        t = torch.randint(self.student.timesteps, (len(z),), generator=g).to(z.device)
        noise = torch.randn(z.shape, generator=g).to(z)
        noisy = self.student.noised(z, noise, t)[0].to(z)
        with torch.no_grad():
            wanted = self.teacher.predict(noisy, t, self.teacher.text(teacher))
        with torch.enable_grad():
            text = self.student.text(student)
            loss = (self.student.predict(noisy, t, text) - wanted).square().mean()
            if not torch.isfinite(loss):
                reason = f"the loss of the distillation is {loss.item()}"
                raise Diverged(reason, max(step - 1, 0))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, options.clip)
        rise = min(1.0, (step + 1) / max(options.warmup, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * rise * schedule_factor("cosine", step, options.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.recent.append(loss.item())
        if (step + 1) % _LOG_EVERY and step + 1 < options.steps:
            return None
        mean, self.recent = sum(self.recent) / len(self.recent), []
        return {"distillation_loss": mean}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        assert self.bank is not None  # a state is asked for after a step
        return state_tensors(self.trained, self.optimizer) | {"bank": self.bank}, {
            "recent": self.recent
        }

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        restore_state(self.trained, self.optimizer, tensors)
        self.bank, self.recent = tensors["bank"], list(values["recent"])
