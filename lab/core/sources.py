"""Hash the source files that compute a stage, so that a fixed bug never serves stale results."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("immunize", "attacks", "eval", "lab")


def _folder(module: str) -> Path | None:
    """Return the folder of the top package of ``module``; None where it is not installed."""
    top = module.split(".")[0]
    if top in PACKAGES:
        return ROOT
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    return Path(next(iter(spec.submodule_search_locations or [str(spec.origin)]))).parent


def _file(module: str) -> Path | None:
    base = (_folder(module) or Path()).joinpath(*module.split("."))
    files = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in files if path.is_file()), None)


def _belongs(name: str, module: str) -> bool:
    """Return whether ``name`` is of the project, or lies beside a user's ``module``."""
    tops = name.split(".")[0], module.split(".")[0]
    if tops[0] in PACKAGES or tops[1] in PACKAGES:
        return tops[0] in PACKAGES
    folder = _folder(module)
    installed = folder is not None and folder.name in ("site-packages", "dist-packages")
    return tops[0] == tops[1] or (not installed and _folder(name) == folder)


@cache
def _imports(module: str) -> frozenset[str]:
    """Return the modules that belong to ``module`` and that it may import, anywhere in it."""
    path = _file(module)
    if path is None:
        return frozenset()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in names if name and _belongs(name, module) and _file(name))


@cache
def source_hash(module: str) -> str:
    """Return the hash of ``module`` and of every module that it reaches through imports: of the
    project, and, from a module of a user's, those that lie in the same package or folder.
    """
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
        sha.update(name.encode() + b"\0" + (path.read_bytes() if path else b""))
    return sha.hexdigest()
