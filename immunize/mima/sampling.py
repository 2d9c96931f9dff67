"""What a step sees: images, captions, noise and timesteps, a function of (seed, labels) alone.

Images are encoded once. Latents are the posterior's mean (Stable Diffusion's autoencoder has a
posterior whose deviation is far below that of the latents), captions are encoded without gradient:
the text encoder never moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lab.core.data import CaptionedImages, Concept, ConceptCase, Sampling
from lab.core.errors import UserError
from lab.core.prompts import captions, class_words
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel, Text

# rare words, none of them an attacker's own (sks, ktn, <new1>); of several lengths, since the
# tokenizer spells them
WORDS = ("zwx", "qvb", "puk", "dzy", "brel", "mo", "vhj", "gaft")


def numbered(template: str, word: int) -> str:
    """Return ``token`` with the number of its rare word in `WORDS`; other templates as they are."""
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
    """Encoded images: latents [n, c, s, s], ``text`` of the different captions, and which image has
    which.

    ``others``: template (`numbered`) → which image has which caption by it (`lab.core.prompts`).
    """

    z: Tensor
    text: Text
    caption: Tensor
    timesteps: int
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def encode(
        model: DiffusionModel,
        images: CaptionedImages,
        dtype: torch.dtype,
        others: Mapping[str, Sequence[str]] | None = None,
    ) -> Pool:
        """Encode ``images``; ``others``: template → one further caption per image."""
        others = others or {}
        prompts = sorted(set(images.prompts).union(*others.values()))
        with torch.no_grad():
            parts = [model.text(prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
        row = {prompt: i for i, prompt in enumerate(prompts)}
        return Pool(
            model.posterior(images.images)[0].to(dtype),
            cast(Text.cat(parts), dtype),
            torch.tensor([row[p] for p in images.prompts]),
            model.timesteps,
            {template: torch.tensor([row[p] for p in some]) for template, some in others.items()},
        )

    def to(self, dtype: torch.dtype) -> Pool:
        return replace(self, z=self.z.to(dtype), text=cast(self.text, dtype))

    def __len__(self) -> int:
        return int(self.z.shape[0])

    @staticmethod
    def cat(pools: Sequence[Pool]) -> Pool:
        starts = [sum(len(pool.text) for pool in pools[:i]) for i in range(len(pools))]

        def join(parts: Sequence[Pool]) -> Tensor:
            pairs = zip(parts, starts, strict=True)
            return torch.cat([part.caption + start for part, start in pairs])

        templates = dict.fromkeys(template for pool in pools for template in pool.others)
        return Pool(
            torch.cat([pool.z for pool in pools]),
            Text.cat([pool.text for pool in pools]),
            join(pools),
            pools[0].timesteps,
            {t: join([pool.template(t) for pool in pools]) for t in templates},
        )

    def rows(self, rows: Tensor) -> Pool:
        others = {template: caption[rows] for template, caption in self.others.items()}
        return replace(self, z=self.z[rows], caption=self.caption[rows], others=others)

    def template(self, template: str) -> Pool:
        """Return the same images with their captions by ``template``; their own where none were
        encoded for it.
        """
        return replace(self, caption=self.others.get(template, self.caption))

    def batch(self, size: int, seed: int, *labels: object) -> Batch:
        """Draw ``size`` images without repetition as long as there are enough, and one timestep of
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
    """One concept's own images, split so that no loop sees what the other has.

    ``concepts``: how many are pooled in it; batches grow with them, so that every arrangement sees
        as many images.
    ``decoys``: images that the model generates for the concept's captions before immunization,
        where the method needs them.
    """

    name: str
    inner: Pool
    outer: Pool
    concepts: int = 1
    decoys: Pool | None = None


def check_size(concept: Concept, hint: str = "") -> None:
    """Raise `lab.core.errors.UserError` for fewer than two images, one for each loop."""
    if len(concept.own) < 2:
        reason = f"concept {concept.name} has {len(concept.own)} image(s) for the immunizer"
        reason += f"; it needs at least 2, one for each loop{hint}."
        raise UserError("scenario", concept.name, reason)


def split_concept(
    model: DiffusionModel,
    concept: Concept,
    seed: int,
    dtype: torch.dtype,
    decoys: Sampling | None = None,
    templates: Sequence[str] = (),
) -> ConceptSplit:
    """Split the own images by a seeded permutation; the inner loop gets the odd one.

    Args:
        decoys: how images are generated besides, ``count`` of them.
        templates: by which the images get further captions (`numbered`); a concept that nobody
            described gets none by ``description``.
    """
    name, count = concept.name, len(concept.own)
    unknown = {"name"}
    if not (concept.own.described or concept.prompts.get("description")):
        unknown.add("description")
    further = [template for template in dict.fromkeys(templates) if template not in unknown]

    def encode(images: CaptionedImages) -> Pool:
        others = {template: _captions(concept, images, template) for template in further}
        return Pool.encode(model, images, dtype, others)

    pool = encode(concept.own)
    order = torch.randperm(count, generator=generator(seed, "mima", "halves", name))
    cut = -(-count // 2)
    generated = None
    if decoys is not None:
        captioned = concept.own.pick([i % count for i in range(decoys.count)])
        latents = model.latents(decoys.count, seed, "mima", "decoys", name)
        images = model.generate(captioned.prompts, latents, decoys)
        generated = encode(replace(captioned, images=images))
    return ConceptSplit(name, pool.rows(order[:cut]), pool.rows(order[cut:]), decoys=generated)


def _captions(concept: Concept, images: CaptionedImages, template: str) -> tuple[str, ...]:
    kind, _, word = template.partition(" ")
    expression = f"{WORDS[int(word)]} {class_words(concept)}".strip() if word else ""
    return captions(concept, images, kind, expression)


def pool_concepts(parts: Sequence[ConceptSplit]) -> ConceptSplit:
    """Take several concepts as one (baseline ``joint``); each keeps its own split."""
    generated = [part.decoys for part in parts if part.decoys is not None]
    return ConceptSplit(
        "+".join(part.name for part in parts),
        Pool.cat([part.inner for part in parts]),
        Pool.cat([part.outer for part in parts]),
        len(parts),
        Pool.cat(generated) if generated else None,
    )


def prior_images(case: ConceptCase, source: str) -> CaptionedImages:
    """Return what must stay as it is: unrelated images (``keep``), the targets' classes without
    them (``class``), ``both``.

    Raises:
        UserError: the case has none.
    """
    parts = [case.keep] if source in ("keep", "both") else []
    if source in ("class", "both"):
        parts += [target.prior for target in case.targets]
    parts = [part for part in parts if len(part)]
    if not parts:
        reason = f"case {case.name} has no such images; choose another prior or set w_prior=0."
        raise UserError("immunize.prior", source, reason)
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    return CaptionedImages(torch.cat([part.images for part in parts]), prompts)
