"""Controls of a table: weights that no method made. Weight noise, another training seed and a
reparametrization are negative controls, for which a verdict must fail; a model that never saw the
targets is the reference for what protection is worth.
"""

from __future__ import annotations

import json
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from lab.core.config import AsList, Flag, Positive, Text, config
from lab.core.data import ConceptCase, Kind
from lab.core.errors import UserError, as_user_error
from lab.core.hashing import digest, folder_hash, stage_key
from lab.core.seeding import generator
from lab.core.sources import ROOT
from lab.core.types import Checkpoint, Eraser, Immunizer, Log
from lab.minisd.world.vocabulary import HELD_OUT_OBJECTS, HELD_OUT_STYLES
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import load_folder, locate_folder
from lab.models.symmetries import reparametrize

RECORD = "training.json"  # beside the folder of a MiniSD
SHIPPED = ROOT / "lab/minisd/immunized"
FACTS = "facts"  # metadata of a stored U-Net: JSON with its targets and its method


@config
class WeightNoise(Immunizer):
    """Adds noise to every matrix and kernel of the U-Net: a negative control, which damages the
    model and protects no concept in particular.

    Args:
        relative: standard deviation of the noise, as a multiple of the root mean square of each
            tensor. Vectors stay as they are.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text = "weight_noise"
    relative: Positive = 0.05

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        noisy = model.copy()
        with torch.no_grad():
            for name, weight in noisy.unet.named_parameters():
                if weight.ndim > 1:
                    g = generator(seed, "weight noise", name)
                    noise = torch.randn(weight.shape, generator=g).to(weight)
                    weight += self.relative * weight.square().mean().sqrt() * noise
        return noisy


@config
class Reparametrization(Immunizer):
    """Changes attention weights so that the model computes the same and trains differently: a
    negative control, which an attacker undoes without training
    (`lab.models.symmetries.canonicalize`).

    Args:
        exponent: rows are multiplied by powers of two from 2^-exponent to 2^exponent.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text = "reparam"
    exponent: Annotated[int, Field(strict=True, ge=1, le=30)] = 7

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        changed = model.copy()
        reparametrize(changed.unet, self.exponent, seed)
        return changed


@config
class OtherWeights(Immunizer):
    """Puts another MiniSD in place of the model: one of another seed, or one that was trained
    without the targets.

    What the case erases and the other model saw in its training is erased from it too, as from the
    baseline. The concepts that it never saw are read from the record of its training
    (``training.json`` beside the model's folder).

    Args:
        paths: folders of models in diffusers layout with the shapes of the backbone; the seed of
            the experiment chooses one, in turn.
        eraser: what erases.
        never_saw_targets: refuse a model that was trained on a target of the case.

    Raises:
        UserError: no such model, no record of its training, other shapes, or a target that it saw.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    paths: Annotated[tuple[Text, ...], AsList, Field(min_length=1)]
    eraser: Eraser
    name: Text = "other_weights"
    never_saw_targets: Flag = False

    def texts(self) -> dict[str, str]:
        return self.eraser.texts()

    def may_change(self, parameter: str) -> bool:
        return True  # an independent model with an autoencoder of its own

    def fingerprint(self) -> str:
        folders = [locate_folder(path, "immunize.paths") for path in self.paths]
        return stage_key(
            folders=[folder_hash(folder) for folder in folders],
            unseen=[sorted(self._unseen(folder)) for folder in folders],
            eraser=self.eraser.fingerprint(),
        )

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        self.eraser.check(cases)

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        path = self.paths[seed % len(self.paths)]
        unseen = self._unseen(locate_folder(path, "immunize.paths"))
        seen = [c.name for c in case.targets if c.name not in unseen]
        if seen and self.never_saw_targets:
            fix = f"its model was trained on {', '.join(seen)} ({RECORD}), a target here"
            raise UserError("immunize.paths", path, fix)
        other = model.copy()
        state = load_folder(path, "immunize.paths").to(model.device).state_dict()
        with as_user_error("immunize.paths", path, "its networks have other shapes"):
            other.load_state_dict(state)
        left = tuple(e for e in case.erased if e.name not in unseen)
        return self.eraser(other, replace(case, erased=left), seed=seed) if left else other

    def _unseen(self, folder: Path) -> frozenset[str]:
        """Return the concepts that the model in ``folder`` was not trained on."""
        record = folder.resolve().parent / RECORD
        fix = "no record of its training says what it never saw"
        with as_user_error("immunize.paths", record, fix):
            recipe: dict[str, Any] = json.loads(record.read_text())["recipe"]
            unseen = frozenset(recipe.get("never_seen", ()))
        return unseen | {*HELD_OUT_OBJECTS, *HELD_OUT_STYLES}


@config
class StoredUnet(Immunizer):
    """Puts tensors from a file in place of the U-Net's: weights that a method made in an earlier
    run and that ship with a record (``action=export path=FILE.safetensors``).

    Args:
        path: the file, or the name of one that ships (``joint``); its metadata name the targets it
            is immunized against. ``{seed}`` stands for the seed: one file each.

    Raises:
        UserError: no such file, other layers, or a case with other targets.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    path: Text
    name: Text = "stored"

    def _paths(self, seed: int | Literal["*"] = "*") -> list[str]:
        """Return the file of ``seed``, or those of all."""
        name = self.path.replace("{seed}", str(seed))
        return sorted(glob(f"{SHIPPED / name}.safetensors")) or sorted(glob(name)) or [name]

    def _read(self, path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        fix = "is no U-Net that `python run.py action=export path=FILE.safetensors` wrote"
        with as_user_error("immunize.path", path, fix), safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()[FACTS])

    def fingerprint(self) -> str:
        files = [self._read(path) for path in self._paths()]
        return stage_key(files=[(digest(*tensors.values()), facts) for tensors, facts in files])

    def check(self, cases: tuple[ConceptCase, ...]) -> None:
        facts = [self._read(path)[1] for path in self._paths()]
        immune = set.intersection(*(set(each["targets"]) for each in facts))
        for case in cases:
            if missing := [c.name for c in case.targets if c.name not in immune]:
                fix = f"is immunized against {', '.join(sorted(immune))}, not {', '.join(missing)}"
                raise UserError("immunize.path", self.path, fix)

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        stored = model.copy()
        with as_user_error("immunize.path", self.path, "its layers are not the backbone's"):
            tensors = {k: v.float() for k, v in self._read(self._paths(seed)[0])[0].items()}
            stored.unet.load_state_dict(stored.unet.state_dict() | tensors)
        return stored
