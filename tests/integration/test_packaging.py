"""Wheel and source archive: complete, light without extras, and at home in any folder that they are
called from.
"""

import ast
import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lab.core.sources import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CODE = [
    ROOT / "run.py",
    *(f for p in ("lab", "immunize", "attacks", "eval") for f in (ROOT / p).rglob("*.py")),
]
# imported when their action is asked for; a missing package is reported with its extra
OF_ONE_ACTION = ("lab/cli/search.py", "lab/tracking/workspace.py")
INSTALLED = ("lab", "immunize", "attacks", "eval", "conf", "sweeps")
# loads MiniSD from where the package lies, and paints
MINISD = """
import json, sys
import torch
from lab.models.diffusion_backbone import MINISD
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(MINISD)
pipe.set_progress_bar_config(disable=True)
options = {"output_type": "np", "generator": torch.manual_seed(0)}
image = pipe("a photo of a cat", num_inference_steps=2, **options).images
json.dump({"folder": str(MINISD), "shape": list(image.shape)}, sys.stdout)
"""


def name_of(requirement):
    return re.sub(r"[-_.]+", "-", Requirement(requirement).name).lower()


def imported(file):
    """Top-level names that ``file`` imports: {name: whether at import of the module}."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for top in (name.partition(".")[0] for name in names):
            found[top] = found.get(top, False) or node in tree.body
    return found


def test_every_import_is_declared():
    """Names imported with a module belong to the core; those inside functions to the core or to an
    extra.
    """
    core = {name_of(r) for r in PROJECT["dependencies"]}
    extras = {name_of(r) for requirements in EXTRAS.values() for r in requirements}
    anywhere = closure(core) | extras  # what one function alone uses may come with another package
    own = {*INSTALLED, "run"}
    distributions = metadata.packages_distributions()
    for file in CODE:
        for top, at_import in imported(file).items():
            if top in own or top in sys.stdlib_module_names:
                continue
            names = {re.sub(r"[-_.]+", "-", d).lower() for d in distributions.get(top, [top])}
            core_only = at_import and file.relative_to(ROOT).as_posix() not in OF_ONE_ACTION
            assert names & (core if core_only else anywhere), (
                f"{file.relative_to(ROOT)} imports {top}, in no list"
            )


def closure(names):
    """``names`` and, as far as they are installed here, all that they need without extras."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for text in required:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(name_of(text))
    return found


# ---- building and installing


def sh(*command, cwd, **env):
    outside = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k not in outside} | env,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(kind, source, out):
    """Build backend of pyproject.toml in ``source``; returns the file."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    sh(sys.executable, "-c", code, out, cwd=source)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A source archive of the checkout, and the wheel that is built from this archive alone."""
    work = tmp_path_factory.mktemp("build")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if files.returncode != 0:
        pytest.skip(
            "not a git checkout: what belongs to the project cannot be told from what lies "
            "beside it"
        )
    tracked = [f for f in files.stdout.splitlines() if (ROOT / f).is_file()]
    for file in tracked:
        target = work / "source" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target)
    sdist = build("sdist", work / "source", work / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    return tracked, sdist, build("wheel", next((work / "unpacked").iterdir()), work / "wheel")


@pytest.mark.slow
def test_archives_hold_everything_that_runs(archives):
    tracked, sdist, wheel = archives
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    missing = {
        f for f in tracked if f not in inside and not f.startswith((".gitignore", "outputs/"))
    }
    assert not missing, f"not in the source archive: {sorted(missing)[:10]}"
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f for f in tracked if f.split("/")[0] in INSTALLED} | {"run.py"}
    assert wanted <= names, f"not in the wheel: {sorted(wanted - names)[:10]}"
    others = {n.split("/")[0] for n in names} - {*INSTALLED, "run.py"}
    assert len(others) == 1, f"in the wheel, and not of the packages: {others}"
    assert not [n for n in names if n.endswith((".pyc", ".pkl", ".pt", ".bin"))]


def runs_elsewhere(python, folder):
    """Run the installed command in ``folder`` and look at what it wrote, and where."""
    site = Path(
        sh(python, "-c", "import lab; print(lab.__file__)", cwd=folder).strip()
    ).parent.parent
    assert site != ROOT

    def files():
        inside = {f for name in INSTALLED for f in (site / name).rglob("*")}
        return {f for f in inside if f.suffix != ".pyc" and f.name != "__pycache__"}

    before = files()
    told = sh(
        python.parent / "immunization-bench",
        "experiment=house_price",
        "debug=smoke",
        "tracker=none",
        "budget.horizon=3",
        cwd=folder,
    )
    record = json.loads((folder / re.search(r"record: (\S+)", told)[1]).read_text())
    assert record["status"] == "ok"
    assert (folder / "outputs/cache").is_dir()
    assert next(folder.rglob("report.html"))
    assert record["provenance"]["git_sha"] is None, (
        "the commit of the folder around the environment"
    )
    found = json.loads(sh(python, "-c", MINISD, cwd=folder))
    assert Path(found["folder"]).is_relative_to(site)
    assert found["shape"] == [1, 64, 64, 3]
    assert files() == before, "the run wrote into the installed package"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_archive_runs_from_another_folder(archives, kind, tmp_path):
    """Installed alone; the packages that it needs are those of this environment. The folder is a
    repository.
    """
    _, sdist, wheel = archives
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(
        ["git", "-C", tmp_path, *identity, "commit", "-q", "--allow-empty", "-m", "theirs"],
        check=True,
    )
    venv.create(tmp_path / ".venv", with_pip=False)
    python = tmp_path / ".venv/bin/python"
    site = Path(
        sh(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
        ).strip()
    )
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "needs.pth").write_text("\n".join(sorted(paths)) + "\n")
    # an editable install of this checkout may lie in those folders: pip would call the requirement
    # satisfied
    sh(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--ignore-installed",
        wheel if kind == "wheel" else sdist,
        cwd=tmp_path,
    )
    runs_elsewhere(python, tmp_path)
