"""The scenario group's files without the rest of the configuration, and what tests ask of
images.
"""

from omegaconf import OmegaConf

from lab.core.hashing import digest
from lab.core.sources import ROOT


def config(name: str):
    """conf/scenario/NAME.yaml with its defaults."""
    node = OmegaConf.load(ROOT / "conf" / "scenario" / f"{name}.yaml")
    parents = [config(p) for p in node.pop("defaults", []) if p != "_self_"]
    return OmegaConf.merge(*parents, node)


def hashes(captioned) -> set[str]:
    return {digest(image) for image in captioned.images}
