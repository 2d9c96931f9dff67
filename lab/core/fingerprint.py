"""Facts about cases and models that the stage cache and the checks need."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lab.core.data import ConceptCase, Sampling
from lab.core.hashing import digest, stage_key
from lab.core.types import AnyCase, Model


def _plain(value: Any, tensors: list[Tensor], derived: bool) -> Any:
    """``value`` as JSON; every tensor in it is moved to ``tensors`` and leaves its number."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"tensor {len(tensors)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [
            f.name for f in dataclasses.fields(value) if derived or not f.metadata.get("derived")
        ]
        return {name: _plain(getattr(value, name), tensors, derived) for name in kept}
    if isinstance(value, tuple | list):
        return [_plain(item, tensors, derived) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, tensors, derived) for key, item in value.items()}
    return value


def fingerprint(case: AnyCase, derived: bool = True) -> str:
    """SHA-256 over everything that a case holds: pictures or rows, labels, prompts and roles.

    ``derived``: what follows from the rest counts too (fields that say so), as it has to for a
        cached stage.
    """
    tensors: list[Tensor] = []
    plain = _plain(case, tensors, derived)
    return stage_key(case=plain, tensors=digest(*tensors))


def unpainted(case: AnyCase) -> AnyCase:
    """What erasers and immunizers see: how pictures are generated is the attacks' and the metrics'
    business, so that other sampling steps do not immunize again.
    """
    return dataclasses.replace(case, sampling=Sampling()) if isinstance(case, ConceptCase) else case


_TOKENIZER = (
    "model",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "added_tokens",
)  # padding changes with use
_ORIGIN = (
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
)  # of a file, not of what it computes


def beside_weights(model: Model) -> dict[str, str]:
    """SHA-256 of what a text-to-image model computes with besides its weights: noise schedule,
    prediction type, scaling factors, tokenizers. Empty for other models, which their backbone's
    options describe.
    """
    if getattr(model, "kind", None) != "diffusion":
        return {}
    encoders = [encoder.config.to_dict() for encoder in model.text_encoders]
    configs = [model.unet.config, model.vae.config, model.scheduler.config, *encoders]
    told = [
        {k: v for k, v in c.items() if not k.startswith("_") and k not in _ORIGIN} for c in configs
    ]
    facts = {"configs": told, "tokenizers": [_tokenizer(t) for t in model.tokenizers]}
    facts |= {"pipeline": model.pipeline_class, "zero_negative": model.zero_negative}
    return {"settings": stage_key(facts=json.dumps(facts, sort_keys=True, default=str))}


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole: Mapping[str, Any] = (
        json.loads(backend.to_str()) if backend is not None else {"model": tokenizer.get_vocab()}
    )
    return {"context": tokenizer.model_max_length, **{key: whole.get(key) for key in _TOKENIZER}}
