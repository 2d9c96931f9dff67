"""Time and memory of one exact step: ``python tests/benchmarks/hypergradient.py``.

A U-Net of MiniSD's size with random weights, float32, attn2 in both loops, K = 1, SGD, prior off.
The unit is N forward-backwards of the same batch, dtype, parameters and attention (math); CPU
seconds, medians of interleaved repeats, so that a busy machine hits both alike. Peak memory is that
of a fresh process per N above the loaded model. Exits with code 1 if the exact step takes more than
5.5 units, if time is not linear in N (15 %), or if memory at the largest N exceeds that at N = 1 by
a factor above 1.2.

``--methods`` prints instead what an outer step costs by each method
(`sweeps/hypergradient_ablation.yaml`), for each of ``--steps`` inner steps and the smallest N:
interleaved on one batch, the inner loop's drop measured as in a run. ``--iterations`` are those of
``implicit``, five as in the ablation. ``--memory N`` prints MiB of one step with N concepts.
"""

import gc
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from options import parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from immunize.gradients import compute_gradients, math_attention
from immunize.merge.build import scope_names
from immunize.merge.closed_form import Merge, factorize
from immunize.mima.hypergradient import (
    HypergradientOptions,
    hypergradient,
)
from immunize.mima.inner_loop import InnerLoop, InnerLoopOptions
from lab.minisd.train import networks

METHODS = ("exact", "truncated", "first_order", "alternating")
SOLVERS = ("cg", "neumann")


def resident(key):
    """MiB: ``VmRSS`` now, ``VmHWM`` the peak since `forget_peak` (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


class Case:
    """A U-Net, N concepts with a batch each per level, and the merge over key/value."""

    def __init__(self, count, batch):
        from torch.func import functional_call

        widths = networks.Widths()
        unet = networks.build_unet(widths, 0).requires_grad_(False).eval()
        self.theta = {x: p.detach() for x, p in unet.named_parameters() if ".attn2." in x}
        self.names, self.count = list(self.theta), count
        g = torch.Generator().manual_seed(0)
        rows = tuple(torch.randn(4, widths.text, generator=g) for _ in range(count))
        regular = torch.randn(6400, widths.text, generator=g)
        factors = factorize(rows, regular).to(regular)
        self.merge = Merge(count, {"text": factors}, dict.fromkeys(scope_names(unet, "kv"), "text"))

        def draw(n, level):
            g = torch.Generator().manual_seed(2 * n + level)
            z, target = (torch.randn(batch, 4, 16, 16, generator=g) for _ in range(2))
            words = torch.randn(batch, networks.CONTEXT, widths.text, generator=g)
            return [z, target, words, torch.randint(0, 1000, (batch,), generator=g)]

        def loss(n, level, params):
            z, target, words, t = draw(n, level)
            return (functional_call(unet, params, (z, t, words)).sample - target).square().mean()

        self.loss = loss

    def units(self):
        """N forward-backwards."""
        with math_attention():
            for n in range(self.count):
                compute_gradients(partial(self.loss, n, 0), self.theta)

    def step(self, steps=1, **options):
        method = HypergradientOptions(**options)
        inner = [
            InnerLoop(
                InnerLoopOptions(lr=0.1, steps=steps),
                self.theta,
                self.names,
                lambda p, k, n=n: self.loss(n, 0, p),
                n,
                rho=method.rho if method.method == "implicit" else 0.0,
            )
            for n in range(self.count)
        ]
        return hypergradient(
            self.theta,
            inner,
            lambda p, n: -self.loss(n, 1, p),
            self.merge,
            self.names,
            method,
        )


def timed(runs, repeats):
    """Medians of CPU seconds of interleaved runs."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(some[1:]) for name, some in times.items()}


def memory(count, batch):
    """MiB that one exact step takes above the loaded model (after one forward pass, which loads
    libraries).
    """
    case = Case(count, batch)
    with torch.no_grad():
        case.loss(0, 0, case.theta)
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    case.step()
    return resident("VmHWM") - before


def methods(iterations):
    """Those of the ablation. A tolerance that is never reached: the solvers take all their
    iterations.
    """
    found = {name: {"method": name} for name in METHODS}
    options = {"method": "implicit", "rho": 1.0, "iterations": iterations, "tolerance": 1e-30}
    return found | {f"implicit, {solver}": {**options, "solver": solver} for solver in SOLVERS}


def method_table(options):
    """Prints a row per method; of the solvers also the fewest iterations of any run (negative
    curvature ends cg).
    """
    case = Case(min(options.counts), options.batch)
    known = methods(options.iterations)
    taken = {}
    runs = {"unit": case.units}

    def one(name, k):
        for n in case.step(k, **known[name]).info.get("iterations", ()):
            taken[name] = min(n, taken.get(name, n))

    for name in known:
        runs |= {f"{name}/{k}": partial(one, name, k) for k in options.steps}
    found = timed(runs, options.repeats)
    print(
        f"one outer step, N = {case.count}, in units of N forward-backwards "
        f"({found['unit']:.2f} CPU seconds)"
    )
    print(f"{'method':20s}" + "".join(f"{f'K = {k}':>9s}" for k in options.steps))
    for name in known:
        row = "".join(f"{found[f'{name}/{k}'] / found['unit']:9.2f}" for k in options.steps)
        print(f"{name:20s}{row}" + (f"   {taken[name]} iterations" if name in taken else ""))


def main():
    runs = {"counts": [1, 2, 5, 10], "batch": 4, "repeats": 3, "threads": 1}
    options = parse(__doc__, **runs, memory=0, methods=False, steps=[1, 3, 5], iterations=5)
    torch.set_num_threads(options.threads)
    if options.memory:
        print(memory(options.memory, options.batch))
        return 0
    if options.methods:
        method_table(options)
        return 0
    print(f"MiniSD's U-Net, batch {options.batch}, float32; one unit = N forward-backwards")
    ratios, seconds = [], []
    for count in options.counts:
        case = Case(count, options.batch)
        runs = {"unit": case.units, "exact": case.step}
        if count == options.counts[0]:
            runs["first order"] = partial(case.step, method="first_order")
        found = timed(runs, options.repeats)
        ratios.append(found["exact"] / found["unit"])
        seconds.append(found["exact"] / count)
        print(
            f"N = {count:2d}: "
            + ", ".join(f"{k} {found[k] / found['unit']:.2f}" for k in runs if k != "unit")
        )
    straight = max(seconds) / min(seconds)
    print(f"time per concept, largest ÷ smallest over N: {straight:.2f}")
    ends = [options.counts[0], options.counts[-1]]
    used = []
    for count in ends:
        command = [sys.executable, __file__, "--memory", str(count), "--batch", str(options.batch)]
        found_text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        used.append(float(found_text.split()[-1]))
    growth = used[1] / used[0]
    print(
        f"peak memory above the model: {used[0]:.0f} MiB at N = {ends[0]}, {used[1]:.0f} "
        f"at {ends[1]}: {growth:.2f}"
    )
    return 0 if max(ratios) <= 5.5 and straight <= 1.15 and growth <= 1.2 else 1


if __name__ == "__main__":
    sys.exit(main())
