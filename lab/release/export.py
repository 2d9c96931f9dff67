"""``action=export``: one immunized model of a record in an open layout, with delta, model card,
record and hashes; or what one attack of a record ended with.

A text-to-image model becomes a diffusers pipeline, a timm network a folder that timm loads, a
linear extractor one matrix. Nobody needs this project to load them. `lab.release.verify` checks
such a folder again.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import ModelCard, ModelCardData
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from attacks.diffusion.export import export as write_attack_weights
from eval.report.leaderboard import columns
from eval.report.outcomes import outcome
from eval.report.words import ARROWS, figure, flatten, heading, interval, support, typed
from immunize.controls import FACTS as UNET_FACTS
from lab.core import record as records
from lab.core.cache import Artifact, StageCache
from lab.core.data import ConceptCase
from lab.core.errors import UserError, nearest
from lab.core.hashing import state_hash
from lab.core.provenance import versions
from lab.core.record import Record, Stored
from lab.core.slugs import searched_attack
from lab.core.sources import PACKAGES
from lab.core.training import part_of
from lab.core.types import BASELINE, IMMUNIZED, Backbone, Trajectory, changed_tensors
from lab.models.diffusion import DiffusionModel
from lab.models.linear import LinearExtractor
from lab.models.vision import VisionBackbone, VisionModel
from lab.release.verify import (
    CARD,
    CONFIG,
    DELTA,
    FACTS,
    FORMAT,
    RECORD,
    SUMS,
    WEIGHTS,
    check,
    write_sums,
)
from lab.runner.assemble import as_list, find_targets
from lab.runner.batch import relative
from lab.runner.experiment import build_pipeline

_TEMPLATE = Path(__file__).with_name("card.md")
_LIBRARIES = {"diffusion": "diffusers", "deep": "timm", "linear": "safetensors"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SKIPPED = ("_convert_", "name", "sampling", "keep_weights", "families", "explosion", "search")
_GROUPS = ("scenario", "backbone", "erase")  # what the original model is made of
_PACKAGES = ("immunization-bench", "torch", "diffusers", "transformers", "timm", "safetensors")


def export(cfg: DictConfig) -> Path:
    """Write what ``records`` and ``export`` choose to ``path``; check a model.

    Returns:
        the folder: ``path``, or one below the outputs.

    Raises:
        UserError: not exactly one record, a choice that does not exist, weights or originals that
            are not there, a target folder that is not empty.
    """
    kind = "immunize" if cfg.export.attack is None and cfg.export.task is None else "attack"
    paths = records.find(as_list(cfg.records), Path(cfg.paths.runs))
    if len(paths) != 1:
        message = "export needs exactly one: records=RUN/record.json."
        raise UserError("records", f"{len(paths)} records", message)
    record = records.read(paths[0])
    stage = choose(record, kind, cfg.export)
    method = BASELINE if stage["model"] == BASELINE else record["immunizer"]
    labels = [x for x in (stage["attack"], stage["task"], method, stage["case"]) if x is not None]
    words = [record["name"].split("/")[0], *labels, f"seed{stage['seed']}"]
    name = re.sub(r"[^\w.-]+", "-", "-".join([*words, record["content_hash"][:8]]))
    folder = Path(cfg.path or f"{cfg.paths.outputs}/export/{name}").expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("path", folder, "exists and is not empty; choose another one.")
    if folder.suffix == ".safetensors" and kind == "immunize":
        print(f"export: {relative(write_unet(record, stage, rebuild(record, stage, cfg), folder))}")
        return folder
    if kind == "attack":
        write_attack(record, stage, cfg, folder)
    else:
        write(record, stage, rebuild(record, stage, cfg), folder)
        print(*check(folder, base=cfg.export.base), sep="\n")
    print(f"export: {relative(folder)}")
    return folder


# ---- from a record to its models


@dataclass(frozen=True)
class Release:
    """``published``: what the backbone loads; ``original``: the same after ``erase``; ``released``:
    the immunized model. ``credits``: whose data these are, and under what terms.
    """

    backbone: Backbone
    published: Any
    original: Any
    released: Any  # both kinds of model, distinguished by `FeatureModel`
    credits: tuple[str, ...]
    targets: tuple[str, ...]  # concepts that it is immunized against


def choose(record: Record, kind: str, options: DictConfig) -> dict[str, Any]:
    """Return the finished stage of ``kind`` (immunize | attack) that ``export.*`` selects; None
    where there is one only.

    Raises:
        UserError: no such stage, or several; lists them.
    """
    keys = ("case", "seed") if kind == "immunize" else ("case", "seed", "attack", "task")
    default = IMMUNIZED if records.is_immunized(record) else BASELINE
    wanted = {"model": options.model or default} | {k: options[k] for k in keys}
    stages = [stage for stage in record["stages"] if stage["kind"] == kind]
    for key, value in wanted.items():
        known = {str(stage[key]) for stage in stages}
        if value is not None and str(value) not in known:
            raise UserError(f"export.{key}", value, nearest(str(value), known))
        stages = [stage for stage in stages if str(value) in ("None", str(stage[key]))]
    finished = [stage for stage in stages if stage["status"] == "ok"]
    if len(finished) != 1:
        lines = [
            " ".join(f"export.{key}={stage[key]}" for key in wanted) + f" ({stage['status']})"
            for stage in stages
        ]
        message = f"choose a finished one: {'; '.join(lines)}."
        raise UserError("export", f"{len(finished)} stages {kind}", message)
    return finished[0]


def read_stage(record: Stored, stage: dict[str, Any], cfg: DictConfig) -> Artifact:
    """Return what a stage of ``record`` computed, from the cache.

    Raises:
        UserError: it is not there, or was computed again with other weights; names the command.
    """
    artifact = StageCache(cfg.paths.cache).read(stage["kind"], stage["key"])
    if artifact is not None and stage.get("weights") in (None, state_hash(artifact.tensors)):
        return artifact
    state = "no whole weights" if artifact is None else "other weights than were measured"
    overrides = record.folder / ".hydra" / "overrides.yaml"
    command = record["name"]
    if overrides.is_file():
        command = shlex.join(["python", "run.py", *map(str, OmegaConf.load(overrides))])
    message = (
        f"holds {state} (stage {stage['kind']} {stage['key'][:12]}…). Set paths.cache to the cache "
        f"of that run, or run it again: `{command}`"
    )
    raise UserError("paths.cache", cfg.paths.cache, message)


def rebuild(record: Stored, stage: dict[str, Any], cfg: DictConfig) -> Release:
    """Compute the original models again, compare them with the record's hashes, and add the
    weights that the immunizer changed.

    Raises:
        UserError: other data or original weights than the run had; weights that are not in the
            cache; a class that is neither the project's nor chosen in ``cfg``.
    """
    model_name, seed = stage["model"], stage["seed"]
    tensors = {} if model_name == BASELINE else read_stage(record, stage, cfg).tensors
    nothing = {"_target_": "immunize.none.NoImmunization", "name": "none"}
    config = record["config"] | {
        "immunize": nothing,
        **{"attacks": {}, "eval": {}, "scorers": {}, "seeds": [seed], "force": []},
        "paths": {"cache": cfg.paths.cache},
        # the last bit of a sum can depend on the number of threads
        "threads": int(record["provenance"]["threads"]),
    }
    check_trusted({group: config[group] for group in _GROUPS}, cfg)
    pipeline = build_pipeline(OmegaConf.create(config))
    data = pipeline.data(seed)
    if record["provenance"]["data_hash"].get(str(seed)) != data.data_hash:
        message = "the scenario's data are not those of the record; put them back."
        raise UserError("scenario", record["scenario"], message)
    stages = [s for s in record["stages"] if s["kind"] == "immunize" and s["seed"] == seed]
    cases = {case.name: case for case in data.cases if case.name in {s["case"] for s in stages}}
    for case in cases.values():
        pipeline.identity(case, seed)
    if record["provenance"]["weight_hash"].get(str(seed)) != pipeline.weight_hash()[str(seed)]:
        message = (
            "the original weights computed here are not those of the record: other weights at "
            "backbone.path, another device or version of torch. Export where the record was made."
        )
        raise UserError("backbone", record["backbone"], message)
    case, backbone = cases[stage["case"]], pipeline.parts.backbone
    published, original = backbone.build(case, seed), pipeline.original(case, seed)
    released = original.copy()
    released.load_state_dict({**released.state_dict(), **tensors})
    credits = (data.credit, *data.notes)
    targets = case.targets if isinstance(case, ConceptCase) else case.harmful
    return Release(backbone, published, original, released, credits, tuple(t.name for t in targets))


def check_trusted(config: dict[str, Any], cfg: DictConfig) -> None:
    """Check that ``config``, data of a record, builds classes of this project and those that the
    user's own ``cfg`` names, and nothing else.

    Raises:
        UserError: a ``_target_`` that is neither, or a text that would be interpolated.
    """
    own = find_targets(OmegaConf.to_container(cfg))
    for target in find_targets(config):
        if target not in own and not _is_ours(target):
            message = (
                "is no class of this project, and a record must not run other code. If it is your "
                "own, choose it on the command line as the run did, with its --config-dir."
            )
            raise UserError("records._target_", target, message)
    if "${" in json.dumps(config):
        raise UserError("records", "${…}", "a record holds resolved values only.")


def _is_ours(target: str) -> bool:
    if target.split(".")[0] not in PACKAGES:
        return False  # and is not imported
    try:
        return get_class(target).__module__.split(".")[0] in PACKAGES
    except Exception:  # whatever importing or looking up raises: it is not there
        return False


# ---- files


def write(record: Stored, stage: dict[str, Any], release: Release, folder: Path) -> None:
    """Write all files of an export, ``SHA256SUMS`` last: a folder without it does not verify."""
    folder = folder.resolve()  # `.` has no name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        partial = Path(name)
        if isinstance(release.released, DiffusionModel):
            facts = _write_diffusion(release, partial)
        else:
            facts = _write_features(release, partial)
        copied = _write_record(record, partial)
        facts |= {key: stage[key] for key in ("model", "case", "seed")} | {
            "immunizer": record["immunizer"],
            "format": FORMAT,
            "stage_key": stage["key"],
            "content_hash": copied["content_hash"],
            "versions": versions(_PACKAGES),
        }
        _write_json(partial / FACTS, facts)
        make_card(copied, facts, release.credits).save(partial / CARD)
        write_sums(partial)
        folder.mkdir(exist_ok=True)
        for path in sorted(partial.iterdir(), key=lambda p: p.name == SUMS):
            path.rename(folder / path.name)


def write_unet(record: Stored, stage: dict[str, Any], release: Release, file: Path) -> Path:
    """Write the tensors of the U-Net that immunization changed, in half precision, for
    ``immunize=stored``.

    Raises:
        UserError: a model without a U-Net.
    """
    if not isinstance(release.released, DiffusionModel):
        fix = "is no text-to-image model; name a folder without .safetensors."
        raise UserError("path", file, fix)
    facts = {
        "immunizer": record["immunizer"],
        "targets": list(release.targets),
        "case": stage["case"],
        "seed": stage["seed"],
        "record": record["content_hash"],
    }
    state = changed_tensors(release.original.unet, release.released.unet)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in state.items()}
    save_file(tensors, file, {UNET_FACTS: json.dumps(facts)})
    return file


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _write_diffusion(release: Release, folder: Path) -> dict[str, Any]:
    published, released = release.published, release.released
    changed = changed_tensors(published, released)
    if outside := [name for name in changed if not name.startswith("unet.")]:
        message = f"changed {outside[0]}, which lies outside the U-Net: the delta lacks it."
        raise UserError("immunize", "export", message)
    for tokenizer in released.tokenizers:
        if tokenizer.is_fast:  # else it saves the padding of its last call
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
    released.save(folder)
    for path in folder.rglob("*.json"):  # diffusers writes where each part was loaded from
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            _write_json(path, content)
    state, base = released.unet.state_dict(), state_hash(published.unet.state_dict())
    delta = {name: state[name] for name in changed_tensors(published.unet, released.unet)}
    # one key: safetensors writes several in another order every time
    save_file({k: v.cpu().contiguous() for k, v in delta.items()}, folder / DELTA, {"base": base})
    immunized = changed_tensors(release.original, released)
    return {
        "kind": "diffusion",
        "pipeline": released.pipeline_class,
        "unet": state_hash(state),
        "base_unet": base,
        "changed": {"tensors": len(changed), "of": len(state)},
        "immunized": {name: name.removeprefix("unet.") for name in immunized},
    }


def _write_features(release: Release, folder: Path) -> dict[str, Any]:
    model, backbone = release.released, release.backbone
    state = model.state_dict()
    if isinstance(model, LinearExtractor):
        kind, names = "linear", dict.fromkeys(state, "theta")
        config = {"kind": kind, "dtype": "float64", "theta": list(model.theta.shape)}
    elif isinstance(model, VisionModel) and isinstance(backbone, VisionBackbone):
        kind, names, config = "deep", backbone.timm_names(), _timm_config(model, backbone.model)
    else:
        message = "is no linear extractor and no timm network; there is no open layout for it."
        raise UserError("backbone", backbone.name, message)
    tensors = {names[key]: value.cpu().contiguous() for key, value in state.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    _write_json(folder / CONFIG, config)
    return {
        "kind": kind,
        "weights": state_hash(tensors),
        "immunized": {name: names[name] for name in changed_tensors(release.original, model)},
    }


def _timm_config(model: VisionModel, name: str) -> dict[str, Any]:
    """The config by which ``timm.create_model("local-dir:DIR")`` builds the network."""
    size = model.size or 224
    fixed = bool(getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False))
    return {
        "model_args": {"img_size": size} if fixed else {},
        "architecture": name.split(".")[0],
        "num_classes": 0,
        "num_features": model.feature_dim,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",  # as measured: resized without a crop
            "num_classes": 0,
        },
    }


def _write_record(record: Stored, folder: Path) -> Record:
    """Write the record without the names of the machine and its folders, which its content hash
    does not cover, and its images.
    """
    copied = copy.deepcopy(dict(record))
    copied["provenance"]["host"] = "removed"
    copied["config"] |= {k: "removed" for k in ("paths", "records") if k in copied["config"]}
    for image in copied.get("images", {}).values():
        (folder / image["path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(record.folder / image["path"], folder / image["path"])
    records.write(copied, folder / RECORD)
    return copied


def write_attack(record: Stored, stage: dict[str, Any], cfg: DictConfig, folder: Path) -> None:
    """Write the weights of one attack: a peft adapter, a U-Net, or deltas and embeddings.

    Raises:
        UserError: weights that are not in the cache or were not kept, or of a feature extractor.
    """
    artifact = read_stage(record, stage, cfg)
    if "form" not in artifact.values["info"]:
        message = "attacks no text-to-image model; its weights have no format."
        raise UserError("export.attack", stage["attack"], message)
    weights = part_of(artifact.tensors, "weights/")
    trajectory = Trajectory(**artifact.values, weights=weights, samples={})
    for path in write_attack_weights(trajectory, folder):
        print(f"  {path.relative_to(folder)}")


# ---- model card


def make_card(record: Record, facts: dict[str, Any], credits: Sequence[str]) -> ModelCard:
    """Return the card, with the front matter that hubs read.

    Args:
        facts: what ``export.json`` says.
        credits: whose data the scenario's are, and further notes on them.
    """
    config, kind = record["config"], facts["kind"]
    path = config["backbone"].get("path")
    # names of folders stay private
    is_hub_name = bool(_HUB_NAME.fullmatch(str(path))) and not Path(str(path)).is_dir()
    data = ModelCardData(
        library_name=_LIBRARIES[kind],
        license="cc-by-sa-4.0" if path == "minisd" else "other",
        license_name=None if path == "minisd" else "see-data-and-licence",
        pipeline_tag="text-to-image" if kind == "diffusion" else None,
        base_model=path if is_hub_name else None,
        tags=["model-immunization"],
    )
    return ModelCard.from_template(
        data,
        str(_TEMPLATE),
        record=record,
        facts=facts,
        stages=[
            stage | {"attack": searched_attack(stage["attack"])}
            for stage in record["stages"]
            if stage["kind"] == "attack"
        ],
        columns=columns(record["metrics"]),
        credits=list(dict.fromkeys(credits)),
        is_baseline=facts["model"] == BASELINE,
        outcome=outcome(record),
        arrows=ARROWS,
        figure=figure,
        heading=heading,
        interval=interval,
        settings=format_settings,
        support=support,
    )


def format_settings(node: dict[str, Any]) -> str:
    """Return the options of a method as the command line takes them, without what only the
    benchmark needs.
    """
    plain = flatten({key: value for key, value in node.items() if key not in _SKIPPED})
    shown = {key: value for key, value in plain.items() if not key.endswith("_target_")}
    return ", ".join(f"`{key}={typed(value)}`" for key, value in shown.items())
