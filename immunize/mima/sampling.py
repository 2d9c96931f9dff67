"""What a step sees: pictures, captions, noise and timesteps, a function of (seed, labels) alone.

Pictures are encoded once. Latents are the posterior's mean (Stable Diffusion's autoencoder has a
posterior whose deviation is far below that of the latents), captions are encoded without gradient:
the text encoder never moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lab.core.captions import captions, class_words
from lab.core.data import CaptionedImages, Concept, ConceptCase, Sampling
from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel, Text

# rare words, none of them an attacker's own (sks, ktn, <new1>); of several lengths, since the
# tokenizer spells them
WORDS = ("zwx", "qvb", "puk", "dzy", "brel", "mo", "vhj", "gaft")
PRIORS = ("keep", "class", "both")


@dataclass(frozen=True)
class Decoys:
    """How many pictures to paint per concept, in how many DDIM steps."""

    count: int
    steps: int


def worded(template: str, word: int) -> str:
    """``token`` with the number of its rare word in `WORDS`; other templates as they are."""
    return f"{template} {word}" if template == "token" else template


@dataclass(frozen=True)
class Batch:
    """Latents [b, c, s, s], their captions, noise of the latents' shape and timesteps [b]."""

    z: Tensor
    text: Text
    noise: Tensor
    t: Tensor


def cast(text: Text, dtype: torch.dtype) -> Text:
    return Text(text.hidden.to(dtype), None if text.pooled is None else text.pooled.to(dtype))


