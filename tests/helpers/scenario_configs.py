"""The scenario group's files without the rest of the configuration, and what tests ask of
images.
"""

from pathlib import Path

from omegaconf import OmegaConf

from lab.core.hashing import digest

CONF = Path(__file__).resolve().parents[2] / "conf"


def config(name: str):
    """conf/scenario/NAME.yaml with its defaults."""
    node = OmegaConf.load(CONF / "scenario" / f"{name}.yaml")
    parents = [config(p) for p in node.pop("defaults", []) if p != "_self_"]
    return OmegaConf.merge(*parents, node)


def hashes(captioned) -> set[str]:
    return {digest(image) for image in captioned.images}
