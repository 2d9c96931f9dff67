"""The guides, README's figures and the notebook are what the code and the records say."""

import json
import re
import subprocess
import sys

import pytest
from doc_blocks import PAGES, ROOT

DOCS = ROOT / "docs"
CODE = re.compile(r"<!-- code of (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
SHOWN = [(page, *found) for page in PAGES for found in CODE.findall(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "path", "text"), SHOWN, ids=[path for _, path, _ in SHOWN])
def test_guides_show_the_code_of_the_examples(page, path, text):
    assert text == (DOCS / path).read_text(encoding="utf-8")


def test_figures_of_the_readme_are_those_of_the_records():
    command = [sys.executable, "docs/readme_figures.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    namespace = {"__name__": "notebook", "display": print}
    for cell in code:
        exec(compile(cell, "quickstart.ipynb", "exec"), namespace)