@dataclass(frozen=True)
class Pool:
    """Encoded pictures: latents [n, c, s, s], ``text`` of the different captions, and which picture
    has which.

    ``others``: template (`worded`) → which picture has which caption by it (`lab.core.captions`).
    """

    z: Tensor
    text: Text
    caption: Tensor
    timesteps: int
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def encode(
        model: DiffusionModel,
        pictures: CaptionedImages,
        dtype: torch.dtype,
        others: Mapping[str, Sequence[str]] | None = None,
    ) -> Pool:
        """``others``: template → one further caption per picture."""
        others = others or {}
        prompts = sorted(set(pictures.prompts).union(*others.values()))
        with torch.no_grad():
            parts = [model.text(prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
        row = {prompt: i for i, prompt in enumerate(prompts)}
        return Pool(
            model.to_latents(pictures.images).to(dtype),
            cast(Text.cat(parts), dtype),
            torch.tensor([row[p] for p in pictures.prompts]),
            model.timesteps,
            {template: torch.tensor([row[p] for p in given]) for template, given in others.items()},
        )

    def to(self, dtype: torch.dtype) -> Pool:
        return replace(self, z=self.z.to(dtype), text=cast(self.text, dtype))

    def __len__(self) -> int:
        return int(self.z.shape[0])

    @staticmethod
    def cat(pools: Sequence[Pool]) -> Pool:
        starts = [sum(len(pool.text) for pool in pools[:i]) for i in range(len(pools))]

        def joined(parts: Sequence[Pool]) -> Tensor:
            return torch.cat(
                [part.caption + start for part, start in zip(parts, starts, strict=True)]
            )

        templates = dict.fromkeys(template for pool in pools for template in pool.others)
        return Pool(
            torch.cat([pool.z for pool in pools]),
            Text.cat([pool.text for pool in pools]),
            joined(pools),
            pools[0].timesteps,
            {
                template: joined([pool.template(template) for pool in pools])
                for template in templates
            },
        )

    def rows(self, rows: Sequence[int] | Tensor) -> Pool:
        chosen = torch.as_tensor(rows)
        others = {template: caption[chosen] for template, caption in self.others.items()}
        return replace(self, z=self.z[chosen], caption=self.caption[chosen], others=others)

    def template(self, template: str) -> Pool:
        """The same pictures with their captions by ``template``; their own where none were encoded
        for it.
        """
        return replace(self, caption=self.others.get(template, self.caption))

    def batch(self, size: int, seed: int, *labels: object) -> Batch:
        """``size`` pictures without repetition as long as there are enough, and one timestep of
        each of ``size`` equal strata: every timestep stays equally likely, losses of small batches
        scatter less.
        """
        g = generator(seed, "mima", *labels)
        rounds = -(-size // len(self))
        rows = torch.cat([torch.randperm(len(self), generator=g) for _ in range(rounds)])[:size]
        strata = torch.randperm(size, generator=g) + torch.rand(
            size, generator=g, dtype=torch.float64
        )
        t = (strata / size * self.timesteps).long().clamp(max=self.timesteps - 1)
        z = self.z[rows]
        noise = torch.randn(z.shape, generator=g, dtype=torch.float64).to(z)
        return Batch(z, self.text[self.caption[rows]], noise, t.to(z.device))


@dataclass(frozen=True)
class ConceptSplit:
    """One concept's own pictures, split so that no level sees what the other has.

    ``concepts``: how many are pooled in it; batches grow with them, so that every arrangement sees
        as many pictures.
    ``decoys``: what the model paints for the concept's captions before immunization, where that is
        asked for.
    """

    name: str
    lower: Pool
    upper: Pool
    concepts: int = 1
    decoys: Pool | None = None


def enough(concept: Concept, what: str = "concept", else_: str = "") -> None:
    """Raises `lab.core.errors.UserError` for fewer than two pictures, one for each level."""
    if len(concept.own) < 2:
        told = (
            f"{what} {concept.name} has {len(concept.own)} picture(s) for the immunizer; "
            "it needs at least 2"
        )
        raise UserError("scenario", concept.name, f"{told}, one for each level{else_}.")


def halves(
    model: DiffusionModel,
    concept: Concept,
    seed: int,
    dtype: torch.dtype,
    decoys: Decoys | None = None,
    templates: Sequence[str] = (),
) -> ConceptSplit:
    """Own pictures, split by a seeded permutation; the lower level gets the odd one.

    Args:
        decoys: what to paint besides.
        templates: by which the pictures get further captions (`worded`); a concept that nobody
            described gets none by ``description``.

    Raises:
        UserError: fewer than two pictures.
    """
    enough(concept)
    name, count = concept.name, len(concept.own)
    described = concept.own.described or concept.prompts.get("description")
    chosen = [
        t for t in dict.fromkeys(templates) if t != "name" and (t != "description" or described)
    ]

    def encoded(pictures: CaptionedImages) -> Pool:
        return Pool.encode(
            model, pictures, dtype, {t: _captions(concept, pictures, t) for t in chosen}
        )

    pool = encoded(concept.own)
    order = torch.randperm(count, generator=generator(seed, "mima", "halves", name))
    cut = -(-count // 2)
    painted = encoded(_decoys(model, concept, seed, decoys)) if decoys is not None else None
    return ConceptSplit(name, pool.rows(order[:cut]), pool.rows(order[cut:]), decoys=painted)


def _captions(concept: Concept, pictures: CaptionedImages, template: str) -> tuple[str, ...]:
    kind, _, word = template.partition(" ")
    expression = f"{WORDS[int(word)]} {class_words(concept)}".strip() if word else ""
    return captions(concept, pictures, kind, expression)


def _decoys(model: DiffusionModel, concept: Concept, seed: int, asked: Decoys) -> CaptionedImages:
    captioned = concept.own.pick([i % len(concept.own) for i in range(asked.count)])
    latents = model.latents(asked.count, seed, "mima", "decoys", concept.name)
    return replace(
        captioned, images=model.generate(captioned.prompts, latents, Sampling(steps=asked.steps))
    )


def pooled(parts: Sequence[ConceptSplit]) -> ConceptSplit:
    """Several concepts taken as one (baseline ``joint``); each keeps its own split."""
    lower, upper = (
        Pool.cat([part.lower for part in parts]),
        Pool.cat([part.upper for part in parts]),
    )
    painted = [part.decoys for part in parts if part.decoys is not None]
    decoys = Pool.cat(painted) if painted else None
    return ConceptSplit("+".join(part.name for part in parts), lower, upper, len(parts), decoys)


def prior_pictures(case: ConceptCase, source: str) -> CaptionedImages:
    """What must stay as it is: unrelated pictures (``keep``), the targets' classes without them
    (``class``), ``both``.

    Raises:
        UserError: the case has none.
    """
    parts = [case.keep] if source in ("keep", "both") else []
    if source in ("class", "both"):
        parts += [target.prior for target in case.targets]
    parts = [part for part in parts if len(part)]
    if not parts:
        told = (
            f"case {case.name} has no such pictures; choose another of "
            f"{', '.join(PRIORS)} or set w_prior=0."
        )
        raise UserError("immunize.prior", source, told)
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    return CaptionedImages(torch.cat([part.images for part in parts]), prompts)
