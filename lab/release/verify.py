"""`action=verify`: an exported folder, checked again from its bytes to its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from eval.report.outcomes import outcome
from lab.core import record as records
from lab.core.errors import UserError
from lab.core.options import local
from lab.core.types import same_weights
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import DiffusionBackbone
from lab.release.checksums import SUMS, differences, read_sums, sha256
from lab.release.delta import load_delta, state_hash
from lab.release.export import CARD, CONFIG, DELTA, FACTS, FORMAT, RECORD, WEIGHTS
from lab.release.source import backbone_of

_PASSED, _FAILED, _OPEN = "ok", "FAILED", "not checked"
_SHOWN = 20  # files that a message lists


@dataclass
class Report:
    """What was looked at: lines of (state, what, told), and the files that failed."""

    folder: Path
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def passed(self, what: str, told: str) -> None:
        self.lines.append((_PASSED, what, told))

    def open(self, what: str, told: str) -> None:
        self.lines.append((_OPEN, what, told))

    def fail(self, what: str, file: str, told: str) -> None:
        self.lines.append((_FAILED, what, f"{file} {told}"))
        self.failed.append((file, told))

    def text(self) -> str:
        return "\n".join(f"  {state:<11}  {what:<9}  {told}" for state, what, told in self.lines)

    def require(self) -> None:
        """Raises `UserError` that names every file at fault."""
        if self.failed:
            shown = "; ".join(f"{file} {told}" for file, told in self.failed[:_SHOWN])
            more = f"; and {len(self.failed) - _SHOWN} more" if len(self.failed) > _SHOWN else ""
            raise UserError("path", self.folder, f"is not what was exported: {shown}{more}.")


def verify(cfg: DictConfig) -> None:
    """Check the folder ``path`` and print what was checked.

    Raises:
        UserError: no such folder, or one that is not what was exported; names every file at fault.
    """
    if cfg.path is None:
        raise UserError(
            "path", None, "name the exported folder: `python run.py action=verify path=DIR`."
        )
    report = check(local("path", cfg.path), base=cfg.export.base)
    print(f"verify: {report.folder}\n{report.text()}")
    report.require()
    print(
        "verified"
        + (
            ", as far as it could be checked here"
            if any(s == _OPEN for s, *_ in report.lines)
            else ""
        )
    )


def check(folder: Path, base: str | None = None) -> Report:
    """Hashes, record, layout, weights, delta. What later steps need is skipped once a step has
    failed.

    Args:
        base: folder or hub name of the published model, where the record's own path does not lead
            to it here.

    Raises:
        UserError: ``folder`` is no folder, or holds no ``SHA256SUMS``.
    """
    if not folder.is_dir():
        raise UserError("path", folder, "there is no such folder.")
    report = Report(folder)
    for name, told in differences(folder):
        report.fail("hashes", name, told)
    if report.failed:
        return report
    report.passed(
        "hashes",
        f"{len(read_sums(folder))} files; fingerprint of {SUMS}: {sha256(folder / SUMS)[:16]}",
    )
    facts, record = _papers(report)
    if report.failed:
        return report
    if facts["kind"] == "diffusion":
        _diffusion(report, facts, record, base)
    else:
        _features(report, facts)
    return report


def _papers(report: Report) -> tuple[dict[str, Any], records.Record]:
    """Facts, record and card: there, readable and about the same run."""
    folder = report.folder
    facts: dict[str, Any] = {}
    record: records.Record = {}
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if (
            not isinstance(facts, dict)
            or facts.get("format") != FORMAT
            or facts.get("kind") not in _KINDS
        ):
            report.fail(
                "record", FACTS, f"does not say format={FORMAT} and what kind of model this is"
            )
        elif missing := [key for key in (*_FACTS, *_FACTS_OF[facts["kind"]]) if key not in facts]:
            report.fail("record", FACTS, f"lacks {', '.join(missing)}")
    except (OSError, ValueError) as error:
        report.fail("record", FACTS, f"cannot be read as JSON ({error})")
    try:
        record = records.read(folder / RECORD)
    except UserError as error:
        report.fail("record", RECORD, error.fix)
    text = ""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except FileNotFoundError:
        report.fail("record", CARD, "is missing")
    except (OSError, UnicodeDecodeError) as error:
        report.fail("record", CARD, f"cannot be read ({error})")
    if report.failed:
        return facts, record
    if record["content_hash"] not in text:
        report.fail("record", CARD, f"does not name the content hash of {RECORD}")
    if f"**{outcome(record).headline}**" not in text:
        report.open(
            "record",
            f"{CARD} does not tell {RECORD}'s verdict as this version does; go by the record",
        )
    _chosen(report, facts, record)
    _pictures(report, record)
    if not report.failed:
        told = (
            f"{record['name']}, {facts['model']}, case {facts['case']}, seed "
            f"{facts['seed']}: {record['status']}"
        )
        report.passed("record", told)
    return facts, record


def _chosen(report: Report, facts: dict[str, Any], record: records.Record) -> None:
    """The facts are about one immunization of the record, which has weights."""
    cells = [
        c for c in record["cells"] if c["stage"] == "immunize" and c["key"] == facts["stage_key"]
    ]
    mine = [c for c in cells if all(c[name] == facts[name] for name in ("model", "case", "seed"))]
    if facts["content_hash"] != record["content_hash"] or not cells:
        report.fail("record", FACTS, f"speaks of another run than {RECORD}")
    elif not mine:
        report.fail(
            "record",
            FACTS,
            f"names another model, case or seed than {RECORD} has for its stage_key",
        )
    elif mine[0]["status"] != "ok":
        report.fail(
            "record", FACTS, f"names an immunization that {RECORD} calls {mine[0]['status']}"
        )


def _pictures(report: Report, record: records.Record) -> None:
    for name, image in record.get("images", {}).items():
        path = report.folder / image["path"]
        if not path.is_file():
            report.open("record", f"picture {name} is not here")
        elif sha256(path) != image["sha256"]:
            report.fail("record", image["path"], f"is not the picture that {RECORD} names")


def _finite(report: Report, name: str, module: nn.Module) -> None:
    bad = [
        k
        for k, v in module.state_dict().items()
        if v.is_floating_point() and not bool(torch.isfinite(v).all())
    ]
    if bad:
        report.fail("weights", name, f"holds nan or inf in {bad[0]} ({len(bad)} tensors)")


def _diffusion(
    report: Report, facts: dict[str, Any], record: records.Record, base: str | None
) -> None:
    folder = report.folder
    try:
        model = DiffusionBackbone(path=str(folder), device="cpu").build(None, 0)
    except UserError as error:
        report.fail("layout", f"{error.value}", error.fix)
        return
    report.passed("layout", f"diffusers loads it as {facts['pipeline']}")
    for name, module in (("unet", model.unet), *_beside(model)):
        _finite(report, name, module)
    unet = {
        k: v
        for file in sorted((folder / "unet").glob("*.safetensors"))
        for k, v in load_file(file).items()
    }
    if state_hash(unet) != facts["unet"]:  # of the file: loading has made float32 of it
        report.fail("weights", "unet", f"does not hold the weights that {FACTS} names")
    if not report.failed:
        report.passed("weights", f"finite; U-Net SHA-256 {facts['unet'][:16]}")
        _delta(report, facts, unet, model, record, base)


def _beside(model: DiffusionModel) -> list[tuple[str, nn.Module]]:
    """The parts other than the U-Net, by their folders."""
    texts = [
        (f"text_encoder{'' if i == 0 else f'_{i + 1}'}", m)
        for i, m in enumerate(model.text_encoders)
    ]
    return [("vae", model.vae), *texts]


def _settings(model: DiffusionModel) -> tuple[list[Any], dict[str, Any]]:
    """What tokenizers make of texts, and what the scheduler is set to."""
    words = []
    for tokenizer in model.tokenizers:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        known = (
            json.loads(backend.to_str())
            if backend is not None
            else {"vocabulary": tokenizer.get_vocab()}
        )
        words.append(
            {k: v for k, v in known.items() if k not in ("padding", "truncation")}
        )  # of the last call
    return words, {k: v for k, v in model.scheduler.config.items() if not k.startswith("_")}


def _delta(
    report: Report,
    facts: dict[str, Any],
    unet: dict[str, Tensor],
    model: DiffusionModel,
    record: records.Record,
    base: str | None,
) -> None:
    """delta + original = weights, and nothing beside the U-Net differs from the original."""
    try:
        with safe_open(report.folder / DELTA, "pt") as handle:
            of = (handle.metadata() or {}).get("base")
            changed = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        report.fail("delta", DELTA, f"cannot be read as safetensors ({error})")
        return
    wrong = next(
        (k for k, v in changed.items() if k not in unet or not torch.equal(v, unet[k])), None
    )
    if wrong is not None or of != facts["base_unet"]:
        told = (
            f"belongs to another original than {FACTS} names"
            if wrong is None
            else f"holds another {wrong} than unet"
        )
        report.fail("delta", DELTA, told)
        return
    try:
        original = _original(facts, record, base, next(iter(unet.values())).dtype)
    except UserError as error:
        if base is not None:
            raise UserError(
                "export.base", base, f"is no model that can be loaded: {error}"
            ) from error
        told = (
            f"{len(changed)} tensors are those of unet; the original is not here, name "
            f"it: export.base=DIR ({error})"
        )
        report.open("delta", told)
        return
    if state_hash(original.unet.state_dict()) != of:
        if base is not None:
            raise UserError(
                "export.base", base, "has other weights than the original of this export."
            )
        report.open(
            "delta",
            "what was found as the original has other weights; name the right one: export.base=DIR",
        )
        return
    made = load_delta(original, report.folder / DELTA).unet.state_dict()
    if made.keys() != unet.keys() or not all(torch.equal(made[k], unet[k]) for k in unet):
        report.fail("delta", "unet", f"is not the original plus {DELTA}")
    for (name, mine), theirs in zip(_beside(model), _beside(original), strict=True):
        if not same_weights(mine, theirs[1].float()):
            report.fail("delta", name, "differs from the original's")
    for part, here, there in zip(
        ("tokenizers", "scheduler"), _settings(model), _settings(original), strict=True
    ):
        if here != there:
            report.fail("delta", part, "differs from the original's")
    if not report.failed:
        told = f"original + {len(changed)} of {len(unet)} tensors = unet, bit for bit"
        report.passed(
            "delta",
            f"{told}; autoencoder, text encoders, tokenizers and scheduler are the original's",
        )


def _original(
    facts: dict[str, Any], record: records.Record, base: str | None, dtype: torch.dtype
) -> DiffusionModel:
    """What the run loaded, in the type it was loaded in."""
    path = {} if base is None else {"path": base}
    original: DiffusionModel = backbone_of(record, device="cpu", dtype="fp32", **path).build(
        None, facts["seed"]
    )
    original = original.to(dtype)
    if dtype == torch.float16:
        original.vae.float()  # as `lab.models.diffusion_backbone` does
    return original


def _features(report: Report, facts: dict[str, Any]) -> None:
    folder = report.folder
    try:
        tensors = load_file(folder / WEIGHTS)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        report.fail("layout", f"{WEIGHTS}, {CONFIG}", f"cannot be read ({error})")
        return
    if not isinstance(config, dict):
        report.fail("layout", CONFIG, "holds no settings by name")
        return
    if facts["kind"] == "linear":
        fine = list(tensors) == ["theta"] and list(tensors["theta"].shape) == config.get("theta")
        if not fine:
            report.fail(
                "layout", WEIGHTS, f"does not hold the one matrix theta of the shape in {CONFIG}"
            )
    else:
        _timm(report, tensors, config)
    if any(not bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
        report.fail("weights", WEIGHTS, "holds nan or inf")
    if state_hash(tensors) != facts["weights"]:
        report.fail("weights", WEIGHTS, f"does not hold the weights that {FACTS} names")
    if not report.failed:
        report.passed("layout", f"{len(tensors)} tensors as {CONFIG} says")
        report.passed("weights", f"finite; SHA-256 {facts['weights'][:16]}")


def _timm(report: Report, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    import timm

    try:
        network = timm.create_model(
            str(config.get("architecture")), pretrained=False, num_classes=0, **config["model_args"]
        )
        network.load_state_dict(tensors)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        report.fail(
            "layout",
            WEIGHTS,
            f"does not load into timm's {config.get('architecture')}: {error}"[:300],
        )


_KINDS = ("diffusion", "deep", "linear")
_FACTS = ("model", "case", "seed", "stage_key", "content_hash")
_FACTS_OF = {
    "diffusion": ("pipeline", "unet", "base_unet"),
    "deep": ("weights",),
    "linear": ("weights",),
}
