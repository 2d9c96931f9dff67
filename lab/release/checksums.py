"""SHA256SUMS of a folder, in the format of ``sha256sum``: written once, and what differs from it
later.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

from lab.core.errors import UserError
from lab.core.hashing import write_atomically

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
# what git and a hub's client put beside the files of a repository; none of it is loaded
_FOREIGN = (".git/", ".gitattributes", ".cache/huggingface/")


def sha256(path: Path) -> str:
    """Of a file, read in pieces."""
    total = hashlib.sha256()
    with path.open("rb") as handle:
        while part := handle.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def _inside(folder: Path) -> dict[str, Path]:
    found = {
        p.relative_to(folder).as_posix(): p
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }
    return {name: p for name, p in found.items() if name != SUMS and not name.startswith(_FOREIGN)}


def write_sums(folder: Path) -> Path:
    """Write ``SHA256SUMS`` over every other file below ``folder``; ``sha256sum -c SHA256SUMS``
    reads it.
    """
    lines = [f"{sha256(path)}  {name}\n" for name, path in _inside(folder).items()]
    write_atomically(folder / SUMS, "".join(lines).encode())
    return folder / SUMS


def read_sums(folder: Path) -> dict[str, str]:
    """File → SHA-256.

    Raises:
        UserError: no such file, a line of another form, a path that leaves the folder or comes
            twice.
    """
    path = folder / SUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "path", path, f"cannot be read ({error}); is {folder} an exported folder?"
        ) from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        name = PurePosixPath(match[2]) if match else PurePosixPath("/")
        if match is None or name.is_absolute() or ".." in name.parts or match[2] in found:
            raise UserError(
                "path", path, f"line {number} is not HASH, two spaces and a path inside the folder."
            )
        found[match[2]] = match[1]
    return found


def differences(folder: Path) -> list[tuple[str, str]]:
    """(file, what is wrong) for every file that is missing, altered, surplus or a link; empty where
    all is well.

    Raises:
        UserError: see `read_sums`.
    """
    listed, there = read_sums(folder), _inside(folder)
    found = [(name, "is missing") for name in listed if name not in there]
    for name, path in there.items():
        if path.is_symlink():
            found.append((name, "is a link; an exported folder has none"))
        elif name not in listed:
            found.append((name, f"is surplus: {SUMS} does not list it"))
        elif sha256(path) != listed[name]:
            found.append((name, f"was altered: its SHA-256 is not that of {SUMS}"))
    return sorted(found)
