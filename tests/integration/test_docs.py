"""Documentation: examples run, commands compose, links lead somewhere, the site builds and asks
nothing of others.
"""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from doc_blocks import PAGES, ROOT, blocks
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from presets import composed

from lab.scenarios.concept_folders import ConceptFolders

DOCS = ROOT / "docs"
RUNNABLE = [
    page for page in PAGES if any(block.kind in ("run", "python") for block in blocks(page))
]


def short(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def own_modules(monkeypatch):
    """Packages of a temporary folder can be imported during a test, and are forgotten after it."""
    known = set(sys.modules)
    yield lambda folder: monkeypatch.syspath_prepend(str(folder))
    for name in set(sys.modules) - known:
        if name.split(".")[0] == "mine":
            del sys.modules[name]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=short)
def test_examples_run(page, tmp_path, monkeypatch, cli, own_modules, stages):
    Path("outputs").mkdir()
    Path("outputs/cache").symlink_to(stages)  # pages share their baseline models, to save time
    monkeypatch.setenv("WANDB_MODE", "offline")
    own_modules(tmp_path)
    for block in blocks(page):
        if block.start is not None:
            shutil.copytree(DOCS / block.start, tmp_path, dirs_exist_ok=True)
        if block.kind == "file":
            target = tmp_path / block.mark
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
        elif block.kind == "python":
            exec(compile(block.text, f"{short(page)}", "exec"), {"__name__": "example"})
        elif block.kind == "run":
            commands = block.commands()
            assert commands, f"a block to run without `python run.py`:\n{block.text}"
            assert len(commands) == sum(
                bool(line.strip()) for line in block.text.replace("\\\n", " ").splitlines()
            )
            with monkeypatch.context() as patch:
                extra = []
                if "in the repository" in block.mark:
                    patch.chdir(ROOT)
                    extra = [f"paths.outputs={tmp_path / 'out'}"]
                for arguments in commands:
                    cli(*arguments, *extra, code=block.code)


def test_own_method_examples_are_in_the_record(tmp_path, cli, own_modules):
    """All four at once, and each is what the record says."""
    from lab.core import record as records

    shutil.copytree(DOCS / "examples/own_methods", tmp_path, dirs_exist_ok=True)
    own_modules(tmp_path)
    cli(
        *[
            "--config-dir",
            "conf",
            "experiment=house_price",
            "scenario=colleges",
            "immunize=partial_whitening",
            "eval=[conditioning,effective_rank]",
            "attacks=[linear_probe,accelerated_probe]",
            "debug=smoke",
            "tracker=none",
            "budget.horizon=5",
        ]
    )
    record = records.read(next(tmp_path.rglob("record.json")))
    assert (record["scenario"], record["immunizer"]) == ("colleges", "partial_whitening")
    assert "accelerated_probe" in record["attacks"]
    metrics = {name: score["value"] for name, score in record["metrics"].items()}
    # κ(H_P) = κ(K_P)^(1 − power) with power 0.5
    assert metrics["kappa_benign"] == pytest.approx(
        metrics["kappa_benign_baseline"] ** 0.5, rel=1e-6
    )
    assert metrics["effective_rank_benign"] > metrics["effective_rank_benign_baseline"]


# ---- what is not run is checked


@pytest.mark.slow
def test_figures_are_those_of_the_records(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures", "--check"])
    monkeypatch.syspath_prepend(str(DOCS))  # one script imports the other
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(DOCS / "figures.py"), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out


@pytest.mark.slow  # test_api.py calls the same functions
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    namespace = {"__name__": "notebook", "display": print}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), namespace)


def check_composes(arguments):
    """Groups and keys exist; of a sweep's choices the first is taken."""
    words = [w for w in arguments if "=" in w and not w.startswith(("hydra/", "hydra.", "-"))]
    chosen = []
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_sweep_override():
            first = next(iter(override.sweep_string_iterator()))
            chosen.append(f"{override.get_key_element()}={first}")
        else:
            chosen.append(override.input_line)
    cfg = composed(*chosen)
    if concepts := cfg.scenario.get("concepts"):
        # composing alone does not see a list without a needed role
        ConceptFolders(concepts=OmegaConf.to_container(concepts))


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_commands_compose(page):
    shown = [block for block in blocks(page) if block.language == "bash" and not block.kind]
    for arguments in (arguments for block in shown for arguments in block.commands()):
        if not {"--config-dir", "experiment=mine"} & {*arguments}:  # files of the reader's
            check_composes(arguments)


def test_the_commands_of_the_help_compose():
    path = ROOT / "conf/hydra/help/bench.yaml"
    text = OmegaConf.to_container(OmegaConf.load(path), resolve=False)["template"]
    commands = re.findall(r"^ +python run\.py (?!action|--)(.*?)(?:  .*)?$", text, flags=re.M)
    assert len(commands) == 5
    for command in commands:
        check_composes(command.split())


def slug(heading):
    """Anchor of a heading, as the site and code hosts make it."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page):
    text = re.sub(
        r"^(`{3,}).*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for link, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        target = (page.parent / link).resolve() if link else page
        generated = target.parent == DOCS / "api"  # by docs/hooks.py
        assert generated or target.exists(), f"{short(page)}: {link}"
        if anchor:
            headings = re.findall(
                r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE
            )
            assert anchor in {slug(h) for h in headings}, f"{short(page)}: {link}#{anchor}"


def test_cited_sections_of_methods_exist():
    """Docstrings and YAMLs cite `docs/reference/methods.md` by section."""
    text = (DOCS / "reference/methods.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^##+ (\d(?:\.\d)?)\.? ", text, flags=re.MULTILINE))
    cited = {
        section
        for folder in ("lab", "immunize", "attacks", "eval", "conf", "sweeps", "docs")
        for file in (ROOT / folder).rglob("*.*")
        if file.suffix in (".py", ".yaml", ".md")
        for section in re.findall(
            r"docs/reference/methods\.md §(\d(?:\.\d)?)", file.read_text(encoding="utf-8")
        )
    }
    assert cited
    assert cited <= sections


# ---- the site


class Requests(HTMLParser):
    """What a browser would fetch for a page without a click."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.found.append(given.get("src"))
        elif tag == "link" and given.get("rel") not in ("prev", "next", "canonical"):
            self.found.append(given.get("href"))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None,
    reason='mkdocs is not installed: pip install -e ".[docs]"',
)
def test_the_site_builds_without_warnings_and_asks_nothing_of_others(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 25
    for page in pages:
        reader = Requests()
        reader.feed(page.read_text(encoding="utf-8"))
        assert not [url for url in reader.found if url and re.match(r"(https?:)?//", url)], page
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(
            r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")
        ), style
