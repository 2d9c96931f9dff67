"""Any user's concepts: one folder of images each, with prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field

from lab.core.config import (
    Count,
    Flag,
    Positive,
    Prompt,
    Prompts,
    Text,
    config,
    options,
)
from lab.core.data import (
    CaptionedImages,
    Concept,
    ConceptCase,
    Erasure,
    Kind,
    Sampling,
    ScenarioData,
)
from lab.core.errors import UserError
from lab.core.images import expand_path
from lab.core.prompts import texts
from lab.core.seeding import derive, generator
from lab.core.slugs import slug
from lab.core.types import Scenario
from lab.minisd.world import folders
from lab.minisd.world.openmoji import CREDIT
from lab.minisd.world.world import Subset
from lab.models.activations import digest
from lab.scenarios import concept_texts
from lab.scenarios.world_concepts import Side, Studio, case_name, empty, hashed, rest

_PRESERVED = 200  # captions of keep that an eraser preserves, beside prompts of what is not erased
_SomePrompts = Annotated[Prompts, Field(min_length=1)]


def names_concept(words: str, line: str, plural: str = "") -> bool:
    """Tell whether ``line`` holds ``words`` as whole words, in any case.

    Args:
        plural: a pattern that may follow them.
    """
    return (
        re.search(rf"(?<!\w){re.escape(words)}(?:{plural})(?!\w)", line, re.IGNORECASE) is not None
    )


def shows(words: str, caption: str) -> bool:
    """Tell whether ``caption`` is about ``words``, the plural in s or es included ("two foxes")."""
    return names_concept(words, caption, "|e?s")


@options
class Shares:
    """Shares of a concept's images for the immunizer (own), the attacker (train) and comparison."""

    own: Positive = 0.3
    train: Positive = 0.3
    reference: Positive = 0.4

    def __post_init__(self) -> None:
        total = self.own + self.train + self.reference
        if abs(total - 1) > 1e-6:
            raise ValueError(f"own + train + reference = {total:g}, not 1")

    def cut(self, total: int) -> tuple[int, int, int]:
        """Return how many of ``total`` ≥ 3 images each part gets, at least one each, and own two as
        soon as there are four.
        """
        own = min(max(round(total * self.own), 2), total - 2)
        train = min(max(round(total * self.train), 1), total - own - 1)
        return own, train, total - own - train


@options
class Entry:
    """A concept of the list; conf/scenario/folder.yaml explains the options."""

    path: Annotated[Text, Field(min_length=1)]
    name: Prompt
    role: Literal["target", "other", "rehearsal"]
    kind: Literal["object", "style"]
    prompts: _SomePrompts
    words: Prompt | None = None
    descriptions: Prompts = ()
    reworded: Prompts = ()
    prior: Annotated[Text, Field(min_length=1)] | None = None
    select: dict[str, Annotated[str, BeforeValidator(str)]] | None = None
    erase: Flag = False
    anchor: Prompt | None = None

    @property
    def spoken(self) -> str:
        """The words that name the concept in a prompt."""
        return self.words or self.name

    def families(self) -> dict[str, tuple[str, ...]]:
        """Return the prompts by family."""
        families = {"name": self.prompts, "description": self.descriptions}
        return {k: v for k, v in {**families, "reworded": self.reworded}.items() if v}

    def check(self, key: str) -> None:
        """Check that prompts name the concept and descriptions do not.

        Raises:
            UserError: they do not, or the anchor does not fit ``erase``.
        """
        words, anchor = self.spoken, self.anchor or ""
        unnamed = [p for p in self.prompts if not names_concept(words, p)]
        reworded = [p for p in self.reworded if not names_concept(words, p)]
        known = [p for p in self.reworded if p in self.prompts]
        named = [p for p in self.descriptions if shows(words, p)]
        lacks = f"lacks the words '{words}' that name the concept; rewrite it or set words."
        for wrong, option, value, reason in (
            # it becomes part of labels and file names
            (
                not re.fullmatch(r"\w[\w .'-]*", self.name),
                "name",
                self.name,
                "may hold letters, digits, spaces and . ' - only.",
            ),
            (
                not slug(self.name),
                "name",
                self.name,
                "needs letters a-z or digits; words may be in any script.",
            ),
            (unnamed, "prompts", unnamed, lacks),
            (reworded, "reworded", reworded, lacks),
            (known, "reworded", known, "stands in prompts too; re-worded prompts must be new."),
            (named, "descriptions", named, f"names '{words}'; a description does not."),
            (self.erase and not anchor, "anchor", None, "needs a text where erase is true."),
            (anchor and not self.erase, "anchor", anchor, "is used with erase: true only."),
            (
                names_concept(words, anchor),
                "anchor",
                anchor,
                f"holds '{words}'; an erased concept needs another meaning.",
            ),
        ):
            if wrong:
                raise UserError(f"{key}.{option}", value, reason)

    def erasure(self, preserve: tuple[str, ...]) -> Erasure:
        """Return the erasure: prompts mean the same with the anchor in place of the words."""
        pattern = re.compile(rf"(?<!\w){re.escape(self.spoken)}(?!\w)", re.IGNORECASE)
        anchors = tuple(pattern.sub(lambda _: str(self.anchor), p) for p in self.prompts)
        return Erasure(self.name, self.spoken, self.prompts, anchors, preserve)


