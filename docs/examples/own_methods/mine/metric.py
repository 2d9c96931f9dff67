"""A metric family: how many directions the features of each task fill."""

import torch

from eval.stats.intervals import score_samples
from lab.core.condition import singular_values
from lab.core.config import Text, config
from lab.core.types import BASELINE, RunMetric, Scores
from lab.models.activations import features


@config
class EffectiveRank(RunMetric):
    """``effective_rank_ROLE``: exponential of the entropy of the normalised spectrum of H, for the
    immunized model.

    ``…_baseline`` is the same for the baseline model. Over several harmful tasks the mean counts.
    Range [1, d].
    """

    accepts = frozenset({"linear", "deep"})
    needs_models = 1  # 2: the family compares with the baseline and is skipped for immunize=none
    needs_attack = False

    name: Text = "effective_rank"

    def __call__(self, run):
        out = Scores()
        for role, direction in (("harmful", "lower"), ("benign", "higher")):
            for model_name in run.model_names:
                values = [
                    [self.of(run.model(model_name, c, seed), c, role) for c in run.cases(seed)]
                    for seed in run.seeds
                ]
                end, better = (
                    ("_baseline", "neutral") if model_name == BASELINE else ("", direction)
                )
                out.metrics[f"effective_rank_{role}{end}"] = score_samples(
                    values, better, unit="directions"
                )
        return out

    @staticmethod
    def of(model, case, role):
        tasks = [task for task in case.tasks if task.role == role]
        return sum(effective_rank(features(model, task.train.x)) for task in tasks) / len(tasks)


def effective_rank(y):
    """Of features [n, d]."""
    share = singular_values(y).square()
    share = share[share > 0] / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))
