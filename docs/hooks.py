"""What the site adds to docs/: files of the repository that pages link to, so that every link works
on the site too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# files outside docs/ that are pages of the site: path in the repository → path in docs/
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# page of the generated reference → the package whose modules it shows
REFERENCE = {
    package.rpartition(".")[2]: package
    for package in (
        "lab.api",
        "immunize",
        "attacks",
        "eval",
        "lab.core",
        "lab.models",
        "lab.scenarios",
        "lab.scorers",
        "lab.minisd",
        "lab.runner",
        "lab.tracking",
        "lab.release",
        "lab.cluster",
        "lab.cli",
    )
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash"}
RAW = (".png", ".json")  # files of the site as they are, without a page
MARKER = re.compile(r"<!-- (?:record: .*?|end) -->")
LINK = re.compile(r"(?<=\]\()(?P<path>\.\.?/[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def outside(page: str, link: str) -> str | None:
    """Return the path in the repository of a relative ``link`` on ``page`` (a path in docs/) that
    leads out of docs/, else None.
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def target_of(path: str) -> str:
    """Return where the repository's file ``path`` stands in docs/: a page that shows it."""
    return PAGES.get(path, f"source/{path}" if path.endswith(RAW) else f"source/{path}.md")


def reference(package: str) -> str:
    """Return the page of a package or module: its modules, rendered by mkdocstrings."""
    folder = ROOT / package.replace(".", "/")
    paths = sorted(folder.rglob("*.py")) or [folder.with_suffix(".py")]
    modules = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    names = [".".join(parts) for parts in modules if parts[-1] != "__init__"]
    return "\n\n".join([f"# {package}", *(f"::: {name}" for name in names)]) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `PAGES` and `REFERENCE`, and a page for every other file outside docs/ that
    a page links to.
    """

    def add(target: str, **source: str) -> None:
        files.append(File.generated(config, target, **source))

    for page, package in REFERENCE.items():
        add(f"api/{page}.md", content=reference(package))
    for path, target in PAGES.items():
        add(target, content=(ROOT / path).read_text(encoding="utf-8"))
    links = {
        outside(file.src_uri, match["path"])
        for file in files.documentation_pages()
        for match in LINK.finditer(file.content_string)
    }
    for path in sorted(filter(None, links - PAGES.keys())):
        source = ROOT / path
        if source.is_file() and path.endswith(RAW):
            add(target_of(path), abs_src_path=str(source))
        elif source.is_file():  # another link stays as it is, and the strict build names it
            language, text = LANGUAGES.get(source.suffix, "text"), source.read_text("utf-8")
            add(target_of(path), content=f"# {path}\n\n````{language}\n{text}\n````\n")
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links out of docs/ into links to the pages that `on_files` made; drop the marks of
    `docs/figures.py`.
    """
    source = page.file.src_uri
    markdown = MARKER.sub("", markdown).replace("](docs/", "](")  # CONTRIBUTING.md's

    def inside(match: re.Match[str]) -> str:
        path = outside(source, match["path"])
        if path is None or files.get_file_from_path(target_of(path)) is None:
            return match[0]
        return posixpath.relpath(target_of(path), posixpath.dirname(source) or ".") + (
            match["anchor"] or ""
        )

    return LINK.sub(inside, markdown)