def check_entries(entries: Sequence[Entry], key: str = "scenario.concepts") -> None:
    """Check every entry, and that no name, word or caption mixes two of them up.

    Raises:
        UserError: see `Entry.check`; equal names, words within words, a role that nobody has.
    """
    for i, entry in enumerate(entries):
        entry.check(f"{key}[{i}]")
        for other in (*entries[:i], *entries[i + 1 :]):
            if slug(entry.name) == slug(other.name):
                reason = f"is taken by {other.name}: names differ in a-z and digits."
                raise UserError(f"{key}[{i}].name", entry.name, reason)
            if shows(entry.spoken, other.spoken):
                reason = f"are part of the words of {other.name}: prompts would name both."
                raise UserError(f"{key}[{i}].words", entry.spoken, reason)
    for role in {"target", "other"} - {entry.role for entry in entries}:
        raise UserError(key, [e.name for e in entries], f"has no role: {role}; give it one.")


@config
class ConceptFolders(Scenario):
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
        resolution: side of all images in pixels.

    Raises:
        UserError: see `check_entries` and `lab.minisd.world.folders`; a concept with too few
            images.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text = "folder"
    concepts: Annotated[tuple[Entry, ...], Field(min_length=1)]
    root: Text | None = None
    shares: Annotated[Shares, BeforeValidator(lambda value: value or {})] = Shares()
    keep: Text | None = None
    unrelated: Text | None = None
    keep_pictures: Count = 96
    unrelated_pictures: Count = 32
    captions: Text | tuple[Text, ...] | None = None
    regularizers: Count = 200
    regularizer_templates: Literal["all", "one"] = "all"
    sampling: Sampling = Sampling()
    resolution: Side = 512

    def __post_init__(self) -> None:
        check_entries(self.concepts)
        self.lines = self._read_captions()

    def path(self, key: str, value: str) -> Path:
        """Return the path ``value`` of the config; a relative one starts at ``root``."""
        return expand_path("scenario.root", self.root or ".") / expand_path(key, value)

    def _read_captions(self) -> tuple[str, ...] | None:
        """Return C_reg from the list or the text file, or None."""
        key, lines = "scenario.captions", self.captions
        if isinstance(lines, str):
            path = self.path(key, lines)
            try:
                lines = tuple(path.read_text(encoding="utf-8").splitlines())
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(key, path, f"cannot be read as UTF-8 text ({error}).") from error
            lines = tuple(line for line in lines if line.strip())
        return None if lines is None else texts(key, lines)

    def asks_erasure(self) -> str | None:
        """Return the config key of the first concept that is to be erased."""
        erased = (f"scenario.concepts[{i}]" for i, e in enumerate(self.concepts) if e.erase)
        return next(erased, None)

    def load(self, seed: int) -> ScenarioData:
        return _Loader(self, seed).load()


