"""README's figures are those of the records, and the notebook runs."""

import json
import subprocess
import sys

from doc_blocks import ROOT


def test_figures_of_the_readme_are_those_of_the_records():
    command = [sys.executable, "docs/readme_figures.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    namespace = {"__name__": "notebook", "display": print}
    for cell in code:
        exec(compile(cell, "quickstart.ipynb", "exec"), namespace)
