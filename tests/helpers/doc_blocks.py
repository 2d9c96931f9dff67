"""Fenced blocks of Markdown files, with marks (HTML comments on the line before) that say what a
test does with them.

``<!-- run -->``: a ``bash`` block whose lines ``python run.py …`` or ``immunization-bench …`` are
run one after the other in a temporary folder;
``fails with N``: every line ends with that exit code; ``in DIR``: the folder starts as a copy of
``docs/DIR``; ``in the repository``: commands read the repository and write to another folder. A
``bash`` block without a mark is composed, not run.
``<!-- python -->``: a ``python`` block that is executed, ``in DIR`` as above.
``<!-- file: PATH -->``: the block is written to PATH in the temporary folder of the page.
"""

import re
import shlex
from dataclasses import dataclass

from lab.core.sources import ROOT

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
_FENCE = re.compile(
    r"^(?:<!-- (?P<kind>run|python|file)(?:: (?P<mark>[^\n]*?))? -->\n)?"
    r"(?P<fence>`{3,})(?P<language>[a-z]*)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"^<!-- (run|python|file)\b", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    kind: str | None
    mark: str

    @property
    def start(self):
        """Folder below docs/ that the page's temporary folder is a copy of, or None."""
        found = re.search(r"\bin ([\w/]+)$", self.mark)
        return None if found is None or found[1] == "repository" else found[1]

    @property
    def code(self):
        found = re.search(r"fails with (\d+)", self.mark)
        return int(found[1]) if found else 0

    def commands(self):
        """Arguments of every ``python run.py`` or ``immunization-bench`` line, after variables and
        without comments.
        """
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            for command in (["python", "run.py"], ["immunization-bench"]):
                if words[: len(command)] == command:
                    found.append(words[len(command) :])
        return found


def blocks(path):
    text = path.read_text(encoding="utf-8")
    found = [
        Block(m["language"], m["text"], m["kind"], m["mark"] or "") for m in _FENCE.finditer(text)
    ]
    assert len([b for b in found if b.kind]) == len(_MARK.findall(text)), (
        f"{path}: a mark without a block below it"
    )
    return found
