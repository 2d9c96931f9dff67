"""`action=new`: the files of a method of one's own, which run as they are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jinja2
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lab.core.errors import UserError, nearest
from lab.runner.batch import relative

TEMPLATES = Path(__file__).with_name("templates")
GROUPS = {"immunizer": "immunize", "attacker": "attacks", "metric": "eval", "scenario": "scenario"}
TRY = {  # words that try it in a small run
    "immunizer": "immunize={}",
    "attacker": "attacks=[{}]",
    "metric": "experiment=house_price eval=[{}]",
    "scenario": "experiment=house_price scenario={}",
}


def create(cfg: DictConfig) -> None:
    """Write class, YAML and test of a ``kind`` called ``name`` into the folder ``path``.

    Raises:
        UserError: no such kind, a name that is no free module name, or files that exist.
    """
    kind, name, folder = cfg.kind, str(cfg.name), Path(cfg.path or "own")
    if kind not in GROUPS:
        raise UserError("kind", kind, nearest(str(kind), GROUPS))
    if not any(word.startswith("name=") for word in HydraConfig.get().overrides.task):
        raise UserError("name", None, f"needs a value: action=new kind={kind} name=mine.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or importlib.util.find_spec(name):
        fix = "must be a module name that is free: small letters, digits and _."
        raise UserError("name", name, fix)
    files = {
        folder / f"{name}.py": f"{kind}.py.txt",
        folder / "conf" / GROUPS[kind] / f"{name}.yaml": f"{kind}.yaml.txt",
        folder / f"test_{name}.py": "test.py.txt",
    }
    for file in files:
        if file.exists():
            raise UserError("path", file, "exists; choose another name or folder.")
    words = TRY[kind].format(name)
    values = {
        "name": name,
        "kind": kind,
        "words": words.split(),
        "class_name": "".join(part.title() for part in name.split("_")),
    }
    for file, template in files.items():
        source = (TEMPLATES / template).read_text()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(jinja2.Template(source, keep_trailing_newline=True).render(values))
        print(f"wrote {relative(file)}")
    place = relative(folder)
    print(f"run:  PYTHONPATH={place} python run.py --config-dir {place}/conf {words} debug=wiring")
    print(f"test: python -m pytest {place}/test_{name}.py")
