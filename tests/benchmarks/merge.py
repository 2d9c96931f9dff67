"""Time of one merge against the released way of doing it: ``python tests/benchmarks/merge.py``.

Key/value matrices of SD v1-4 (32 of 320, 640 and 1280 × 768), C_reg of 200 captions × 77 tokens, 3
concepts × 8 rows, float32, CPU seconds. All four start from the rows C_n and C_reg:

- fixed map: `immunize.merge.closed_form.Merge`, factored once before the loop;
- one LU per step: C_regᵀC_reg, its LU and (C A Cᵀ)⁻¹ once per step, then every layer;
- LU per layer: LU of C_regᵀC_reg and (C A Cᵀ)⁻¹ of every layer at every step, C_regᵀC_reg given;
- released: C_regᵀC_reg of every layer at every step as well.

``--repeats``: of the two fast ways; the slow ones run once. Exits with code 1 if the fixed map is
less than 20 times faster than ``released`` or results differ.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from options import parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from immunize.merge.closed_form import Merge, factorize

OUTS = [*[320] * 10, *[640] * 10, *[1280] * 12]


def algebra(c, gram):
    """C A and (C A Cᵀ)⁻¹ by LU, as one writes it down."""
    lu, pivots = torch.linalg.lu_factor(gram)
    solved = torch.linalg.lu_solve(lu, pivots, c.T).T
    return solved, torch.linalg.inv(solved @ c.T)


def updated(w, adapted, rows, c, solved, inner):
    v = torch.cat([x @ r.T for x, r in zip(adapted, rows, strict=True)], 1)
    return w + (v - w @ c.T) @ inner @ solved


def median(run, repeats):
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main():
    sizes = {"captions": 200, "context": 77, "width": 768, "concepts": 3, "rows": 8}
    options = parse(__doc__, **sizes, repeats=5, threads=1)
    torch.set_num_threads(options.threads)
    g = torch.Generator().manual_seed(0)
    d = options.width
    rows = [torch.randn(options.rows, d, generator=g) for _ in range(options.concepts)]
    regular = torch.randn(options.captions * options.context, d, generator=g)
    base = {str(i): torch.randn(out, d, generator=g) / d**0.5 for i, out in enumerate(OUTS)}
    adapted = [
        {k: w + 0.01 * torch.randn(w.shape, generator=g) for k, w in base.items()} for _ in rows
    ]
    c, gram = torch.cat(rows), regular.T @ regular

    start = time.process_time()
    merge = Merge(
        len(rows), {"text": factorize(rows, regular).to(regular)}, dict.fromkeys(base, "text")
    )
    merge(base, adapted)
    once = time.process_time() - start

    def one_lu():
        solved, inner = algebra(c, regular.T @ regular)
        return {
            k: updated(w, [a[k] for a in adapted], rows, c, solved, inner) for k, w in base.items()
        }

    def per_layer(given):
        return {
            k: updated(
                w,
                [a[k] for a in adapted],
                rows,
                c,
                *algebra(c, gram if given else regular.T @ regular),
            )
            for k, w in base.items()
        }

    fast, expected = merge(base, adapted), one_lu()
    error = max(
        float((fast[k] - expected[k]).norm() / (expected[k] - base[k]).norm()) for k in base
    )
    mine = median(lambda: merge(base, adapted), options.repeats)
    ways = {
        "one LU per step": median(one_lu, options.repeats),
        "LU per layer": median(lambda: per_layer(True), 1),
        "released": median(lambda: per_layer(False), 1),
    }
    print(
        f"{len(OUTS)} matrices, C_reg {tuple(regular.shape)}, {len(c)} rows, float32, "
        f"{options.threads} thread(s)"
    )
    print(
        f"fixed map        {mine:8.3f} s per step, factored once in {once:.2f} s; "
        f"relative difference {error:.1e}"
    )
    for name, seconds in ways.items():
        print(f"{name:16s} {seconds:8.3f} s per step, {seconds / mine:6.1f} × the fixed map")
    return 0 if ways["released"] >= 20 * mine and error < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
