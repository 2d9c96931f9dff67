"""Any user's concepts: one folder of images each, with prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from lab.core.data import CaptionedImages, Concept, ConceptCase, Kind, ScenarioData
from lab.core.errors import UserError
from lab.core.hashing import digest
from lab.core.options import choice, count, local, number
from lab.core.prompts import text, texts
from lab.core.seeding import derive, generator
from lab.minisd.world import folders
from lab.minisd.world.openmoji import CREDIT
from lab.scenarios import concept_texts as world_texts
from lab.scenarios import concepts as shared
from lab.scenarios.concept_entries import ROLES, Entry, checked, folder, shows, speaks_of
from lab.scenarios.world_concepts import Roles, Studio

_PARTS = ("own", "train", "reference")
_PRESERVED = (
    200  # captions of keep that an eraser holds on to, beside the prompts of what is not erased
)


class ConceptFolders:
    """One case from folders of images (`lab.minisd.world.folders`). Implements
    `lab.core.types.Scenario`.

    The images of a concept are split by seed into those of the immunizer (own), of the attacker
    (train) and of the comparison (reference). An image that comes twice is used once; one that two
    concepts share is an error.

    Args:
        concepts: list of {path, name, role: target | other | rehearsal, kind: object | style,
            words, prompts, descriptions, reworded, prior, select, erase, anchor};
            conf/scenario/folder.yaml explains each.
        root: where relative paths start; None is the working directory.
        shares: of each concept's images for own, train and reference.
        keep, unrelated: folders. With only one of them it is cut in halves; with none the embedded
            world stands in.
        keep_pictures, unrelated_pictures: at most this many are used.
        captions: C_reg, a text file with one caption per line or a list; None draws them from the
            embedded world.
        regularizers: at most this many captions are used.
        regularizer_templates: of captions from the embedded world, ``all`` or ``one``.
        sampling: `lab.core.data.Sampling`.
        resolution: side of all pictures in pixels.

    Raises:
        UserError: see `lab.scenarios.concept_entries` and `lab.minisd.world.folders`; a concept
            with too few images.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    def __init__(
        self,
        *,
        concepts: Any,
        root: str | None = None,
        shares: Any = None,
        keep: str | None = None,
        unrelated: str | None = None,
        keep_pictures: int = 96,
        unrelated_pictures: int = 32,
        captions: Any = None,
        regularizers: int = 200,
        regularizer_templates: str = "all",
        sampling: Any = None,
        resolution: int = 512,
        name: str = "folder",
    ) -> None:
        self.name, self.root = name, local("scenario.root", root or ".")
        self.entries = checked(concepts, self.root)
        self.shares = _shares(shares)
        self.pools = {
            key: None if path is None else folder(f"scenario.{key}", path, self.root)
            for key, path in (("keep", keep), ("unrelated", unrelated))
        }
        self.sizes = {
            "keep": count("scenario.keep_pictures", keep_pictures, 1),
            "unrelated": count("scenario.unrelated_pictures", unrelated_pictures, 1),
            "regularizers": count("scenario.regularizers", regularizers, 1),
        }
        self.captions = None if captions is None else _captions(captions, self.root)
        self.templates = choice(
            "scenario.regularizer_templates", regularizer_templates, ("all", "one")
        )
        self.sampling = shared.sampling(sampling)
        self.resolution = shared.resolution(resolution)

    def load(self, seed: int) -> ScenarioData:
        notes: list[str] = []
        owners: dict[str, str] = {}
        read = [self._images(entry, owners, notes) for entry in self.entries]
        made = {
            role: tuple(
                self._concept(entry, found, seed, owners, notes)
                for entry, found in zip(self.entries, read, strict=True)
                if entry.role == role
            )
            for role in ROLES
        }
        keep, regularizers, unrelated = self._surroundings(seed, owners, notes)
        case = ConceptCase(
            "_".join(concept.name.replace(" ", "-") for concept in made["target"]),
            made["target"],
            made["other"],
            made["rehearsal"],
            keep=keep,
            regularizers=regularizers,
            unrelated=unrelated,
            sampling=self.sampling,
            erased=tuple(
                e.erasure(self._preserved(keep)) for e in self.entries if e.anchor is not None
            ),
        )
        return shared.loaded([case], notes)

    def asks_erasure(self) -> str | None:
        """Hook of `lab.runner.assemble`: the first concept that is to be erased."""
        return next((entry.key for entry in self.entries if entry.anchor is not None), None)

    # ---- concepts

    def _images(self, entry: Entry, owners: dict[str, str], notes: list[str]) -> CaptionedImages:
        """The different images of a concept. ``owners``: hash of an image → the concept that has
        it.
        """
        key = f"{entry.key}.path"
        found = folders.read(entry.path, self.resolution, select=entry.select or None, key=key)
        kept: list[int] = []
        for i, image in enumerate(found.images):
            owner = owners.setdefault(digest(image), entry.name)
            if owner != entry.name:
                fix = (
                    f"the image {found.rows[i]['file_name']} is one of {owner} too; leave "
                    "it in one folder."
                )
                raise UserError(key, entry.path, fix)
            if not any(torch.equal(image, found.images[j]) for j in kept):
                kept.append(i)
        if len(kept) < len(found.images):
            notes.append(
                f"{entry.name}: {len(found.images) - len(kept)} images were copies of others "
                "and left out."
            )
        if len(kept) < len(_PARTS):
            told = (
                f"holds {len(kept)} different images; three is the least, one each to "
                "immunize, attack and compare"
            )
            fix = f"{told}, and four where an immunizer trains on the concept, as it needs two."
            raise UserError(key, entry.path, fix)
        captions = [found.rows[i].get("prompt") or found.rows[i]["text"] for i in kept]
        silent = [i for i, line in enumerate(captions) if not speaks_of(entry.words, line)]
        prompts = entry.families["name"]
        for position, i in enumerate(silent):
            captions[i] = prompts[position % len(prompts)]
        if silent:
            notes.append(
                f"{entry.name}: {len(silent)} captions do not name it; its prompts stand in "
                "for them."
            )
        for line in captions:
            text(f"{entry.key}.path", line)
        return CaptionedImages(found.images[kept], tuple(captions))

    def _concept(
        self,
        entry: Entry,
        found: CaptionedImages,
        seed: int,
        owners: dict[str, str],
        notes: list[str],
    ) -> Concept:
        order = torch.randperm(
            len(found), generator=generator(seed, "scenario", entry.name)
        ).tolist()
        sizes = _sizes(len(found), self.shares)
        notes.append(
            f"{entry.name}: {sizes[0]} images to immunize, {sizes[1]} to attack, {sizes[2]} "
            "to compare."
        )
        own, train, reference = (found.pick(part) for part in _cut(order, sizes))
        prior = shared.empty(self.resolution)
        if entry.prior is not None:
            prior = self._pool(f"{entry.key}.prior", entry.prior, dict(owners), notes)
        total = self.sampling.count
        return Concept(
            entry.name,
            "harmful" if entry.role == "target" else "benign",
            entry.kind,
            words=entry.words,
            train=train,
            own=own,
            reference=reference,
            prior=prior,
            prompts={
                family: shared.cycled(lines, total) for family, lines in entry.families.items()
            },
        )

    def _preserved(self, keep: CaptionedImages) -> tuple[str, ...]:
        kept = [line for e in self.entries if e.anchor is None for line in e.families["name"]]
        return tuple(dict.fromkeys([*kept, *list(dict.fromkeys(keep.prompts))[:_PRESERVED]]))

    # ---- what is unrelated to the concepts

    def _surroundings(
        self, seed: int, owners: dict[str, str], notes: list[str]
    ) -> tuple[CaptionedImages, tuple[str, ...], CaptionedImages]:
        """``keep``, captions of C_reg and ``unrelated``; no prompt of the last stands in the other
        two.
        """
        rest = Roles(tuple(e.words.lower() for e in self.entries), ()).rest
        studio = Studio(seed, self.resolution)
        captions = self._regularizers(rest, derive(seed, "scenario", "regularizers"), notes)
        if not any(self.pools.values()):
            notes.append(
                "No keep and unrelated folders: scaled pictures of the embedded world stand "
                f"in. {CREDIT}"
            )
            keep = studio.draw(rest, self.sizes["keep"], world_texts.world_caption, "keep")
            taken = {*keep.prompts, *captions}
            taken.update(*(lines for entry in self.entries for lines in entry.families.values()))
            fresh = world_texts.fresh(
                rest, derive(seed, "scenario", "unrelated"), self.sizes["unrelated"], taken
            )
            return keep, captions, studio.render(fresh, world_texts.world_caption)
        pools = {
            key: self._pool(f"scenario.{key}", path, owners, notes)
            for key, path in self.pools.items()
            if path is not None
        }
        if len(pools) == 1:
            (key, only), *_ = pools.items()
            if len(only) < 2:
                raise UserError(
                    f"scenario.{key}",
                    self.pools[key],
                    "needs two pictures: one to keep, one to compare.",
                )
            order = torch.randperm(
                len(only), generator=generator(seed, "scenario", "pool")
            ).tolist()
            halves = _cut(order, (len(only) // 2, len(only) - len(only) // 2))
            pools = {"keep": only.pick(halves[0]), "unrelated": only.pick(halves[1])}
            notes.append(f"The folder {key} was cut in halves, one to keep and one to compare.")
        keep = pools["keep"].pick(list(range(len(pools["keep"])))[: self.sizes["keep"]])
        taken = {*keep.prompts, *captions}
        fine = [i for i, line in enumerate(pools["unrelated"].prompts) if line not in taken]
        if not fine:
            key = "unrelated" if self.pools["unrelated"] is not None else "keep"
            fix = (
                "every caption is also one of keep or of the regularizers; unrelated "
                "prompts must be new."
            )
            raise UserError(f"scenario.{key}", self.pools[key], fix)
        if len(fine) < len(pools["unrelated"]):
            notes.append(
                f"{len(pools['unrelated']) - len(fine)} unrelated pictures have a caption of "
                "keep: left out."
            )
        return keep, captions, pools["unrelated"].pick(fine[: self.sizes["unrelated"]])

    def _pool(
        self, key: str, path: Path, owners: dict[str, str], notes: list[str]
    ) -> CaptionedImages:
        """The folder at ``key`` without pictures that ``owners`` knows and without captions that
        name a concept.

        Raises:
            UserError: nothing is left, or a caption that is no prompt.
        """
        read = folders.read(path, self.resolution, key=key)
        found = CaptionedImages(read.images, tuple(read.texts))
        hashes = [digest(image) for image in found.images]
        fine = [
            i
            for i, value in enumerate(hashes)
            if owners.setdefault(value, f"{key} {i}") == f"{key} {i}"
        ]
        named = [i for i in fine if any(shows(e.words, found.prompts[i]) for e in self.entries)]
        fine = [i for i in fine if i not in set(named)]
        if len(fine) < len(found):
            notes.append(
                f"{key}: {len(found) - len(fine)} pictures are a concept's, copies, or name "
                "one: left out."
            )
        if not fine:
            raise UserError(key, path, "holds no picture that is unrelated to the concepts.")
        for i in fine:
            text(key, found.prompts[i])
        return found.pick(fine)

    def _regularizers(self, rest: Any, seed: int, notes: list[str]) -> tuple[str, ...]:
        total = self.sizes["regularizers"]
        if self.captions is None:
            return world_texts.regularizers(rest, seed, total, self.templates)
        fine = [
            line for line in self.captions if not any(shows(e.words, line) for e in self.entries)
        ]
        if not fine:
            raise UserError(
                "scenario.captions", f"{len(self.captions)} captions", "all of them name a concept."
            )
        if len(fine) < len(self.captions):
            notes.append(
                f"{len(self.captions) - len(fine)} captions of C_reg name a concept and were "
                "left out."
            )
        if len(fine) < total:
            notes.append(f"C_reg has {len(fine)} captions, fewer than the {total} asked for.")
        return tuple(fine[:total])


def _shares(given: object) -> tuple[float, float, float]:
    found = {"own": 0.3, "train": 0.3, "reference": 0.4} | shared.entries(
        "scenario.shares", given or {}, _PARTS
    )
    own, train, reference = (
        number(f"scenario.shares.{part}", found[part], above=0, below=1) for part in _PARTS
    )
    if abs((total := own + train + reference) - 1) > 1e-6:
        raise UserError("scenario.shares", found, f"own + train + reference = {total:g}, not 1.")
    return own, train, reference


def _sizes(total: int, shares: tuple[float, float, float]) -> tuple[int, int, int]:
    """How many of ``total`` ≥ 3 images each part gets, at least one each, and own two as soon as
    there are four.
    """
    own = min(max(round(total * shares[0]), 2), total - 2)
    train = min(max(round(total * shares[1]), 1), total - own - 1)
    return own, train, total - own - train


def _cut(order: list[int], sizes: Sequence[int]) -> list[list[int]]:
    return [part.tolist() for part in torch.tensor(order).split(list(sizes))]


def _captions(given: object, root: Path) -> tuple[str, ...]:
    """C_reg from a text file, one caption per line, or from a list."""
    key = "scenario.captions"
    if not isinstance(given, str):
        return texts(key, shared.plain(given))
    path = root / local(key, given)
    try:
        lines = [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(key, path, f"cannot be read as a text file in UTF-8 ({error}).") from error
    if not lines:
        raise UserError(key, path, "holds no caption.")
    return texts(key, lines)
