"""Any user's concepts, one folder of images each, and concepts of the embedded world by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle, permutations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field

from lab.core.config import (
    Count,
    Flag,
    PositiveShare,
    Prompt,
    Prompts,
    Text,
    bind,
    config,
    options,
)
from lab.core.data import (
    CaptionedImages,
    Concept,
    ConceptCase,
    Erasure,
    Kind,
    Role,
    Sampling,
    ScenarioData,
)
from lab.core.errors import UserError, UserErrors, as_user_error
from lab.core.hashing import digest
from lab.core.images import expand_path
from lab.core.prompts import in_turn, texts
from lab.core.seeding import derive, generator
from lab.core.slugs import slug
from lab.core.types import Scenario
from lab.minisd.world import folders, world
from lab.minisd.world.openmoji import CREDIT
from lab.minisd.world.world import Subset
from lab.scenarios import concept_texts
from lab.scenarios.world_concepts import Side, Studio, case_name, empty, hashed, rest

_PRESERVED = 200  # captions of keep that an eraser preserves, beside prompts of what is not erased
_ROLES: dict[str, Role] = {"harmful": "harmful", "benign": "benign", "rehearsal": "benign"}
_DRAWN = {
    "own": 20,
    "train": 20,
    "reference": 32,
    "prior": 32,
}  # images of a concept of the embedded world


def names_concept(words: str, line: str, plural: str = "") -> bool:
    """Tell whether ``line`` holds ``words`` as whole words, in any case.

    Args:
        plural: a pattern that may follow them.
    """
    pattern = rf"(?<!\w){re.escape(words)}(?:{plural})(?!\w)"
    return re.search(pattern, line, re.IGNORECASE) is not None


def shows(words: str, caption: str) -> bool:
    """Tell whether ``caption`` is about ``words``, the plural in s or es included ("two foxes")."""
    return names_concept(words, caption, "|e?s")


@options
class Shares:
    """Shares of a concept's images for the immunizer (own) and the attacker (train); the rest is
    for comparison.
    """

    own: PositiveShare = 0.3
    train: PositiveShare = 0.3

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

    name: Prompt
    role: Literal["harmful", "benign", "rehearsal"]
    path: Annotated[Text, Field(min_length=1)] | None = None
    kind: Literal["object", "style"] = "object"
    words: Prompt | None = None
    prompts: Prompts = ()
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

    def mistakes(self, key: str) -> list[UserError]:
        """Return prompts that do not name the concept, descriptions that do, an anchor that does
        not fit ``erase``, and a name that is no name of a file.
        """
        words, anchor = self.spoken, self.anchor or ""
        unnamed = [p for p in self.prompts if not names_concept(words, p)]
        reworded = [p for p in self.reworded if not names_concept(words, p)]
        known = [p for p in self.reworded if p in self.prompts]
        named = [p for p in self.descriptions if shows(words, p)]
        lacks = f"lacks the words '{words}' that name the concept; rewrite it or set words."
        is_label = re.fullmatch(r"\w[\w .'-]*", self.name)  # it is part of labels and file names
        characters = "may hold letters, digits, spaces and . ' - only."
        other = f"holds '{words}'; an erased concept needs another meaning."
        checks = (
            (not is_label, "name", self.name, characters),
            (not slug(self.name), "name", self.name, "needs letters a-z or digits; see words."),
            (unnamed, "prompts", unnamed, lacks),
            (reworded, "reworded", reworded, lacks),
            (known, "reworded", known, "stands in prompts too; re-worded prompts must be new."),
            (named, "descriptions", named, f"names '{words}'; a description does not."),
            (self.erase and not anchor, "anchor", None, "needs a text where erase is true."),
            (anchor and not self.erase, "anchor", anchor, "is used with erase: true only."),
            (names_concept(words, anchor), "anchor", anchor, other),
        )
        return [UserError(f"{key}.{option}", v, fix) for wrong, option, v, fix in checks if wrong]

    def erasure(self, concept: Concept, preserve: tuple[str, ...]) -> Erasure:
        """Return the erasure: prompts mean the same with the anchor in place of the words."""
        pattern = re.compile(rf"(?<!\w){re.escape(self.spoken)}(?!\w)", re.IGNORECASE)
        prompts = tuple(dict.fromkeys(concept.prompts["name"]))
        anchors = tuple(pattern.sub(lambda _: str(self.anchor), p) for p in prompts)
        return Erasure(self.name, self.spoken, prompts, anchors, preserve)


def read_entries(values: Sequence[Any], key: str, root: Path | None = None) -> tuple[Entry, ...]:
    """Return the entries of a list.

    A name that is left out is that of the folder.

    Args:
        key: config key of the list, for messages.
        root: read the folders below it, too, so that whatever is wrong shows at once.

    Raises:
        UserError: all mistakes: see `Entry.mistakes`; equal names, words within words, a role that
            nobody has.
    """
    entries: dict[str, Entry] = {}
    errors: list[UserError] = []
    for place, value in ((f"{key}[{i}]", value) for i, value in enumerate(values)):
        try:
            entries[place] = entry = _entry(value, place)
            errors += entry.mistakes(place)
            if entry.path is None:
                world.concept(entry.name, f"{place}.name")
            elif root is not None:
                folder = root / expand_path(f"{place}.path", entry.path)
                folders.read(folder, 8, select=entry.select, key=f"{place}.path")
        except UserError as error:
            errors.append(error)
    for (place, entry), (_, other) in permutations(entries.items(), 2):
        if slug(entry.name) == slug(other.name):
            errors.append(
                UserError(
                    f"{place}.name",
                    entry.name,
                    f"is taken by {other.name}: names differ in a-z and digits.",
                )
            )
        elif shows(entry.spoken, other.spoken):
            errors.append(
                UserError(
                    f"{place}.words",
                    entry.spoken,
                    f"are part of the words of {other.name}: prompts would name both.",
                )
            )
    missing = {"harmful", "benign"} - {entry.role for entry in entries.values()}
    if missing and len(entries) == len(values):
        names = [entry.name for entry in entries.values()]
        errors.append(
            UserError(key, names, f"has no role: {' and '.join(sorted(missing))}; give it one.")
        )
    UserErrors.check(errors)
    return tuple(entries.values())


def _entry(value: Any, key: str) -> Entry:
    if not isinstance(value, Mapping):
        fix = "must be {path: FOLDER, role: harmful | benign}, or {name: CONCEPT, role: …}."
        raise UserError(key, value, fix)
    if isinstance(value.get("path"), str):
        value = {"name": Path(value["path"]).name.replace("_", " ").replace("-", " "), **value}
    return bind(Entry, value, key)


@config
class ConceptFolders(Scenario):
    """One case from folders of images (`lab.minisd.world.folders`) and concepts of the embedded
    world.

    The images of a folder are split by seed into those of the immunizer (own), of the attacker
    (train) and of the comparison (reference). An image that comes twice is used once; one that two
    concepts share is an error.

    Args:
        concepts: list of {path, role: harmful | benign | rehearsal, name, kind: object | style,
            words, prompts, descriptions, reworded, prior, select, erase, anchor};
            conf/scenario/folder.yaml explains each.
        root: where relative paths start; None is the working directory.
        shares: of each concept's images for own and train.
        keep, unrelated: folders. With only one of them it is cut in halves; with none the embedded
            world stands in.
        keep_images, unrelated_images: at most this many are used.
        captions: C_reg, a text file with one caption per line or a list; None draws them from the
            embedded world.
        regularizers: at most this many captions are used.
        regularizer_templates: of captions from the embedded world, ``all`` or ``one``.
        sampling: `lab.core.data.Sampling`.
        resolution: side of all images in pixels.

    Raises:
        UserError: see `read_entries` and `lab.minisd.world.folders`; a concept with too few
            images.
    """

    provides: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text = "folder"
    concepts: Annotated[tuple[Any, ...], Field(min_length=1)]
    root: Text | None = None
    shares: Annotated[Shares, BeforeValidator(lambda value: value or {})] = Shares()
    keep: Text | None = None
    unrelated: Text | None = None
    keep_images: Count = 96
    unrelated_images: Count = 32
    captions: Text | tuple[Text, ...] | None = None
    regularizers: Count = 200
    regularizer_templates: Literal["all", "one"] = "all"
    sampling: Sampling = Sampling()
    resolution: Side = 512

    def __post_init__(self) -> None:
        self.entries = read_entries(self.concepts, "scenario.concepts")
        self.lines = self._read_captions()

    def path(self, key: str, value: str) -> Path:
        """Return the path ``value`` of the config; a relative one starts at ``root``."""
        return expand_path("scenario.root", self.root or ".") / expand_path(key, value)

    def _read_captions(self) -> tuple[str, ...] | None:
        """Return C_reg from the list or the text file, or None."""
        key, lines = "scenario.captions", self.captions
        if isinstance(lines, str):
            path = self.path(key, lines)
            with as_user_error(key, path, "cannot be read as UTF-8 text."):
                read = path.read_text(encoding="utf-8").splitlines()
            lines = tuple(line for line in read if line.strip())
        return None if lines is None else texts(key, lines)

    def asks_erasure(self) -> str | None:
        """Return the config key of the first concept that is to be erased."""
        return next(
            (f"scenario.concepts[{i}]" for i, e in enumerate(self.entries) if e.erase), None
        )

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
        self.studio = Studio(seed, scenario.resolution)

    def _note(self, count: int, note: str) -> None:
        if count:
            self.notes.append(note)

    def load(self) -> ScenarioData:
        options, entries = self.options, self.options.entries
        images = [self._images(i, e) if e.path is not None else None for i, e in enumerate(entries)]
        names, count = [entry.spoken.lower() for entry in entries], options.sampling.count
        concepts = [
            self.studio.concept(entry.name, _ROLES[entry.role], _DRAWN, names, count)
            if own is None
            else self._concept(i, entry, own)
            for i, (entry, own) in enumerate(zip(entries, images, strict=True))
        ]
        pairs = list(zip(entries, concepts, strict=True))
        targets, others, rehearsal = (
            tuple(concept for entry, concept in pairs if entry.role == role)
            for role in ("harmful", "benign", "rehearsal")
        )
        keep, captions, unrelated = self._surroundings(names, concepts)
        preserve = [
            *(line for e, c in pairs if not e.erase for line in c.prompts["name"]),
            *list(dict.fromkeys(keep.prompts))[:_PRESERVED],
        ]
        erased = [e.erasure(c, tuple(dict.fromkeys(preserve))) for e, c in pairs if e.erase]
        case = ConceptCase(
            case_name(concept.name for concept in targets),
            targets,
            others,
            rehearsal,
            keep=keep,
            regularizers=captions,
            unrelated=unrelated,
            sampling=options.sampling,
            erased=tuple(erased),
        )
        return hashed([case], self.notes)

    def _images(self, i: int, entry: Entry) -> CaptionedImages:
        """Read the different images of a concept."""
        key = f"scenario.concepts[{i}].path"
        path = self.options.path(key, str(entry.path))
        folder = folders.read(path, self.options.resolution, select=entry.select or None, key=key)
        hashes = [digest(image) for image in folder.images]
        for row, value in enumerate(hashes):
            owner = self.owners.setdefault(value, entry.name)
            if owner != entry.name:
                name = folder.rows[row]["file_name"]
                raise UserError(key, path, f"the image {name} is one of {owner}, too.")
        distinct = [row for row, value in enumerate(hashes) if hashes.index(value) == row]
        copies = len(hashes) - len(distinct)
        self._note(copies, f"{entry.name}: {copies} images were copies of others and left out.")
        if len(distinct) < 3:
            raise UserError(
                key,
                path,
                f"holds {len(distinct)} different images; three is the least, one each to "
                "immunize, to attack and to compare, and four where an immunizer trains on the "
                "concept.",
            )
        captions = [folder.rows[row].get("prompt") or folder.rows[row]["text"] for row in distinct]
        silent = sum(not names_concept(entry.spoken, line) for line in captions)
        stand_in = cycle(entry.prompts or [f"a photo of {entry.spoken}"])
        captions = [c if names_concept(entry.spoken, c) else next(stand_in) for c in captions]
        reason = "captions do not name it; its prompts stand in for them."
        self._note(silent, f"{entry.name}: {silent} {reason}")
        texts(key, captions)
        return CaptionedImages(folder.images[distinct], tuple(captions))

    def _concept(self, i: int, entry: Entry, images: CaptionedImages) -> Concept:
        """Split the images of a concept by seed."""
        options, sizes = self.options, self.options.shares.cut(len(images))
        counts = "{} images to immunize, {} to attack, {} to compare".format(*sizes)
        self.notes.append(f"{entry.name}: {counts}.")
        own, train, reference = self._split(images, sizes, entry.name)
        prior = empty(options.resolution)
        if entry.prior is not None:
            prior = self._pool(f"scenario.concepts[{i}].prior", entry.prior, dict(self.owners))
        total = options.sampling.count
        families = {
            "name": entry.prompts or tuple(dict.fromkeys(images.prompts)),
            "description": entry.descriptions,
            "reworded": entry.reworded,
        }
        return Concept(
            entry.name,
            _ROLES[entry.role],
            entry.kind,
            words=entry.spoken,
            train=train,
            own=own,
            reference=reference,
            prior=prior,
            prompts={
                family: tuple(in_turn(lines, max(total, len(lines))))
                for family, lines in families.items()
                if lines
            },
        )

    def _split(
        self, images: CaptionedImages, sizes: Sequence[int], label: str
    ) -> list[CaptionedImages]:
        order = torch.randperm(len(images), generator=generator(self.seed, "scenario", label))
        return [images.pick(part.tolist()) for part in order.split(list(sizes))]

    def _surroundings(
        self, names: Sequence[str], concepts: Sequence[Concept]
    ) -> tuple[CaptionedImages, tuple[str, ...], CaptionedImages]:
        """Return ``keep``, captions of C_reg and ``unrelated``, whose prompts are new."""
        options = self.options
        others = rest(names)
        captions = self._regularizers(others)
        limits = {"keep": options.keep_images, "unrelated": options.unrelated_images}
        paths = {k: v for k in limits if (v := getattr(options, k)) is not None}
        if not paths:
            reason = "scaled images of the embedded world stand in."
            self.notes.append(f"No keep and unrelated folders: {reason} {CREDIT}")
            taken = {line for c in concepts for lines in c.prompts.values() for line in lines}
            keep, unrelated = self.studio.surroundings(
                others, options.keep_images, options.unrelated_images, captions, taken
            )
            return keep, captions, unrelated
        pools = {k: self._pool(f"scenario.{k}", path, self.owners) for k, path in paths.items()}
        last = list(pools)[-1]
        if len(pools) == 1:
            n = len(pools[last])
            if n < 2:
                raise UserError(
                    f"scenario.{last}",
                    paths[last],
                    "needs two images: one to keep, one to compare.",
                )
            halves = self._split(pools[last], (n // 2, n - n // 2), "pool")
            pools = dict(zip(limits, halves, strict=True))
            self._note(1, f"The folder {last} was cut in halves, one to keep and one to compare.")
        keep = pools["keep"].pick(range(len(pools["keep"]))[: limits["keep"]])
        taken = {*keep.prompts, *captions}
        new = [i for i, line in enumerate(pools["unrelated"].prompts) if line not in taken]
        if not new:
            raise UserError(
                f"scenario.{last}",
                paths[last],
                "every caption is one of keep or of C_reg; unrelated prompts must be new.",
            )
        left = len(pools["unrelated"]) - len(new)
        self._note(left, f"{left} unrelated images have a caption of keep: left out.")
        return keep, captions, pools["unrelated"].pick(new[: limits["unrelated"]])

    def _names_any(self, line: str) -> bool:
        return any(shows(e.spoken, line) for e in self.options.entries)

    def _pool(self, key: str, path: str, owners: dict[str, str]) -> CaptionedImages:
        """Read a folder, without images that ``owners`` has and captions that name a concept.

        Raises:
            UserError: nothing is left, or a caption that is no prompt.
        """
        folder = folders.read(self.options.path(key, path), self.options.resolution, key=key)
        images = CaptionedImages(folder.images, tuple(folder.texts))
        # every image is looked up, so that a copy of one that names a concept is left out too
        new = [owners.setdefault(digest(x), f"{key} {i}") for i, x in enumerate(images.images)]
        unrelated = [
            i
            for i, owner in enumerate(new)
            if owner == f"{key} {i}" and not self._names_any(images.prompts[i])
        ]
        left = len(images) - len(unrelated)
        self._note(left, f"{key}: {left} images are a concept's, copies, or name one: left out.")
        if not unrelated:
            raise UserError(key, path, "holds no image that is unrelated to the concepts.")
        texts(key, [images.prompts[i] for i in unrelated])
        return images.pick(unrelated)

    def _regularizers(self, others: Subset) -> tuple[str, ...]:
        options, total = self.options, self.options.regularizers
        if options.lines is None:
            stream = derive(self.seed, "scenario", "regularizers")
            return concept_texts.regularizers(others, stream, total, options.regularizer_templates)
        lines = [line for line in options.lines if not self._names_any(line)]
        if not lines:
            raise UserError(
                "scenario.captions", f"{len(options.lines)} captions", "all of them name a concept."
            )
        left = len(options.lines) - len(lines)
        self._note(left, f"{left} captions of C_reg name a concept and were left out.")
        self._note(len(lines) < total, f"C_reg has {len(lines)} captions, fewer than {total}.")
        return tuple(lines[:total])
