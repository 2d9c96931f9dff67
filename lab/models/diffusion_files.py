"""A Stable Diffusion checkpoint on disk: where it lies and whether it can be loaded. Opens headers,
no weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lab.core.errors import UserError, nearest
from lab.core.options import local
from lab.models.diffusion import PIPELINES

KEY = "backbone.path"
MINISD = Path(__file__).resolve().parent.parent / "minisd" / "weights" / "model"
# part → library and class: nothing else is imported, whatever a model_index.json asks for
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors"
)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def locate(path: object) -> Path | str:
    """The folder that ``path`` means (``minisd`` is the package's own), or the hub name that it is.

    Raises:
        UserError: neither; a file; MiniSD's weights that are not there yet.
    """
    if not isinstance(path, str) or not path.strip():
        raise UserError(
            KEY, path, "must be the path of a diffusers folder, a hub name OWNER/MODEL, or minisd."
        )
    if path == "minisd":
        if not (MINISD / "model_index.json").is_file():
            raise UserError(
                KEY,
                path,
                "its weights are not there yet; make them: `python run.py "
                "experiment=train_minisd`.",
            )
        return MINISD
    place = local(KEY, path)
    if place.is_dir():
        return place
    if place.is_file():
        raise UserError(
            KEY, path, f"is a file; a folder in diffusers layout is needed. {_convert_file(place)}"
        )
    if _HUB_NAME.fullmatch(path) and not place.parent.is_dir():
        return path
    beside = [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
    beside = [name for name in beside if not name.startswith((".", "__"))] + ["minisd"] * (
        path == place.name
    )
    hint = f" Known here: {nearest(place.name, beside)}" if beside else ""
    raise UserError(KEY, path, f"there is no such folder.{hint}")


def fetch(name: str, revision: str | None, variant: str | None) -> Path:
    """The hub's model ``name`` in its local cache, downloaded where needed; safetensors only.

    Raises:
        UserError: no network and not in the cache, no such model, no safetensors weights.
    """
    from diffusers import DiffusionPipeline

    skip = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    try:
        found = DiffusionPipeline.download(
            name, revision=revision, variant=variant, use_safetensors=True, **skip
        )
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if "safetensors" in str(error):
            fix = (
                f"has no safetensors weights ({reason}); other formats are refused. "
                f"{_convert_folder(name)}"
            )
            raise UserError(KEY, name, fix) from error
        fix = (
            f"is no folder here and could not be had from the hub ({type(error).__name__}: "
            f"{reason}). Set it to a "
            "local folder, point HF_HOME to a filled cache, or on a machine with network "
            f"run `hf download {name}`."
        )
        raise UserError(KEY, name, fix) from error
    return Path(found)


def check(folder: Path, variant: str | None) -> tuple[str, tuple[str, ...]]:
    """The pipeline class of ``folder`` and its parts, once every part has whole safetensors
    weights.

    Raises:
        UserError: no ``model_index.json``, an unknown pipeline, another text encoder, autoencoder
            or U-Net, missing, damaged or pickled weights, another variant.
    """
    index = _index(folder)
    name = index.get("_class_name")
    if name not in PIPELINES:
        told = (
            f"holds a {name}; {' and '.join(PIPELINES)} can be immunized (Stable "
            "Diffusion 1.x, 2.x and XL)."
        )
        raise UserError(KEY, folder, told)
    parts = tuple(PARTS) if name == "StableDiffusionXLPipeline" else tuple(PARTS)[:-1]
    for part in parts:
        given = index.get(part)
        if not isinstance(given, list) or tuple(given) != PARTS[part]:
            told = f"its {part} must be {'.'.join(PARTS[part])}, model_index.json says {given}."
            raise UserError(KEY, folder, told)
        _check_weights(folder, part, variant)
    return str(name), parts


def _index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        single = sorted(p for p in folder.iterdir() if p.suffix in (".ckpt", ".safetensors"))
        inside = sorted(p.parent.name for p in folder.glob("*/model_index.json"))
        fix = "holds no model_index.json, so it is no pipeline in diffusers layout."
        if inside:
            fix += f" Inside it: {', '.join(inside[:3])}."
        elif single:
            fix += f" {_convert_file(single[0])}"
        raise UserError(KEY, folder, fix)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(KEY, file, f"is no JSON ({error}); the folder may be damaged.") from error
    if not isinstance(index, dict):
        raise UserError(KEY, file, "must hold one JSON object; the folder may be damaged.")
    return index


def _check_weights(folder: Path, part: str, variant: str | None) -> None:
    files = sorted((folder / part).glob("*")) if (folder / part).is_dir() else []
    known = {p: match["variant"] for p in files if (match := _WEIGHTS.fullmatch(p.name))}
    if not known:
        pickled = [p.name for p in files if p.suffix in _PICKLED]
        if not pickled:
            raise UserError(
                KEY,
                folder,
                f"its {part} has no weights (*.safetensors); the folder is not complete.",
            )
        fix = (
            f"{part}/{pickled[0]} is no safetensors file and is not loaded, since that "
            "could run code."
        )
        raise UserError(KEY, folder, f"{fix} {_convert_folder(str(folder))}")
    mine = [p for p, found in known.items() if found == variant]
    if not mine:
        others = ", ".join(sorted({found or "null" for found in known.values()}))
        raise UserError(
            "backbone.variant",
            variant,
            f"{folder}/{part} has weights of variant {others} only; set it so.",
        )
    for path in mine:
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                KEY, path, f"cannot be read as safetensors ({error}); the file may be damaged."
            ) from error


def _convert_folder(name: str) -> str:
    to = f"{Path(name).name}-safetensors"
    code = (
        "from diffusers import DiffusionPipeline as P; "
        f"P.from_pretrained({name!r}).save_pretrained({to!r})"
    )
    return f'Convert it once, if you trust its source, and set {KEY}={to}: `python -c "{code}"`'


def _convert_file(file: Path) -> str:
    code = (
        "from diffusers import StableDiffusionPipeline as P; "
        f"P.from_single_file({str(file)!r}).save_pretrained({file.stem!r})"
    )
    return (
        f'Convert it once, if you trust its source, and set {KEY}={file.stem}: `python -c "{code}"`'
    )


def tokenizer_files(folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` beside a BPE's ``tokenizer.json`` where they are
    missing.

    transformers 5 saves the one file, transformers 4 loads a `CLIPTokenizer` from the two.
    """
    source = folder / "tokenizer.json"
    if not source.is_file() or (folder / "vocab.json").is_file():
        return
    model = json.loads(source.read_text(encoding="utf-8"))["model"]
    if model.get("type") != "BPE":
        return
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "vocab.json").write_text(
        json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8"
    )
