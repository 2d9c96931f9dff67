"""The scripts of docs/examples as modules."""

import importlib.util

from lab.core.sources import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
