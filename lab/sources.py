"""SHA-256 of the project source files that compute a stage, so that a mended bug never serves stale results."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("immunize", "attacks", "eval", "lab")


def _file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _imports(module: str) -> frozenset[str]:
    """Project modules that ``module`` imports, anywhere in its file."""
    path = _file(module)
    if path is None:
        return frozenset()
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in found if name.split(".")[0] in PACKAGES and _file(name))


@cache
def source_hash(module: str) -> str:
    """Hash of ``module`` and of every project module that it reaches through imports.

    Modules outside the project (a user's own package) are hashed alone, by their file.
    """
    if module.split(".")[0] not in PACKAGES:
        spec = importlib.util.find_spec(module)
        origin = Path(spec.origin) if spec and spec.origin else None
        return hashlib.sha256(origin.read_bytes() if origin and origin.is_file() else module.encode()).hexdigest()
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(_imports(name))
    sha = hashlib.sha256()
    for name in sorted(seen):
        path = _file(name)
        if path is not None:
            sha.update(name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()
