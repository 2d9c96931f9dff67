"""The objective of ``mima_deep``: survive attackers that train for many steps (own extension of
arXiv 2412.15320).

Per upper step and concept an attacker is drawn and fine-tunes a copy of θ for K steps
(`immunize.mima.attackers`). With Θ(K) the weights it has then, Merge(θ, Θ_1 … Θ_N) those of all
concepts merged, and sg the stopped gradient,

    J(θ) = mean_marks mean_n [ −min(L(x^u_n; Θ̂), cap) + w_decoy · L(x^decoy_n; Θ̂) ]
           + w_benign · mean_marks max(L(x^u_b; Θ_b) − L(x^u_b; Θ⁰_b), 0)
           + ramp · { w_prior · L(x^prior; θ) + w_distill · ‖ε_θ(x^prior) − sg ε_θ0(x^prior)‖² }

With ``online`` an upper step looks at one mark only: θ moves there, and the attackers go on from
where they are, added to the moved θ, until their K steps are over; then new ones are drawn. The
expensive part, the attackers' steps, is then shared by as many updates as there are marks (as
adversarial training "for free" does, arXiv 1904.12843).

where x^decoy are pictures that the original paints for the concept's captions (after an erasure:
without the concept), Θ̂ is the merged model, the concept's own attacked copy, or both. The gradient
is first order, ∂Θ/∂θ = I, taken at the effective weights and brought back to θ through the merge's
adjoint. b is a benign concept of the rehearsal set, attacked like a target, that has to stay
learnable: Θ⁰_b is the original model after the same steps on the same batches, and the term is what
fine-tuning towards b has lost against it. With ``benign="loss"`` L(x^u_b; Θ_b) itself is minimised,
which goes on paying for benign concepts that learn *faster* than before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from immunize.merge.closed_form import Merge
from immunize.mima.attackers import Attack, Attackers, Running, marks
from immunize.mima.deep_step import DeepOptions, Level, StepResult, reached
from immunize.mima.losses import Denoiser, Params, Weights, accumulate, capped, gradient_at
from immunize.mima.products import checkpointed
from immunize.mima.sampling import Batch, ConceptSplit, Pool
from immunize.mima.scopes import scope_names
from lab.core.distributed import team
from lab.core.seeding import derive


class DeepObjective:
    """Gradient of J for Π_u; see the module."""

    def __init__(
        self,
        options: DeepOptions,
        attackers: Attackers,
        denoiser: Denoiser,
        names: Sequence[str],
        targets: Sequence[ConceptSplit],
        rehearsal: Sequence[ConceptSplit],
        prior: Pool | None,
        merge: Merge | None,
        seed: int,
    ) -> None:
        self.options, self.attackers, self.denoiser = options, attackers, denoiser
        self.upper_names = self.moves = tuple(names)
        self.targets, self.rehearsal, self.prior, self.merge, self.seed = (
            targets,
            rehearsal,
            prior,
            merge,
            seed,
        )
        self.original = (
            {name: denoiser.theta[name].detach().clone() for name in self.upper_names}
            if options.w_distill or self._regrets
            else {}
        )
        self.places = options.evaluate if merge is not None else ("own",)
        self.running: dict[
            str, Running
        ] = {}  # this process's attacks that go on at the next upper step, by concept
        self.saved: Params = {}
        self.team = team()

    @property
    def _regrets(self) -> bool:
        return bool(self.options.w_benign and self.rehearsal) and self.options.benign == "regret"

    def state(self) -> Params:
        own = {
            f"{name}/{k}": v for name, run in self.running.items() for k, v in run.state().items()
        }
        own = {name: tensor.cpu() for name, tensor in own.items()}
        found: Params = {}
        for member in range(self.team.size):
            found |= self.team.broadcast(own, member)
        return found

    def alike(self) -> Params:
        return {}  # an attack is known to the process that runs it

    def load(self, state: Params) -> None:
        self.saved = dict(state)

    def gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        self.denoiser.sync(self.moves)
        if not self.options.checkpointing:
            return self._gradient(theta, step)
        with checkpointed(self.denoiser.model.unet):
            return self._gradient(theta, step)

    def _gradient(self, theta: Params, step: int) -> tuple[Params, dict[str, float]]:
        concepts, here = self._concepts(step), StepResult()
        count = self._marks(step)
        total: Params = {}

        def one(n: int) -> Params:
            if n == len(concepts):
                return self._preserve(theta, n, step, here)
            level = self._attack(theta, concepts[n], step)
            if n >= len(self.targets):
                return self._benign(theta, n, concepts[n], level, step, here)
            if "merged" in self.places:
                here.levels[n] = level
            return self._own(theta, n, level, step, count, here)

        def add(n: int, gradient: Params) -> None:
            if n == len(concepts):
                here.kept = gradient
            else:
                accumulate(total, gradient, 1.0)

        self.team.reduce_in_order(len(concepts) + 1, one, add)
        if (
            "merged" in self.places
        ):  # never with several processes, see `immunize.mima.method.MimaDeep.shards`
            self._together(
                theta, [here.levels[n] for n in range(len(self.targets))], step, count, here, total
            )
        here.facts = self.team.gather(here.facts)
        values = here.values(len(self.targets)) | (
            self.merge.residual() if self.merge is not None else {}
        )
        if here.kept:
            near = (
                0.0
                if self.options.cap is None
                else min(max(values["upper_loss"], 0.0) / self.options.cap, 1.0)
            )
            values["prior_factor"] = 1 + (self.options.prior_ramp - 1) * near**2
            accumulate(total, here.kept, values["prior_factor"])
        return {name: total[name] for name in self.upper_names}, values

    def _concepts(self, step: int) -> list[ConceptSplit]:
        """The targets, and one concept to practise with where a benign term is asked for."""
        if not (self.options.w_benign and self.rehearsal):
            return list(self.targets)
        turn = derive(self.seed, "mima", "rehearsal", self._round(step)[0]) % len(self.rehearsal)
        return [*self.targets, self.rehearsal[turn]]

    # the attacks

    def _round(self, step: int) -> tuple[int, int]:
        """Number of the attacks that upper step ``step`` belongs to, and which of their marks it
        looks at.
        """
        return divmod(step, len(self.options.at)) if self.options.online else (step, 0)

    def _drawn(self, concept: ConceptSplit, step: int) -> Attack:
        return self.attackers.draw(self.seed, concept.name, self._round(step)[0])

    def _attack(
        self, theta: Params, concept: ConceptSplit, step: int, original: bool = False
    ) -> Level:
        """``original``: the same attack, batch by batch, on the model before immunization."""
        o, (round_, turn) = self.options, self._round(step)
        key = f"original:{concept.name}" if original else concept.name
        if turn == 0 or key not in self.running:
            self.running[key] = self._begin(
                theta, concept, self._drawn(concept, step), round_, original
            )
            if turn > 0:
                head = f"{key}/"
                saved = {k[len(head) :]: v for k, v in self.saved.items() if k.startswith(head)}
                self.running[key].load(saved)
        running = self.running[key]
        at = marks(running.attack.steps, o.at)
        if o.online:
            at = (max(1, round(o.at[turn] * running.attack.steps)),)
        try:
            return Level(running.attack, [running.advance(until) for until in at])
        except FloatingPointError as error:
            raise FloatingPointError(f"concept {concept.name}: {error}") from error
        finally:
            if not o.online or turn == len(o.at) - 1:
                del self.running[key]

    def _begin(
        self, theta: Params, concept: ConceptSplit, attack: Attack, round_: int, original: bool
    ) -> Running:
        moves = scope_names(self.denoiser.model.unet, attack.scope)
        loss = self._original_loss if original else self.denoiser.loss
        return Running(
            loss,
            {**theta, **self.original} if original else theta,
            moves,
            attack,
            concept.lower,
            self.options.inner_batch_size * concept.concepts,
            self.seed,
            concept.name,
            round_,
        )

    def _original_loss(self, batch: Batch, weights: Weights) -> Tensor:
        return self.denoiser.loss(batch, {**self.original, **weights})

    def _upper(self, concept: ConceptSplit, template: str, step: int, mark: int) -> Batch:
        """Held-out pictures with the captions that the attacker taught, since it will ask by
        them.
        """
        size = self.options.batch_size * concept.concepts
        return concept.upper.template(template).batch(
            size, self.seed, concept.name, step, "upper", mark
        )

    def _decoys(self, concept: ConceptSplit, template: str, step: int, mark: int) -> Batch | None:
        if concept.decoys is None:
            return None
        size = self.options.batch_size * concept.concepts
        return concept.decoys.template(template).batch(
            size, self.seed, concept.name, step, "decoys", mark
        )

    # ── what must become hard

    def _marks(self, step: int) -> int:
        """Marks of the attack that has most; in the others the last one stands for those that are
        missing.
        """
        if self.options.online:
            return 1
        drawn = [self._drawn(concept, step) for concept in self.targets]
        return max(len(marks(attack.steps, self.options.at)) for attack in drawn)

    def _own(
        self, theta: Params, n: int, level: Level, step: int, count: int, here: StepResult
    ) -> Params:
        """A target's −min(L, cap), and the prior where it is asked for there, at its own attacked
        weights.
        """
        v: Params = {}
        here.facts[n] = reached(level)
        if "own" not in self.places:
            return v
        for i in range(count):
            weights = level.found[min(i, len(level.found) - 1)].weights
            here.facts[n] |= self._one(theta, weights, "own", n, level.attack.template, step, i, v)
        share = 1 / (count * len(self.places) * len(self.targets))
        return {name: g * share for name, g in v.items()}

    def _together(
        self,
        theta: Params,
        levels: list[Level],
        step: int,
        count: int,
        here: StepResult,
        total: Params,
    ) -> None:
        """The same at the merged weights, first order through the merge."""
        assert self.merge is not None
        share = 1 / (count * len(self.places) * len(self.targets))
        for i in range(count):
            v: Params = {}
            point = self._merged(
                theta, [level.found[min(i, len(level.found) - 1)].weights for level in levels]
            )
            for n in range(len(self.targets)):
                here.facts[n] |= self._one(
                    theta, point, "merged", n, levels[n].attack.template, step, i, v
                )
            direct, parts = self.merge.adjoint(v)
            for part in (direct, *parts):
                accumulate(total, part, share)

    def _merged(self, theta: Params, here: list[Params]) -> Params:
        assert self.merge is not None
        moved = dict.fromkeys(name for weights in here for name in weights)
        with torch.no_grad():
            return self.merge({name: theta[name] for name in moved}, here)

    def _one(
        self,
        theta: Params,
        at: Weights,
        place: str,
        n: int,
        template: str,
        step: int,
        mark: int,
        v: Params,
    ) -> dict[str, float]:
        """One concept's terms at one point, added to ``v``; returns the losses by ``place``."""
        o, concept, seen = self.options, self.targets[n], {}
        batch, decoys = (
            self._upper(concept, template, step, mark),
            self._decoys(concept, template, step, mark),
        )

        def terms(weights: Weights) -> Tensor:
            upper = self.denoiser.loss(batch, weights)
            seen[f"{place}/upper_loss"] = float(upper.detach())
            value = -capped(upper, o.cap)
            if o.w_prior and o.prior_at == "adapted":
                prior = self.denoiser.loss(self._prior(concept.name, step, mark), weights)
                seen[f"{place}/prior_loss"] = float(prior.detach())
                value = value + o.w_prior * prior
            if decoys is not None:
                decoy = self.denoiser.loss(decoys, weights)
                seen[f"{place}/decoy_loss"] = float(decoy.detach())
                value = value + o.w_decoy * decoy
            return value

        accumulate(v, gradient_at(terms, theta, at, self.upper_names)[1], 1.0)
        return seen

    # what must stay

    def _benign(
        self,
        theta: Params,
        n: int,
        concept: ConceptSplit,
        level: Level,
        step: int,
        here: StepResult,
    ) -> Params:
        before = self._attack(theta, concept, step, original=True).found if self._regrets else None
        total: Params = {}
        loss, regret = math.nan, math.nan
        for i, mark in enumerate(level.found):
            batch = self._upper(concept, level.attack.template, step, i)
            loss, gradient = gradient_at(
                partial(self.denoiser.loss, batch), theta, mark.weights, self.upper_names
            )
            if before is not None:
                with torch.no_grad():
                    regret = loss - float(self._original_loss(batch, before[i].weights))
            if not regret <= 0:  # nan where losses are minimised themselves
                accumulate(total, gradient, self.options.w_benign / len(level.found))
        here.facts[n] = {"benign_loss": loss} | (
            {} if before is None else {"benign_regret": regret}
        )
        return total

    def _prior(self, label: str, step: int, mark: int) -> Batch:
        assert self.prior is not None
        return self.prior.batch(
            self.options.prior_batch_size, self.seed, label, step, "prior", mark
        )

    def _preserve(self, theta: Params, n: int, step: int, here: StepResult) -> Params:
        """Prior and distillation at θ, in one forward and backward pass, before the ramp's
        factor.
        """
        o = self.options
        w_prior = o.w_prior if o.prior_at == "start" else 0.0
        if self.prior is None or not (w_prior or o.w_distill):
            return {}
        batch, seen = self._prior("start", step, 0), {}
        with torch.no_grad():
            before = self.denoiser.predict(batch, self.original)[0] if o.w_distill else None

        def terms(weights: Weights) -> Tensor:
            guess, target = self.denoiser.predict(batch, weights)
            value = guess.new_zeros(())
            if w_prior:
                prior = (guess - target).square().mean()
                seen["prior_loss"] = float(prior.detach())
                value = value + w_prior * prior
            if before is not None:
                distance = (guess - before).square().mean()
                seen["distill_loss"] = float(distance.detach())
                value = value + o.w_distill * distance
            return value

        gradient = gradient_at(terms, theta, {}, self.upper_names)[1]
        here.facts[n] = seen
        return gradient
