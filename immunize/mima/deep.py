"""The objective of ``mima_deep``: survive attackers that train for many steps (own extension of
arXiv 2412.15320).

Per outer step and concept an attacker is drawn and fine-tunes a copy of θ for K steps
(`InnerAttack`). With Θ(K) the weights it has then, Merge(θ, Θ_1 … Θ_N) those of
all concepts merged, and sg the stopped gradient,

    J(θ) = mean_marks mean_n [ −min(L(x^u_n; Θ̂), cap) + w_decoy · L(x^decoy_n; Θ̂) ]
           + w_benign · mean_marks max(L(x^u_b; Θ_b) − L(x^u_b; Θ⁰_b), 0)
           + ramp · { w_prior · L(x^prior; θ) + w_distill · ‖ε_θ(x^prior) − sg ε_θ0(x^prior)‖² }

where x^decoy are images that the original generates for the concept's captions (after an erasure:
without the concept), Θ̂ is the merged model, the concept's own attacked copy, or both. The gradient
is first order, ∂Θ/∂θ = I, taken at the effective weights and brought back to θ through the merge's
adjoint. b is a benign concept of the rehearsal set, attacked like a target, that has to stay
learnable: Θ⁰_b is the original model after the same steps on the same batches, and the term is what
fine-tuning towards b has lost against it. With ``benign="loss"`` L(x^u_b; Θ_b) itself is minimised,
which goes on paying for benign concepts that learn *faster* than before.

With ``online`` an outer step looks at one mark only: θ moves there, and the attackers go on from
where they are, added to the moved θ, until their K steps are over; then new ones are drawn. The
expensive part, the attackers' steps, is then shared by as many updates as there are marks (as
adversarial training "for free" does, arXiv 1904.12843).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from immunize.gradients import Params, Weights, accumulate, gradient_at
from immunize.merge.build import scope_names
from immunize.merge.closed_form import Merge
from immunize.mima.inner_loop import AttackerFamily, DrawnAttacker, draw_factors
from immunize.mima.outer_loop import ConceptImmunizer, Objective, Setup, capped
from immunize.mima.sampling import Batch, ConceptSplit, Pool, check_size
from lab.core.config import AsList, Count, Flag, NonNegative, PositiveShare, Text, config
from lab.core.data import ConceptCase, Sampling
from lab.core.seeding import derive, generator
from lab.core.training import part_of, restore_state, state_tensors

_OneNumber = BeforeValidator(lambda v: (v,) if isinstance(v, int | float) else v)
_Sorted = AfterValidator(lambda v: tuple(sorted(v)))


@config
class MimaDeep(ConceptImmunizer):
    """Immunization against attackers that train for many steps, see the module.

    Args:
        inner_batch_size: images per step of an attacker.
        at: marks, fractions of K at which the attacked weights are looked at.
        evaluate: where: ``merged`` weights of all concepts, each concept's ``own`` attacked copy,
            or both.
        prior_at: the prior's loss is taken at ``start`` (θ itself) or at the ``adapted`` weights
            (as in MIMA).
        worst_of: attackers drawn per target and attack. All attack; the terms are taken against the
            one with the lowest loss on the target's images at its last mark.
        prior_ramp: factor on the preservation terms that are taken at θ when the concepts' loss has
            come to the cap: both with ``prior_at=start``, the distance to the original alone with
            ``adapted``; 1 is constant.
        w_distill: weight of the distance to the original model's predictions on the prior's
            images, at θ.
        w_benign: weight of a benign concept's term after the attack; 0 or a case without rehearsal
            concepts leaves it out. benign: its ``loss``, or its ``regret``, the loss beyond that of
            the original after the same attack.
        w_decoy: weight of the diffusion loss, at the attacked weights, of images that the original
            generates for the concept's captions: an attack that learns the concept has to unlearn
            these.
            decoys: such images per target, generated in decoy_steps of DDIM at guidance 4, whatever
                the scenario samples with.
        online: an outer step at every mark of an attack, which then goes on, in place of one per
            attack.
    """

    name: Text = "mima_deep"
    attackers: dict[str, AttackerFamily | None]
    k_min: Count
    k_max: Count
    inner_batch_size: Count = 8
    worst_of: Count = 1
    at: Annotated[tuple[PositiveShare, ...], _OneNumber, _Sorted, Field(min_length=1)] = (0.5, 1.0)
    evaluate: Annotated[tuple[Literal["merged", "own"], ...], AsList, Field(min_length=1)] = (
        "merged",
        "own",
    )
    prior_at: Literal["start", "adapted"] = "start"
    prior_ramp: Annotated[float, Field(strict=True, ge=1)] = 1.0
    w_distill: NonNegative = 0.0
    w_benign: NonNegative = 0.0
    benign: Literal["regret", "loss"] = "loss"
    w_decoy: NonNegative = 0.0
    decoys: Count = 40
    decoy_steps: Count = 20
    online: Flag = False

    @model_validator(mode="after")
    def _check_rule(self) -> MimaDeep:
        if self.merge.is_learned:
            raise ValueError("merge.rule must be closed_form or mean: mima_deep learns no masks")
        return self

    def check(self, cases: Sequence[ConceptCase]) -> None:
        super().check(cases)
        for case in cases if self.w_benign else ():
            for concept in case.rehearsal:
                check_size(concept, ", or set immunize.w_benign=0")

    def needs_prior(self) -> bool:
        return self.w_prior > 0 or self.w_distill > 0

    def needs_merge(self) -> bool:
        return "merged" in self.evaluate or self.concepts == "composed"

    def decoys_per_target(self) -> Sampling | None:
        return Sampling(count=self.decoys, steps=self.decoy_steps) if self.w_decoy else None

    def shards(self, case: ConceptCase) -> int:
        """As `Mima.shards`; a merged model needs all attacked copies in one place."""
        if self.concepts != "merged" or self.evaluate != ("own",):
            return 1
        return len(case.targets) + (1 if self.w_benign and case.rehearsal else 0)

    def objective(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> Objective:
        return DeepObjective(setup, concepts, merge)


class DeepObjective(Objective):
    """Gradient of J for Π_u; see the module."""

    config: MimaDeep

    def __init__(self, setup: Setup, concepts: Sequence[ConceptSplit], merge: Merge) -> None:
        super().__init__(setup, concepts, merge)
        config, theta = self.config, self.denoiser.theta
        self.rehearsal = setup.split(setup.case.rehearsal, None) if config.w_benign else []
        self.needs_regret = bool(self.rehearsal) and config.benign == "regret"
        self.original: Params = {}
        if config.w_distill or self.needs_regret:
            self.original = {name: theta[name].detach().clone() for name in self.outer_names}
        # this process's attacks that go on at the next outer step, by concept
        self.attacks: dict[str, InnerAttack] = {}
        self.saved: Params = {}

    def state(self) -> Params:
        attacks = {name: attack.state() for name, attack in self.attacks.items()}
        own = {f"{name}/{k}": v.cpu() for name, some in attacks.items() for k, v in some.items()}
        state: Params = {}
        for member in range(self.team.size):
            state |= self.team.broadcast(own, member)
        return state

    def load(self, state: Params) -> None:
        self.saved = dict(state)

    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        self.denoiser.sync(self.moves)
        o, places, targets = self.config, self.config.evaluate, len(self.concepts)
        concepts = self._with_rehearsal(step)
        drawn = [a for c in self.concepts for a in self._candidates(c, step)]
        count = max(len(self._marks(attacker, step)) for attacker in drawn)
        share = 1 / (count * len(places) * targets)
        attacked: dict[int, tuple[DrawnAttacker, list[Snapshot]]] = {}
        rows: dict[int, dict[str, float]] = {}
        total: Params = {}
        preservation: Params = {}

        def compute(n: int) -> Params:
            if n == len(concepts):
                gradient, rows[n] = self._preserve(theta, step)
                return gradient
            if n >= targets:
                gradient, rows[n] = self._benign(theta, concepts[n], step)
                return gradient
            attacker, snapshots = self._strongest(theta, concepts[n], step)
            last, v = snapshots[-1], Params()
            rows[n] = {"inner_loop_steps": float(last.step)}
            if not math.isnan(last.drop):
                rows[n]["inner_loop_drop"] = last.drop
            if "merged" in places:
                attacked[n] = attacker, snapshots
            for i in range(count) if "own" in places else ():
                weights = snapshots[min(i, len(snapshots) - 1)].weights
                rows[n] |= self._terms(theta, weights, "own", n, attacker, step, i, v)
            return {name: g * share for name, g in v.items()}

        self.team.reduce_in_order(
            len(concepts) + 1,
            compute,
            lambda n, part: accumulate(preservation if n == len(concepts) else total, part),
        )
        # the merge is never looked at by several processes, see `MimaDeep.shards`
        for i in range(count) if "merged" in places else ():
            v = Params()
            ends = [some[min(i, len(some) - 1)].weights for _, some in attacked.values()]
            base = {name: theta[name].detach() for weights in ends for name in weights}
            point = self.merge(base, ends)
            for n in range(targets):
                rows[n] |= self._terms(theta, point, "merged", n, attacked[n][0], step, i, v)
            accumulate(total, self.merge.adjoint_direct(v), share)
            for n in range(targets):
                accumulate(total, self.merge.adjoint_part(v, n), share)
        values = self._values(self.team.gather(rows)) | self.merge.residual()
        if preservation:
            near = 0.0 if o.cap is None else min(max(values["outer_loss"], 0.0) / o.cap, 1.0)
            values["prior_factor"] = 1 + (o.prior_ramp - 1) * near**2
            accumulate(total, preservation, values["prior_factor"])
        return {name: total[name] for name in self.outer_names}, values

    def _values(self, rows: dict[int, dict[str, float]]) -> dict[str, float]:
        """Return what to log: means over targets and places, then what the benign and the
        preservation terms gave.
        """
        listed: dict[str, list[float]] = {}
        for n in range(len(self.concepts)):
            for key, value in rows[n].items():
                listed.setdefault(key.rpartition("/")[2], []).append(value)
        values = {key: sum(some) / len(some) for key, some in listed.items()}
        for n in range(len(self.concepts), len(rows)):
            values |= rows[n]
        return values

    def _with_rehearsal(self, step: int) -> list[ConceptSplit]:
        """Return the targets, and one rehearsal concept where there is a benign term."""
        if not self.rehearsal:
            return list(self.concepts)
        turn = derive(self.seed, "mima", "rehearsal", self._round(step)[0]) % len(self.rehearsal)
        return [*self.concepts, self.rehearsal[turn]]

    # the attacks

    def _round(self, step: int) -> tuple[int, int]:
        """Return the number of the attacks that outer step ``step`` belongs to, and which of their
        marks it looks at.
        """
        return divmod(step, len(self.config.at)) if self.config.online else (step, 0)

    def _draw(self, concept: ConceptSplit, step: int, *number: int) -> DrawnAttacker:
        return self.config.draw(self.seed, concept.name, self._round(step)[0], *number)

    def _candidates(self, target: ConceptSplit, step: int) -> list[DrawnAttacker]:
        more = [self._draw(target, step, i) for i in range(1, self.config.worst_of)]
        return [self._draw(target, step), *more]

    def _strongest(
        self, theta: Params, target: ConceptSplit, step: int
    ) -> tuple[DrawnAttacker, list[Snapshot]]:
        """Let all candidates attack; return the one with the lowest loss at its last mark."""
        drawn = self._candidates(target, step)
        found = [(a, self._attack(theta, target, a, step, i)) for i, a in enumerate(drawn)]
        if len(found) == 1:
            return found[0]

        @torch.no_grad()
        def loss(candidate: tuple[DrawnAttacker, list[Snapshot]]) -> float:
            attacker, snapshots = candidate
            batch = self._outer_batch(target, attacker, step, len(snapshots) - 1)
            return float(self.denoiser.loss(batch, snapshots[-1].weights))

        return min(found, key=loss)

    def _outer_batch(
        self, concept: ConceptSplit, attacker: DrawnAttacker, step: int, mark: int
    ) -> Batch:
        return self.draw_batch(concept.outer, concept, attacker, step, "upper", mark)

    def _marks(self, attacker: DrawnAttacker, step: int) -> tuple[int, ...]:
        """Return the steps of ``attacker`` that this outer step looks at, each at least 1, without
        repetition. Where an attack has fewer than others, its last one stands for the missing.
        """
        o, turn = self.config, self._round(step)[1]
        fractions = [o.at[turn]] if o.online else o.at
        return tuple(
            sorted({max(1, round(fraction * attacker.settings.steps)) for fraction in fractions})
        )

    def _attack(
        self,
        theta: Params,
        concept: ConceptSplit,
        drawn: DrawnAttacker,
        step: int,
        number: int = 0,
        original: bool = False,
    ) -> list[Snapshot]:
        """Attack θ, or the ``original`` model batch by batch in the same way, up to the marks of
        this step. Candidates of a target have a ``number`` each.
        """
        o, (round_, turn) = self.config, self._round(step)
        key = f"original:{concept.name}" if original else concept.name
        key += f":{number}" if number else ""
        if turn == 0 or key not in self.attacks:
            self.attacks[key] = InnerAttack(
                self._original_loss if original else self.denoiser.loss,
                {**theta, **self.original} if original else theta,
                scope_names(self.unet, drawn.settings.scope),
                drawn,
                concept.inner,
                o.inner_batch_size * concept.concepts,
                self.seed,
                concept.name,
                round_,
            )
            if turn > 0:
                self.attacks[key].load(part_of(self.saved, f"{key}/"))
        attack = self.attacks[key]
        try:
            return [attack.advance(until) for until in self._marks(drawn, step)]
        except FloatingPointError as error:
            raise FloatingPointError(f"concept {concept.name}: {error}") from error
        finally:
            if not o.online or turn == len(o.at) - 1:
                del self.attacks[key]

    def _original_loss(self, batch: Batch, weights: Weights) -> Tensor:
        return self.denoiser.loss(batch, {**self.original, **weights})

    # what must become hard

    def _terms(
        self,
        theta: Params,
        at: Weights,
        place: str,
        n: int,
        attack: DrawnAttacker,
        step: int,
        mark: int,
        v: Params,
    ) -> dict[str, float]:
        """Add the gradient of one concept's terms at one point to ``v``; return the losses by
        ``place``.
        """
        o, concept, losses = self.config, self.concepts[n], Params()
        batch, decoys = self._outer_batch(concept, attack, step, mark), None
        if concept.decoys is not None:
            decoys = self.draw_batch(concept.decoys, concept, attack, step, "decoys", mark)

        def terms(weights: Weights) -> Tensor:
            losses["outer_loss"] = outer = self.denoiser.loss(batch, weights)
            value = -capped(outer, o.cap)
            if o.w_prior and o.prior_at == "adapted":
                images = self.draw_prior(o.prior_batch_size, concept.name, step, "prior", mark)
                losses["prior_loss"] = prior = self.denoiser.loss(images, weights)
                value = value + o.w_prior * prior
            if decoys is not None:
                losses["decoy_loss"] = decoy = self.denoiser.loss(decoys, weights)
                value = value + o.w_decoy * decoy
            return value

        accumulate(v, gradient_at(terms, theta, at, self.outer_names)[1])
        return {f"{place}/{key}": float(loss.detach()) for key, loss in losses.items()}

    # what must stay

    def _benign(
        self, theta: Params, concept: ConceptSplit, step: int
    ) -> tuple[Params, dict[str, float]]:
        attack, before = self._draw(concept, step), None
        snapshots = self._attack(theta, concept, attack, step)
        if self.needs_regret:
            before = self._attack(theta, concept, attack, step, original=True)
        total: Params = {}
        loss, regret = math.nan, math.nan
        for i, snapshot in enumerate(snapshots):
            batch = self._outer_batch(concept, attack, step, i)
            loss, gradient = gradient_at(
                partial(self.denoiser.loss, batch), theta, snapshot.weights, self.outer_names
            )
            if before is not None:
                with torch.no_grad():
                    regret = loss - float(self._original_loss(batch, before[i].weights))
            if not regret <= 0:  # nan where losses are minimised themselves
                accumulate(total, gradient, self.config.w_benign / len(snapshots))
        regrets = {} if before is None else {"benign_regret": regret}
        return total, {"benign_loss": loss} | regrets

    def _preserve(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        """Return prior and distillation at θ, in one forward and backward pass, before the ramp's
        factor.
        """
        o, losses = self.config, Params()
        w_prior = o.w_prior if o.prior_at == "start" else 0.0
        if not (w_prior or o.w_distill):
            return {}, {}
        batch = self.draw_prior(o.prior_batch_size, "start", step, "prior", 0)
        with torch.no_grad():
            before = self.denoiser.predict(batch, self.original)[0] if o.w_distill else None

        def terms(weights: Weights) -> Tensor:
            guess, target = self.denoiser.predict(batch, weights)
            value = guess.new_zeros(())
            if w_prior:
                losses["prior_loss"] = prior = (guess - target).square().mean()
                value = value + w_prior * prior
            if before is not None:
                losses["distill_loss"] = distance = (guess - before).square().mean()
                value = value + o.w_distill * distance
            return value

        gradient = gradient_at(terms, theta, {}, self.outer_names)[1]
        return gradient, {key: float(loss.detach()) for key, loss in losses.items()}


# the attack in progress


@dataclass(frozen=True)
class Snapshot:
    """After ``step`` steps: the weights that the attacker moved, and, after its last step, the
    share by which the loss of its first batch has fallen (NaN before).
    """

    step: int
    weights: dict[str, Tensor]
    drop: float


class InnerAttack:
    """An attack in progress on batches of ``size`` of ``pool``, from θ on.

    It keeps no adapters: a low-rank one is the *effective* weight W + BA (LoRA, arXiv 2106.09685; A
    uniform in ±1/√in, B = 0 as in peft), so that whatever it moves is comparable with θ and can be
    merged.

    Args:
        loss: of a batch under named weights; names that are missing are those of θ.
        theta: read at every step: where it moves in between, the attack stays added to it.
        names: the parameters in the attacker's scope.
        labels: of its stream of random numbers.
    """

    def __init__(
        self,
        loss: Callable[[Batch, Weights], Tensor],
        theta: Mapping[str, Tensor],
        names: Sequence[str],
        attacker: DrawnAttacker,
        pool: Pool,
        size: int,
        seed: int,
        *labels: object,
    ) -> None:
        self.loss, self.attacker, self.size = loss, attacker, size
        self.seed, self.labels = seed, labels
        self.pool = pool.template(attacker.template)
        settings = attacker.settings
        rank = settings.rank or 0
        self.is_lora = rank > 0
        # an adapter needs a weight with an input and an output dimension
        names = [n for n in names if theta[n].ndim >= 2] if self.is_lora else names
        self.base = {name: theta[name].detach() for name in names}
        every, g = self.base.values(), generator(seed, "mima", "factors", *labels)
        self.leaves = [
            x.requires_grad_()
            for w in every
            for x in (draw_factors(w, rank, g) if self.is_lora else [w.clone()])
        ]
        # θ as the leaves know it; low-rank factors add to θ itself
        self.seen = [] if self.is_lora else [w.clone() for w in every]
        self.optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.leaves, lr=settings.lr)
        else:
            # measured on the CPU at MiniSD's size: a quarter of the time of the unfused one, a
            # third of a step
            self.optimizer = torch.optim.AdamW(
                self.leaves, lr=settings.lr, weight_decay=0.0, fused=True
            )
        self.step, self.first = 0, math.nan

    def weights(self) -> dict[str, Tensor]:
        """Return the effective weights that the leaves make."""
        if not self.is_lora:
            return dict(zip(self.base, self.leaves, strict=True))
        factors = zip(self.leaves[::2], self.leaves[1::2], strict=True)
        return {
            name: w + (b @ a).view_as(w)
            for (name, w), (a, b) in zip(self.base.items(), factors, strict=True)
        }

    def _batch(self, step: int) -> Batch:
        return self.pool.batch(self.size, self.seed, *self.labels, "lower", step)

    @torch.no_grad()
    def _follow_theta(self) -> None:
        """Keep what the attack has added to θ while θ moves."""
        for leaf, seen, w in zip(self.leaves, self.seen, self.base.values(), strict=False):
            leaf.add_(w - seen)
            seen.copy_(w)

    def advance(self, until: int) -> Snapshot:
        """Take steps up to number ``until``.

        Raises:
            FloatingPointError: the loss left the finite numbers; says at which step, and of which
                attacker.
        """
        self._follow_theta()
        while self.step < until:
            loss = self.loss(self._batch(self.step), self.weights())
            value = float(loss.detach())
            self.step += 1
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"loss {value} in inner step {self.step} under {self.attacker}"
                )
            self.first = value if self.step == 1 else self.first
            self.optimizer.zero_grad()
            loss.backward(inputs=self.leaves)
            self.optimizer.step()
        with torch.no_grad():
            weights = {name: w.detach().clone() for name, w in self.weights().items()}
            drop = math.nan
            if self.step == self.attacker.settings.steps:
                drop = 1 - float(self.loss(self._batch(0), weights)) / self.first
        return Snapshot(self.step, weights, drop)

    def state(self) -> dict[str, Tensor]:
        """Return all that a resumed attack needs besides θ, the attack and its labels."""
        state = state_tensors(self.leaves, self.optimizer)
        state |= {f"seen.{i}": w for i, w in enumerate(self.seen)}
        state["progress"] = torch.tensor([float(self.step), self.first], dtype=torch.float64)
        return {key: value.detach().clone() for key, value in state.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        restore_state(self.leaves, self.optimizer, state)
        for i, tensor in enumerate(self.seen):
            tensor.copy_(state[f"seen.{i}"])
        self.step, self.first = int(state["progress"][0]), float(state["progress"][1])
