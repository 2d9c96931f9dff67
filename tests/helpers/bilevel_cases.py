"""A bi-level problem on a U-Net of a few thousand weights, and its gradient written naively."""

from dataclasses import dataclass
from functools import cache

import torch
from tiny_diffusion import TINY, tokenizer
from torch import Tensor

from immunize.gradients import Params, math_attention
from immunize.merge.build import MergeOptions, build_merge
from immunize.merge.closed_form import Merge
from immunize.mima.hypergradient import HypergradientOptions, hypergradient
from immunize.mima.inner_loop import BETAS, InnerLoop, InnerLoopOptions
from lab.core.seeding import generator
from lab.minisd.train.networks import build_scheduler, build_text_encoder, build_vae
from lab.minisd.world.captions import prompts
from lab.models.diffusion import DiffusionModel, Text

DOUBLE = torch.float64
CAPTIONS = [
    *(f"a photo of {it}" for it in ("a fox", "a panda", "a lion")),
    *prompts("a fox", "photo"),
]


@cache
def micro_model():
    """Every kind of block and layer once: cross-attention down, mid and up, resampling, latents 4 ×
    4 × 4.
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TINY.text,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    text = build_text_encoder(TINY, len(tokenizer()), 0)
    model = DiffusionModel(unet, build_vae(TINY, 0), [text], [tokenizer()], build_scheduler())
    return model.to(DOUBLE)


@dataclass(frozen=True)
class Problem:
    model: DiffusionModel
    theta: Params
    outer_names: list[str]
    inner_names: list[str]
    merge: Merge
    count: int
    # per concept, per inner step, the last for the outer loop
    batches: list[list[tuple[Tensor, Text, Tensor, Tensor]]]

    def inner(self):
        def loss(n):
            return lambda params, k: self.model.loss(*self.batches[n][k], weights=params).mean()

        return [loss(n) for n in range(self.count)]

    def outer(self, params, n):
        return -self.model.loss(*self.batches[n][-1], weights=params).mean()

    def problems(
        self,
        settings,
        theta=None,
        **more,
    ):
        """Inner loops of all concepts; ``settings``: one, or one per concept."""
        each = [settings] * self.count if isinstance(settings, InnerLoopOptions) else settings
        pairs = zip(each, self.inner(), strict=True)
        start = self.theta if theta is None else theta
        return [
            InnerLoop(s, start, self.inner_names, loss, n, **more)
            for n, (s, loss) in enumerate(pairs)
        ]


def batches(model, words, each, size=2):
    found = []
    for word in words:
        g = generator(0, "batches", word)
        text = model.text([f"a fox in {word} style"] * size)
        shape = (size, 4, model.latent_size, model.latent_size)
        found.append(
            [
                (
                    torch.randn(shape, generator=g, dtype=torch.float64).to(model.dtype),
                    text,
                    torch.randn(shape, generator=g, dtype=torch.float64).to(model.dtype),
                    torch.randint(0, 1000, (size,), generator=g),
                )
                for _ in range(each)
            ]
        )
    return found


@cache
def problem(scope="kv", count=2, moved="all", rule="closed_form"):
    """``count`` styles; the outer set leaves out every third parameter of ``moved``, the inner one
    every second.
    """
    model = micro_model()
    words = ("mosaic", "neon", "photo")[:count]
    data = batches(model, words, 4)
    merge = build_merge(
        model,
        [((f"a fox in {w} style", f"a painting of a fox in the style of {w}"), w) for w in words],
        CAPTIONS,
        MergeOptions(scope=scope, rule=rule),
        batches=[some[:2] for some in data],
        regular_batches=batches(model, ("photo",), 2)[0],
        rows=4,
        regular_rows=64,
    )
    parameters = {
        k: p.detach() for k, p in model.unet.named_parameters() if moved == "all" or moved in k
    }
    names = list(parameters)
    outer = [x for i, x in enumerate(names) if i % 3 != 1]
    inner = [x for i, x in enumerate(names) if i % 2 == 0 or "attn2.to_k" in x]
    theta = {x: parameters[x] for x in names if x in outer or x in inner}
    return Problem(model, theta, outer, inner, merge, count, data)


def unrolled(problem, theta):
    """θ'_n with its graph: the inner loop step by step, Adam's preconditioner detached."""
    s, rho = problem.settings, problem.rho
    phi = {x: theta[x] for x in problem.names} if s.rank is None else problem.initial()
    phi = {x: y if y.requires_grad else y.clone().requires_grad_(True) for x, y in phi.items()}
    m, v = (({x: torch.zeros_like(y) for x, y in phi.items()}) for _ in range(2))

    def place(phi):
        if s.rank is None:
            return {**theta, **phi}
        return {**theta, **{x: theta[x] + phi[f"{x}/B"] @ phi[f"{x}/A"] for x in problem.names}}

    for k in range(s.steps):
        loss = problem.loss(place(phi), 0 if rho else k)
        if rho:
            loss = loss + rho / 2 * sum((phi[x] - theta[x]).square().sum() for x in phi)
        slope = torch.autograd.grad(
            loss, list(phi.values()), create_graph=True, materialize_grads=True
        )
        step = {}
        for (x, y), g in zip(phi.items(), slope, strict=True):
            if s.optimizer == "sgd":
                step[x] = y - s.lr * g
                continue
            (b1, b2), t = BETAS, k + 1
            m[x] = b1 * m[x] + (1 - b1) * g
            v[x] = b2 * v[x] + (1 - b2) * g.detach() ** 2
            ratio = (m[x] / (1 - b1**t)) / ((v[x] / (1 - b2**t)).sqrt() + s.eps)
            step[x] = y - s.lr * (ratio + s.weight_decay * y)
        phi = step
    placed = place(phi)
    return {x: placed[x] for x in problem.names}


def naive(p, settings, rho=0.0):
    """∇J on the outer set by autograd through unroll, masks and merge."""
    with math_attention():
        theta = {x: y.clone().requires_grad_(True) for x, y in p.theta.items()}
        problems = p.problems(settings, theta, rho=rho)
        merged = p.merge(theta, [unrolled(problem, theta) for problem in problems])
        total = sum(p.outer(merged, n) for n in range(p.count)) / p.count
        found = torch.autograd.grad(
            total, [theta[x] for x in p.outer_names], materialize_grads=True
        )
    return dict(zip(p.outer_names, found, strict=True))


def evaluate(
    p,
    settings,
    **options,
):
    """The project's own way; ``options`` are those of `HypergradientOptions`."""
    how = HypergradientOptions(**options)
    problems = p.problems(settings, rho=how.rho if how.method == "implicit" else 0.0)
    return hypergradient(p.theta, problems, p.outer, p.merge, p.outer_names, how)


def distance(left, right):
    """‖left − right‖ ÷ ‖right‖ over all entries."""
    assert left.keys() == right.keys()
    gap = sum(float((left[x] - right[x]).square().sum()) for x in right)
    return (gap / sum(float(y.square().sum()) for y in right.values())) ** 0.5
