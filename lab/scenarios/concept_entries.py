"""The concepts of a user's list, checked before any picture is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab.core.data import Erasure
from lab.core.errors import UserError
from lab.core.options import choice, flag, local
from lab.core.prompts import text, texts
from lab.core.slugs import slug
from lab.scenarios import concepts

_TEXTS = ("words", "prompts", "descriptions", "reworded", "anchor")
_KEYS = ("path", "select", "name", "role", "kind", "prior", "erase", *_TEXTS)
ROLES = ("target", "other", "rehearsal")
_NAME = re.compile(r"[\w][\w .'-]*")  # it becomes part of labels and file names


def speaks_of(words: str, prompt: str) -> bool:
    """Whether ``prompt`` holds ``words`` as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", prompt, re.IGNORECASE) is not None


def shows(words: str, caption: str) -> bool:
    """Whether ``caption`` is about ``words``: as `speaks_of`, the plural in s or es too ("two
    foxes").
    """
    return (
        re.search(rf"(?<!\w){re.escape(words)}(?:e?s)?(?!\w)", caption, re.IGNORECASE) is not None
    )


@dataclass(frozen=True)
class Entry:
    """A checked entry; ``key`` is where it stands in the config."""

    key: str
    name: str
    role: str
    kind: Literal["object", "style"]
    words: str
    path: Path
    select: dict[str, str]
    prior: Path | None
    families: dict[str, tuple[str, ...]]
    anchor: str | None

    def erasure(self, preserve: tuple[str, ...]) -> Erasure:
        """Its prompts by name are to mean the same with the anchor in place of its words."""
        pattern = re.compile(rf"(?<!\w){re.escape(self.words)}(?!\w)", re.IGNORECASE)
        prompts, anchor = self.families["name"], str(self.anchor)
        return Erasure(
            self.name,
            self.words,
            prompts,
            tuple(pattern.sub(lambda _: anchor, p) for p in prompts),
            preserve,
        )


def folder(key: str, value: object, root: Path) -> Path:
    """A folder of the config; a relative path starts at ``root``."""
    if not isinstance(value, str | Path) or not str(value):
        raise UserError(key, value, "must be a folder with images (and, best, a metadata.csv).")
    return root / local(key, value)


def _families(key: str, given: dict[str, Any], words: str) -> dict[str, tuple[str, ...]]:
    found = {"name": texts(f"{key}.prompts", given.get("prompts"))}
    for family, option in (("description", "descriptions"), ("reworded", "reworded")):
        if given.get(option):
            found[family] = texts(f"{key}.{option}", given[option])
    for family, option, wanted in (
        ("name", "prompts", True),
        ("reworded", "reworded", True),
        ("description", "descriptions", False),
    ):
        for prompt in found.get(family, ()):
            if (speaks_of if wanted else shows)(words, prompt) is not wanted:
                told = (
                    f"lacks the words '{words}' that name the concept"
                    if wanted
                    else f"names '{words}'"
                )
                fix = (
                    "; rewrite it or set words"
                    if wanted
                    else "; a description does without the name"
                )
                raise UserError(f"{key}.{option}", prompt, f"{told}{fix}.")
    twice = next((p for p in found.get("reworded", ()) if p in found["name"]), None)
    if twice is not None:
        raise UserError(
            f"{key}.reworded", twice, "stands in prompts too; re-worded prompts must be new."
        )
    return found


def parse(key: str, given: object, root: Path) -> Entry:
    """Entry ``given`` of the list, found at ``key``.

    Raises:
        UserError: an unknown or missing key, prompts that do not name the concept, descriptions
            that do.
    """
    entry = concepts.entries(key, given, _KEYS)
    name = text(f"{key}.name", entry.get("name"))
    if not _NAME.fullmatch(name):
        raise UserError(f"{key}.name", name, "may hold letters, digits, spaces and . ' - only.")
    words = text(f"{key}.words", entry.get("words") or name)
    erase = flag(f"{key}.erase", entry.get("erase", False))
    anchor = entry.get("anchor")
    if erase:
        anchor = text(f"{key}.anchor", anchor)
        if speaks_of(words, anchor):
            raise UserError(
                f"{key}.anchor",
                anchor,
                f"holds '{words}'; an erased concept needs another meaning.",
            )
    elif anchor is not None:
        raise UserError(f"{key}.anchor", anchor, "is used with erase: true only.")
    select = (
        concepts.entries(f"{key}.select", entry["select"], entry["select"])
        if entry.get("select")
        else {}
    )
    kind = choice(f"{key}.kind", entry.get("kind"), ("object", "style"))
    return Entry(
        key,
        name,
        choice(f"{key}.role", entry.get("role"), ROLES),
        "style" if kind == "style" else "object",
        words,
        folder(f"{key}.path", entry.get("path"), root),
        {column: str(value) for column, value in select.items()},
        None if entry.get("prior") is None else folder(f"{key}.prior", entry["prior"], root),
        _families(key, entry, words),
        anchor,
    )


def checked(given: object, root: Path) -> tuple[Entry, ...]:
    """All entries of a list, which no name, word or caption may mix up."""
    key, given = "scenario.concepts", concepts.plain(given)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        fix = "must be a list of {path, name, role, kind, prompts}; see conf/scenario/folder.yaml."
        raise UserError(key, given, fix)
    found = tuple(parse(f"{key}[{i}]", entry, root) for i, entry in enumerate(given))
    for i, entry in enumerate(found):
        if not slug(entry.name):
            raise UserError(
                f"{entry.key}.name",
                entry.name,
                "needs letters a-z or digits; words may be in any script.",
            )
        for earlier in found[:i]:
            if slug(entry.name) == slug(earlier.name):
                fix = (
                    f"is taken by the earlier {earlier.name}: names differ in a-z and "
                    "digits, without accents."
                )
                raise UserError(f"{entry.key}.name", entry.name, fix)
            if entry.words.lower() == earlier.words.lower():
                fix = f"are the words of {earlier.name} too: prompts could not tell the two apart."
                raise UserError(f"{entry.key}.words", entry.words, fix)
            for inner, outer in ((entry, earlier), (earlier, entry)):
                if shows(inner.words, outer.words):
                    fix = (
                        f"are part of {outer.words}, the words of {outer.name}: its "
                        "prompts would name both."
                    )
                    raise UserError(f"{inner.key}.words", inner.words, fix)
    for role, what in (("target", "to protect against"), ("other", "that must stay learnable")):
        if not any(entry.role == role for entry in found):
            raise UserError(key, [e.name for e in found], f"has no role: {role}, a concept {what}.")
    return found
