"""An immunization method: whiten the benign task by a chosen amount."""

import torch

from lab.core.condition import condition_number, range_basis
from lab.core.config import PositiveShare, Text, config
from lab.core.errors import UserError
from lab.core.types import Immunizer


@config
class PartialWhitening(Immunizer):
    """θ = W diag(s^-power) Wᵀ for X_P = U diag(s) Wᵀ, so that κ(H_P) = κ(K_P)^(1 − power).

    ``power`` 0 leaves the model as it is, 1 is `immunize.kappa.closed_form.KappaClosedForm`.

    Args:
        name: what the model is called.
        power: in (0, 1].
    """

    accepts = frozenset({"linear"})

    name: Text = "partial_whitening"
    power: PositiveShare = 0.5

    def __call__(self, model, case, *, seed, checkpoint, log):
        """Return new weights; ``model`` is left untouched.

        Raises:
            UserError: a benign task without full rank.
        """
        x = model.inputs(case.benign.train.x)
        basis, s = range_basis(x)
        if len(s) < x.shape[1]:
            raise UserError(
                "scenario", case.name, f"has rank {len(s)} of {x.shape[1]}; drop columns first."
            )
        result = model.copy()
        with torch.no_grad():
            result.theta.copy_((basis * s**-self.power) @ basis.T @ model.theta)
            for step, extractor in enumerate((model, result)):
                log(step, kappa_benign=condition_number(extractor(case.benign.train.x)))
        return result
