"""Imports point down only, between packages and between files."""

import ast
from graphlib import TopologicalSorter

from lab.core.sources import PACKAGES, ROOT

LAYERS = (
    ("lab.core",),
    ("lab.models",),
    ("lab.minisd.world", "lab.scorers"),
    ("lab.scenarios",),
    ("immunize", "attacks", "eval"),
    ("lab.tracking",),
    ("lab.runner",),
    ("lab.minisd.train", "lab.release", "lab.cluster"),
    ("lab.cli",),
    ("lab.api",),
    ("run",),
)
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [ROOT / "run.py", *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))]
}


def imports(module):
    """Files that ``module`` imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & FILES.keys()) or {node.module}
    return {name for name in names & FILES.keys() if name != module}


def layer(module):
    """(number of the layer, package), or None for a file above all packages."""
    inside = [
        (number, name)
        for number, packages in enumerate(LAYERS)
        for name in packages
        if f"{module}.".startswith(f"{name}.")
    ]
    return inside[0] if inside else None


GRAPH = {module: imports(module) for module in FILES}


def test_packages_import_only_lower_layers():
    wrong = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if layer(module) and layer(name) and layer(module)[1] != layer(name)[1]
        if layer(name)[0] >= layer(module)[0]
    ]
    assert sorted(wrong) == []


def test_files_form_no_circle():
    TopologicalSorter(GRAPH).prepare()


def test_no_class_name_twice():
    names = [
        node.name
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted({name for name in names if names.count(name) > 1}) == []