class _Loader:
    """Reads the folders of a scenario for one seed.

    Attributes:
        owners: hash of an image → the concept that has it.
        notes: sentences about what was left out.
    """

    def __init__(self, scenario: ConceptFolders, seed: int) -> None:
        self.options, self.seed = scenario, seed
        self.notes: list[str] = []
        self.owners: dict[str, str] = {}

    def _note(self, count: int, note: str) -> None:
        if count:
            self.notes.append(note)

    def load(self) -> ScenarioData:
        options, entries = self.options, self.options.concepts
        images = [self._images(i, entry) for i, entry in enumerate(entries)]
        targets, others, rehearsal = (
            tuple(self._concept(i, e, images[i]) for i, e in enumerate(entries) if e.role == role)
            for role in ("target", "other", "rehearsal")
        )
        keep, captions, unrelated = self._surroundings()
        preserve = [line for e in entries if not e.erase for line in e.prompts]
        preserve += list(dict.fromkeys(keep.prompts))[:_PRESERVED]
        case = ConceptCase(
            case_name(concept.name for concept in targets),
            targets,
            others,
            rehearsal,
            keep=keep,
            regularizers=captions,
            unrelated=unrelated,
            sampling=options.sampling,
            erased=tuple(e.erasure(tuple(dict.fromkeys(preserve))) for e in entries if e.erase),
        )
        return hashed([case], self.notes)

    def _images(self, i: int, entry: Entry) -> CaptionedImages:
        """Read the different images of a concept."""
        key = f"scenario.concepts[{i}].path"
        path = self.options.path(key, entry.path)
        folder = folders.read(path, self.options.resolution, select=entry.select or None, key=key)
        hashes = [digest(image) for image in folder.images]
        for row, value in enumerate(hashes):
            owner = self.owners.setdefault(value, entry.name)
            if owner != entry.name:
                name = folder.rows[row]["file_name"]
                reason = f"the image {name} is one of {owner} too; leave it in one folder."
                raise UserError(key, path, reason)
        kept = [row for row, value in enumerate(hashes) if hashes.index(value) == row]
        copies = len(hashes) - len(kept)
        self._note(copies, f"{entry.name}: {copies} images were copies of others and left out.")
        if len(kept) < 3:
            reason = (
                f"holds {len(kept)} different images; three is the least, one each to immunize, "
                "attack and compare, and four where an immunizer trains on the concept."
            )
            raise UserError(key, path, reason)
        captions = [folder.rows[row].get("prompt") or folder.rows[row]["text"] for row in kept]
        silent = [k for k, line in enumerate(captions) if not names_concept(entry.spoken, line)]
        for position, k in enumerate(silent):
            captions[k] = entry.prompts[position % len(entry.prompts)]
        reason = "captions do not name it; its prompts stand in for them."
        self._note(len(silent), f"{entry.name}: {len(silent)} {reason}")
        texts(key, captions)
        return CaptionedImages(folder.images[kept], tuple(captions))

    def _concept(self, i: int, entry: Entry, images: CaptionedImages) -> Concept:
        """Split the images of a concept by seed."""
        options, sizes = self.options, self.options.shares.cut(len(images))
        counts = "{} images to immunize, {} to attack, {} to compare".format(*sizes)
        self._note(1, f"{entry.name}: {counts}.")
        own, train, reference = self._split(images, sizes, entry.name)
        prior = empty(options.resolution)
        if entry.prior is not None:
            prior = self._pool(f"scenario.concepts[{i}].prior", entry.prior, dict(self.owners))
        total = options.sampling.count
        return Concept(
            entry.name,
            "harmful" if entry.role == "target" else "benign",
            entry.kind,
            words=entry.spoken,
            train=train,
            own=own,
            reference=reference,
            prior=prior,
            prompts={
                family: tuple(lines[k % len(lines)] for k in range(max(total, len(lines))))
                for family, lines in entry.families().items()
            },
        )

    def _split(
        self, images: CaptionedImages, sizes: Sequence[int], label: str
    ) -> list[CaptionedImages]:
        order = torch.randperm(len(images), generator=generator(self.seed, "scenario", label))
        return [images.pick(part.tolist()) for part in order.split(list(sizes))]

    def _surroundings(self) -> tuple[CaptionedImages, tuple[str, ...], CaptionedImages]:
        """Return ``keep``, captions of C_reg and ``unrelated``, whose prompts are new."""
        options, entries = self.options, self.options.concepts
        world = rest([e.spoken.lower() for e in entries])
        captions = self._regularizers(world)
        limits = {"keep": options.keep_pictures, "unrelated": options.unrelated_pictures}
        paths = {k: v for k in limits if (v := getattr(options, k)) is not None}
        if not paths:
            reason = "scaled pictures of the embedded world stand in."
            self._note(1, f"No keep and unrelated folders: {reason} {CREDIT}")
            taken = {line for e in entries for lines in e.families().values() for line in lines}
            studio = Studio(self.seed, options.resolution)
            keep, unrelated = studio.surroundings(
                world, options.keep_pictures, options.unrelated_pictures, captions, taken
            )
            return keep, captions, unrelated
        pools = {k: self._pool(f"scenario.{k}", path, self.owners) for k, path in paths.items()}
        last = list(pools)[-1]
        if len(pools) == 1:
            n = len(pools[last])
            if n < 2:
                reason = "needs two images: one to keep, one to compare."
                raise UserError(f"scenario.{last}", paths[last], reason)
            halves = self._split(pools[last], (n // 2, n - n // 2), "pool")
            pools = dict(zip(limits, halves, strict=True))
            self._note(1, f"The folder {last} was cut in halves, one to keep and one to compare.")
        keep = pools["keep"].pick(range(len(pools["keep"]))[: limits["keep"]])
        taken = {*keep.prompts, *captions}
        new = [i for i, line in enumerate(pools["unrelated"].prompts) if line not in taken]
        if not new:
            reason = "every caption is one of keep or of C_reg; unrelated prompts must be new."
            raise UserError(f"scenario.{last}", paths[last], reason)
        left = len(pools["unrelated"]) - len(new)
        self._note(left, f"{left} unrelated pictures have a caption of keep: left out.")
        return keep, captions, pools["unrelated"].pick(new[: limits["unrelated"]])

    def _names_any(self, line: str) -> bool:
        return any(shows(e.spoken, line) for e in self.options.concepts)

    def _pool(self, key: str, path: str, owners: dict[str, str]) -> CaptionedImages:
        """Read a folder, without images that ``owners`` has and captions that name a concept.

        Raises:
            UserError: nothing is left, or a caption that is no prompt.
        """
        folder = folders.read(self.options.path(key, path), self.options.resolution, key=key)
        images = CaptionedImages(folder.images, tuple(folder.texts))
        # every image is looked up, so that a copy of one that names a concept is left out too
        new = [owners.setdefault(digest(x), f"{key} {i}") for i, x in enumerate(images.images)]
        kept = [
            i
            for i, owner in enumerate(new)
            if owner == f"{key} {i}" and not self._names_any(images.prompts[i])
        ]
        left = len(images) - len(kept)
        self._note(left, f"{key}: {left} pictures are a concept's, copies, or name one: left out.")
        if not kept:
            raise UserError(key, path, "holds no image that is unrelated to the concepts.")
        texts(key, [images.prompts[i] for i in kept])
        return images.pick(kept)

    def _regularizers(self, world: Subset) -> tuple[str, ...]:
        options, total = self.options, self.options.regularizers
        if options.lines is None:
            stream = derive(self.seed, "scenario", "regularizers")
            return concept_texts.regularizers(world, stream, total, options.regularizer_templates)
        lines = [line for line in options.lines if not self._names_any(line)]
        if not lines:
            reason = "all of them name a concept."
            raise UserError("scenario.captions", f"{len(options.lines)} captions", reason)
        left = len(options.lines) - len(lines)
        self._note(left, f"{left} captions of C_reg name a concept and were left out.")
        few = f"C_reg has {len(lines)} captions, fewer than the {total} asked for."
        self._note(len(lines) < total, few)
        return tuple(lines[:total])
