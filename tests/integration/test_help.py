"""`python run.py --help`: what it names exists, and its commands compose."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
HELP = OmegaConf.to_container(
    OmegaConf.load(ROOT / "conf" / "hydra" / "help" / "bench.yaml"), resolve=False
)["template"]
COMMANDS = re.findall(r"^ +(python run\.py (?!action).*?)(?:  .*)?$", HELP, flags=re.M)


def test_sweeps_are_listed():
    """Hydra lists the groups of conf/ by itself, but not a folder on its search path."""
    listed = re.search(r"^sweeps: (.*)$", HELP, flags=re.M)
    assert listed is not None
    assert listed[1].split(", ") == sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))


def test_groups_that_are_explained_exist():
    named = re.findall(r"^  ([a-z]+) {2,}\S", HELP, flags=re.M)
    assert len(named) == 12
    for group in named:
        assert (ROOT / "conf" / group).is_dir() or (ROOT / group).is_dir(), group


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command, tmp_path):
    arguments = [a for a in shlex.split(command)[2:] if a != "-m"]
    if any(a.startswith("sweeps=") for a in arguments):
        assert (ROOT / "sweeps" / f"{arguments[0].partition('=')[2]}.yaml").is_file()
        return
    done = subprocess.run(
        [
            sys.executable,
            "run.py",
            *(a.split(",")[0] if "[" not in a else a for a in arguments),
            "--cfg",
            "job",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
