"""What `erase=uce` takes out and what it leaves: ``python tests/benchmarks/erasure.py``.

For every test case of `relearn_styles` and `relearn_objects`, images before and after all of the
case's concepts are erased at once, from the same latents. Of every erased concept: the share in
which the shipped detector sees it, by its calibrated threshold as attack success counts, and the
share in which it is the likeliest class, as it will be now and then in an image of nothing in
particular. Of everything else (other objects as photos; other styles): the latter.

``--erased`` and ``--kept``: images per concept that some case erases, and per other concept.
``--overrides``: of the configuration, e.g. erase.preserve=0.
"""

import sys
from pathlib import Path

import torch
from options import parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lab.core.data import Sampling
from lab.minisd.train.quality import generate, prompts_for
from lab.minisd.world.vocabulary import HELD_OUT_PAIRS, OBJECTS, PHOTO, STYLE_NAMES
from lab.runner.assemble import assemble
from lab.scorers.detector import load_detector

ROOT = Path(__file__).resolve().parents[2]
Shares = dict[str, tuple[float, float]]


def detections(model, detector, count, seed):
    """Return for each name the share of images in which it is the likeliest class, and in which
    the detector sees it, in ``count[name]`` images of a style (over objects that MiniSD saw in it)
    or of an object in photos.
    """
    found = {}
    for name, each in count.items():
        head, pairs = "object", [(name, PHOTO)] * each
        if name in STYLE_NAMES:
            seen = [(o, name) for o in OBJECTS if (o, name) not in HELD_OUT_PAIRS]
            # 5 shares no factor with their number
            head, pairs = "style", [seen[5 * i % len(seen)] for i in range(each)]
        ways = prompts_for(pairs, 1) if head == "style" else prompts_for(pairs[:1], each)
        images = generate(model, ways[0], seed, name, Sampling(steps=20))
        top = detector.top1(images)[head].count(name) / each
        found[name] = (top, detector.detects(images, name).double().mean().item())
    return found


def told(was_, now_, gone, count):
    for name in gone:
        (top, seen), (top_now, seen_now) = was_[name], now_[name]
        line = f"seen {seen:.0%} → {seen_now:.0%}, likeliest {top:.0%} → {top_now:.0%}"
        print(f"  erased {name} ({count[name]} images): {line}")
    before, after = ({n: top for n, (top, _) in part.items()} for part in (was_, now_))
    for kind, names in (("styles", STYLE_NAMES), ("objects", OBJECTS)):
        kept = [n for n in names if n not in gone]
        was, now = (sum(part[n] for n in kept) / len(kept) for part in (before, after))
        worst = max(kept, key=lambda n: before[n] - after[n])
        print(
            f"  {len(kept)} kept {kind}: {was:.1%} → {now:.1%} on average, "
            f"most lost: {worst} ({count[worst]} images) {before[worst]:.0%} → "
            f"{after[worst]:.0%}",
            flush=True,
        )


def main():
    scenarios = ["relearn_styles", "relearn_objects"]
    given = parse(__doc__, erased=32, kept=8, scenarios=scenarios, overrides=[], seed=0, threads=1)
    torch.set_num_threads(given.threads)
    OmegaConf.register_new_resolver("project_root", lambda: str(ROOT), replace=True)
    detector = load_detector()
    before = {}
    for scenario in given.scenarios:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            chosen = [
                "experiment=relearn",
                f"scenario={scenario}",
                "scenario.cases=all",
                *given.overrides,
            ]
            cfg = compose("config", chosen)
        parts = assemble(cfg)
        cases = parts.scenario.load(given.seed).cases
        model = parts.backbone.build(None, given.seed)
        names = {e.name for case in cases for e in case.erased}
        count = {n: given.erased if n in names else given.kept for n in (*STYLE_NAMES, *OBJECTS)}
        before = detections(model, detector, count, given.seed)
        for case in cases:
            print(f"\n{scenario}, {case.name}")
            after = detections(
                parts.eraser.obj(model, case, seed=given.seed), detector, count, given.seed
            )
            told(before, after, list(dict.fromkeys(e.name for e in case.erased)), count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
