"""Vision networks by name: timm architectures, with embedded, local or hub weights."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import timm
import torch
from torch import nn

from lab.core.data import Case, Kind
from lab.core.errors import UserError, nearest
from lab.core.options import count, local
from lab.core.seeding import derive
from lab.core.types import Backbone, FeatureModel
from lab.models import weights as loading
from lab.models.chains import VisionModel, chain


class VisionBackbone(Backbone):
    """A deep feature extractor θ_0: a timm network without its classifier, as a chain of named
    blocks.

    Args:
        model: a timm architecture, e.g. ``resnet18``.
        weights: ``imagenet_package`` (EfficientNet-Lite0 from the package index), ``timm`` (timm's
            pretrained weights, from the hub or its local cache), ``random`` (initialised by the
            run's seed), or the path of a .safetensors or .pth state dict, of the timm network (a
            classifier in it is ignored) or of a model that this project saved.
        image_size: side to which images are resized; None takes them as they come. Transformers
            have a fixed size and take their own where None is given.

    Raises:
        UserError: an unknown model, weights of another model, a file that is no state dict.
    """

    kind: ClassVar[Kind] = "deep"

    def __init__(
        self,
        *,
        model: str,
        weights: str = "timm",
        image_size: int | None = None,
        name: str = "vision",
    ) -> None:
        if not isinstance(model, str) or not timm.is_model(model.split(".")[0]):
            raise UserError("backbone.model", model, nearest(str(model), timm.list_models()))
        if image_size is not None:
            count("backbone.image_size", image_size, 32)
        if not isinstance(weights, str):
            raise UserError(
                loading.KEY,
                weights,
                "must be imagenet_package, timm, random, or the path of a file.",
            )
        if weights == "imagenet_package" and model != loading.PACKAGE_MODEL:
            fix = (
                f"holds the weights of {loading.PACKAGE_MODEL} only; use timm, random or a "
                f"path for {model}."
            )
            raise UserError(loading.KEY, weights, fix)
        self.name, self.model, self.weights = name, model, weights
        config = timm.get_pretrained_cfg(model) or timm.models.PretrainedCfg()
        self._classifier = config.classifier
        self._mean, self._std = config.mean, config.std
        self._fixed = bool(config.fixed_input_size)
        self.image_size = image_size or (int(config.input_size[-1]) if self._fixed else None)
        self._built: dict[int | None, VisionModel] = {}
        if self.weights not in ("timm", "random"):
            self._built[None] = self._load(
                0
            )  # a damaged file or another model's shows before any data is loaded

    def build(self, case: Case, seed: int) -> FeatureModel:
        """θ_0: the same weights on every call with the same seed, in a model of its own."""
        x = case.benign.train.x
        if x.ndim != 4 or x.shape[1] != 3:
            fix = (
                f"takes images [n, 3, h, w]; the scenario gives {list(x.shape)}. Use "
                "backbone=linear."
            )
            raise UserError("backbone", self.name, fix)
        key = seed if self.weights == "random" else None
        if key not in self._built:
            self._built = {key: self._load(seed)}
        return copy.deepcopy(self._built[key])

    def timm_names(self) -> dict[str, str]:
        """Every name of a built model's ``state_dict`` → the name of the same tensor in the timm
        network.
        """
        with torch.random.fork_rng(devices=[]):
            network = self._network()
        theirs = {
            id(t): name for name, t in network.state_dict(keep_vars=True).items()
        }  # the chain shares them
        return {
            name: theirs[id(t)]
            for name, t in self._wrap(network).state_dict(keep_vars=True).items()
        }

    def _load(self, seed: int) -> VisionModel:
        if self.weights == "timm":
            return self._wrap(self._from_hub())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                derive(seed, "backbone", self.model)
            )  # timm initialises from the global stream
            network = self._network()
        if self.weights == "random":
            return self._wrap(network)
        if self.weights == "imagenet_package":
            state, source = loading.imagenet_package(), "imagenet_package"
        else:
            state, source = loading.read(local(loading.KEY, self.weights)), self.weights
        own = self._wrap(copy.deepcopy(network))
        if state.keys() == own.state_dict().keys():
            loading.fill(own, state, source)
            return own
        heads = (
            (self._classifier,)
            if isinstance(self._classifier, str)
            else tuple(self._classifier or ())
        )
        loading.fill(network, state, source, tuple(f"{head}." for head in heads))
        return self._wrap(network)

    def _network(self, **options: Any) -> nn.Module:
        if self._fixed and self.image_size is not None:
            options["img_size"] = self.image_size
        return timm.create_model(self.model, **{"pretrained": False, "num_classes": 0, **options})

    def _from_hub(self) -> nn.Module:
        try:
            return self._network(pretrained=True)
        except Exception as error:  # the hub client raises its own, urllib's, httpx's and OS errors
            reason = (str(error) or type(error).__name__).splitlines()[0]
            fix = (
                f"timm could not load its weights for {self.model} ({type(error).__name__}: "
                f"{reason[:200]}). Set "
                "backbone.weights to a local .safetensors or .pth file, to random, or point "
                "HF_HOME to a filled cache."
            )
            raise UserError(loading.KEY, self.weights, fix) from error

    def _wrap(self, network: nn.Module) -> VisionModel:
        width = int(getattr(network, "head_hidden_size", network.num_features))  # type: ignore[arg-type]
        return VisionModel(chain(network), width, self._mean, self._std, self.image_size)
