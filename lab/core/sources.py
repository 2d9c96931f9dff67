"""SHA-256 of the source files that compute a stage, so that a mended bug never serves stale
results.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("immunize", "attacks", "eval", "lab")


def _home(top: str) -> Path | None:
    """Return the folder that holds the module or package ``top``; None where it is no file."""
    if top in PACKAGES:
        return ROOT
    spec = importlib.util.find_spec(top)
    if spec is None or not (spec.submodule_search_locations or spec.has_location):
        return None
    places = spec.submodule_search_locations or [str(spec.origin)]
    return Path(next(iter(places))).parent


def _file(module: str) -> Path | None:
    home = _home(module.split(".")[0])
    base = home.joinpath(*module.split(".")) if home is not None else None
    files = [base.with_suffix(".py"), base / "__init__.py"] if base is not None else []
    return next((path for path in files if path.is_file()), None)


def _named(path: Path, module: str) -> Iterator[str]:
    """Modules that the file may import, anywhere in it, and names that it takes from them."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def _imports(module: str) -> frozenset[str]:
    """Modules of the project, and those that lie beside a user's ``module``, that it imports."""
    path = _file(module)
    if path is None:
        return frozenset()
    top = module.split(".")[0]
    home = _home(top)
    installed = home is not None and home.name in (
        "site-packages",
        "dist-packages",
    )  # where everybody's packages lie

    def counts(name: str) -> bool:
        other = name.split(".")[0]
        if other in PACKAGES or top in PACKAGES:
            return other in PACKAGES
        return other == top or (not installed and home is not None and _beside(home, other))

    return frozenset(name for name in _named(path, module) if name and counts(name) and _file(name))


def _beside(home: Path, top: str) -> bool:
    return (home / f"{top}.py").is_file() or (home / top).is_dir()


@cache
def source_hash(module: str) -> str:
    """Hash of ``module`` and of every module that it reaches through imports: of the project, and,
    from a module of a user's, those that lie in the same package or folder.
    """
    if _file(module) is None:
        return hashlib.sha256(module.encode()).hexdigest()
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
