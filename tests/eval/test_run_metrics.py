from __future__ import annotations

import re
from pathlib import Path

import hydra
import pytest
import torch
from fake_run import DeepModel, FakeRun, Matrix, case, decay, linear, random_data
from omegaconf import OmegaConf

from eval.conditioning import Conditioning
from eval.convergence import Convergence
from eval.geometry import Geometry
from eval.probe_accuracy import ProbeAccuracy
from eval.verdict import Verdict
from lab.condition import condition_number
from lab.errors import UserError
from lab.types import CONTROL, Budget, RunMetric, Scores, Trajectory

EYE = torch.eye(4, dtype=torch.float64)
ROOT = Path(__file__).parents[2]
BUDGET = Budget(20, 5, 20)
STEPS = BUDGET.snapshots()


def rates(harmful: float, benign: float, *, harmful_accuracy: float = 0.8, benign_accuracy: float = 0.8):
    """Trajectories where the control decays with 0.8 on both tasks."""

    def make(arm: str, attack: str, role: str, seed: int) -> Trajectory:
        rate = 0.8 if arm == CONTROL else harmful if role == "harmful" else benign
        top = 0.8 if arm == CONTROL else harmful_accuracy if role == "harmful" else benign_accuracy
        return decay(rate, STEPS, top)

    return make


def fake(theta: torch.Tensor = EYE, **kwargs) -> FakeRun:
    cases = kwargs.pop("cases", (case(random_data(0), random_data(1)), case(random_data(2), random_data(3), name="b")))
    return FakeRun(cases, {CONTROL: linear(EYE), "kappa": linear(theta)}, **kwargs)


# --- conditioning -------------------------------------------------------------------------------------------------


def test_identical_arms_have_rir_one() -> None:
    scores = Conditioning()(fake()).metrics
    for name in ("rir", "kappa_harmful_ratio", "kappa_benign_ratio"):
        assert scores[name].value == pytest.approx(1, abs=1e-12)
    assert scores["rir_above_one"].value == 0
    assert scores["kappa_benign"].value == pytest.approx(scores["kappa_benign_control"].value)


def test_rir_by_hand_on_diagonal_data() -> None:
    benign, harmful = torch.diag(torch.tensor([1.0, 2.0])).double(), torch.diag(torch.tensor([1.0, 4.0])).double()
    theta = torch.diag(torch.tensor([2.0, 1.0])).double()  # benign → diag(2, 2), harmful → diag(2, 4)
    run = FakeRun((case(benign, harmful),), {CONTROL: linear(torch.eye(2).double()), "kappa": linear(theta)})
    scores = Conditioning()(run)
    metrics = scores.metrics
    assert metrics["kappa_benign_ratio"].value == pytest.approx(1 / 4)
    assert metrics["kappa_harmful_ratio"].value == pytest.approx(4 / 16)
    assert metrics["rir"].value == pytest.approx(1)
    assert metrics["kappa_harmful"].value == pytest.approx(4)
    assert metrics["kappa_harmful_control"].value == pytest.approx(16)
    # pencil of (diag(1, 16), diag(1, 4)) is {1, 4}: κ(M) = 4, κ(K_P) = 4, κ(K_H) = 16
    assert metrics["rir_bound"].value == pytest.approx(1)
    assert metrics["rir_bound_ratio"].value == pytest.approx(1)
    row = scores.tables["pairs"][0]
    assert row["rir"] == pytest.approx(1)
    assert {row["benign"], row["task"], row["case"], row["seed"]} == {"good", "harm0", "a", 0}
    values = [(r["arm"], r["role"], r["value"]) for r in scores.tables["spectrum"]]
    assert ("kappa", "harmful", pytest.approx(0.5)) in values


def test_whitening_the_benign_task_attains_the_bound() -> None:
    benign = random_data(0)
    values, vectors = torch.linalg.eigh(benign.T @ benign)
    metrics = Conditioning()(fake(vectors @ torch.diag(values.rsqrt()), cases=(case(benign, random_data(1)),))).metrics
    assert metrics["rir_bound_ratio"].value == pytest.approx(1, abs=1e-9)
    assert metrics["rir"].n == 3
    assert metrics["kappa_benign"].value == pytest.approx(1, abs=1e-9)


def test_bound_holds_where_theta_0_is_not_the_identity() -> None:
    theta0 = random_data(9, rows=4)
    run = FakeRun(
        (case(random_data(0), random_data(1)),), {CONTROL: linear(theta0), "kappa": linear(random_data(8, rows=4))}
    )
    assert Conditioning()(run).metrics["rir_bound_ratio"].value <= 1 + 1e-9


def test_singular_benign_task_has_no_bound_and_says_why() -> None:
    benign = random_data(0)
    benign[:, 3] = 0
    metrics = Conditioning()(fake(cases=(case(benign, random_data(1)),))).metrics
    for name in ("rir_bound", "rir_bound_ratio"):
        assert metrics[name].value is None
        assert "rank 3 of 4" in str(metrics[name].note)
    assert metrics["rir"].value == pytest.approx(1)


def test_rank_that_moves_is_said() -> None:
    theta = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])).double()
    assert "rank moved in" in str(Conditioning()(fake(theta)).metrics["rir"].note)


def test_least_protected_of_several_harmful_tasks_counts() -> None:
    theta = torch.diag(torch.tensor([1.0, 3.0, 1.0, 2.0])).double()
    single = [Conditioning()(fake(theta, cases=(case(random_data(0), random_data(i)),))) for i in (1, 5)]
    both = Conditioning()(fake(theta, cases=(case(random_data(0), random_data(1), random_data(5)),)))
    assert both.metrics["rir"].value == pytest.approx(min(s.metrics["rir"].value for s in single))
    assert "least protected of 2" in str(both.metrics["rir"].note)
    assert len(both.tables["pairs"]) == 2 * 3


def test_other_definitions_carry_a_suffix_and_no_bound() -> None:
    scores = Conditioning("conditioning_ridge", definition="ridge", ridge=1.0)(fake())
    assert all(n.endswith("_ridge") for n in (*scores.metrics, *scores.tables))
    x = random_data(0)
    expected = float(torch.linalg.cond(x.T @ x + EYE))
    assert scores.tables["pairs_ridge"][0]["kappa_benign"] == pytest.approx(expected)
    assert "rir_release" in Conditioning(definition="release")(fake()).metrics


def test_deep_models_use_groups_and_report_their_spread() -> None:
    cases = (case(random_data(0, rows=300), random_data(1, rows=300)),)
    deep = DeepModel([("head", Matrix(EYE))], 4)
    run = FakeRun(cases, {CONTROL: deep, "kappa": deep})
    scores = Conditioning(groups=3, size=50)(run)
    assert scores.metrics["rir"].value == pytest.approx(1)
    assert "standard deviation between groups" in str(scores.metrics["kappa_benign"].note)
    assert "rir_bound" not in scores.metrics
    assert scores.tables["pairs"][0]["kappa_benign"] != pytest.approx(condition_number(random_data(0, rows=300)))


def test_history_becomes_curves() -> None:
    logs = {"step": [0, 10], "kappa_harmful": [100.0, 200.0], "kappa_benign": [10.0, 5.0], "loss": [1.0, 0.5]}
    scores = Conditioning()(fake(logs=logs))
    assert scores.curves["rir"]["kappa"] == pytest.approx([1, 4])
    assert scores.curves["rir"]["step"] == [0, 10]
    assert len({tuple(scores.curves[n]["step"]) for n in ("rir_bound_ratio", "kappa_benign", "kappa_harmful")}) == 1


def test_control_alone_gives_only_absolute_figures() -> None:
    run = FakeRun((case(random_data(0), random_data(1)),), {CONTROL: linear(EYE)}, immunizer=CONTROL)
    metrics = Conditioning()(run).metrics
    assert set(metrics) == {"kappa_benign_control", "kappa_harmful_control", "rir_bound"}


# --- geometry -----------------------------------------------------------------------------------------------------


def test_principal_angles_of_axes_by_hand() -> None:
    benign = torch.tensor([[10.0, 0.0], [0.0, 1.0]]).double()
    harmful = torch.tensor([[10.0, 10.0], [1.0, -1.0]]).double()
    models = {CONTROL: linear(torch.eye(2).double()), "kappa": linear(torch.diag(torch.tensor([1.0, 0.1])).double())}
    scores = Geometry(dim=1)(FakeRun((case(benign, harmful),), models))
    assert scores.metrics["principal_angle_mean_control"].value == pytest.approx(45, abs=1e-6)
    assert scores.metrics["principal_angle_mean"].value < 10
    assert scores.metrics["principal_angle_mean"].unit == "°"
    # pencil of (XᵀX) by hand: K_H = [[101, 99], [99, 101]], K_P = diag(100, 1)
    k_p, k_h = benign.T @ benign, harmful.T @ harmful
    values = torch.linalg.eigvals(torch.linalg.solve(k_p, k_h)).real
    assert scores.metrics["kappa_pencil_control"].value == pytest.approx(float(values.max() / values.min()))
    assert "kappa_pencil" not in scores.metrics  # an invertible linear map leaves the pencil as it is
    assert {r["arm"] for r in scores.tables["pencil"]} == {CONTROL}


def test_a_deep_model_can_change_the_pencil() -> None:
    cases = (case(random_data(0), random_data(1)),)
    run = FakeRun(
        cases, {CONTROL: DeepModel([("h", Matrix(EYE))], 4), "kappa": DeepModel([("h", Matrix(EYE[:, :2]))], 2)}
    )
    metrics = Geometry()(run).metrics
    assert metrics["kappa_pencil"].value <= metrics["kappa_pencil_control"].value  # eigenvalues interlace


# --- convergence --------------------------------------------------------------------------------------------------


def test_identical_arms_have_slowdown_one_and_no_deviation() -> None:
    metrics = Convergence()(fake(trajectories=rates(0.8, 0.8))).metrics
    for name in ("slowdown_harmful_probe", "slowdown_benign_worst", "slowdown_loss_harmful_worst"):
        assert metrics[name].value == pytest.approx(1)
    assert metrics["slowdown_relative_worst"].value == pytest.approx(1)
    assert metrics["rfd_harmful_probe"].value == pytest.approx(0)
    assert metrics["norm_ratio_harmful_probe_ratio"].value == pytest.approx(1)


def test_norm_ratio_and_slowdown_by_hand() -> None:
    scores = Convergence()(fake(trajectories=rates(0.8**0.5, 0.8)))
    metrics = scores.metrics
    assert metrics["norm_ratio_harmful_probe_control"].value == pytest.approx(0.8**20)
    assert metrics["norm_ratio_harmful_probe"].value == pytest.approx(0.8**10)
    assert metrics["norm_ratio_harmful_probe_ratio"].value == pytest.approx(0.8**-10)
    assert metrics["norm_ratio_harmful_probe_5x"].value == pytest.approx(0.8**50)
    slow = metrics["slowdown_harmful_probe"]
    assert slow.value == pytest.approx(2, rel=0.05)  # linear between snapshots: close to the true factor of two
    assert (slow.low, slow.high) == (pytest.approx(slow.value), pytest.approx(slow.value))
    assert slow.better == "higher"
    assert metrics["slowdown_benign_probe"].better == "lower"
    assert metrics["slowdown_relative_probe"].value == pytest.approx(slow.value)
    curve = scores.curves["norm_ratio_harmful_probe"]
    assert curve["step"] == list(STEPS)
    assert curve[CONTROL][-1] == pytest.approx(0.8**100)


def test_a_target_never_met_is_a_lower_limit() -> None:
    score = Convergence()(fake(trajectories=rates(0.999, 0.8))).metrics["slowdown_harmful_probe"]
    assert score.value == pytest.approx(5)  # censored at 100 of 20 steps
    assert str(score.note).startswith("at least")


def test_faster_learning_scores_negative_in_the_signed_twin() -> None:
    metrics = Convergence()(fake(trajectories=rates(0.5, 0.8))).metrics
    assert metrics["rfd_harmful_probe"].value > 0
    assert metrics["rfd_signed_harmful_probe"].value < 0


def test_worst_is_taken_over_attackers() -> None:
    def make(arm: str, attack: str, role: str, seed: int) -> Trajectory:
        rate = 0.8 if arm == CONTROL else {"weak": 0.98, "strong": 0.8}[attack]
        return decay(rate, STEPS)

    metrics = Convergence()(fake(trajectories=make, attacks=("weak", "strong"))).metrics
    assert metrics["slowdown_harmful_worst"].value == pytest.approx(1)
    assert "strong" in str(metrics["slowdown_harmful_worst"].note)
    assert metrics["slowdown_benign_worst"].value > 2
    assert "weak" in str(metrics["slowdown_benign_worst"].note)


def test_divergence_is_said_and_is_no_protection() -> None:
    def make(arm: str, attack: str, role: str, seed: int) -> Trajectory:
        if arm == CONTROL:
            return decay(0.8, STEPS)
        return decay(0.99, STEPS[:4], status="diverged")

    metrics = Convergence()(fake(trajectories=make)).metrics
    assert "6 of 6 trajectories diverged" in str(metrics["norm_ratio_harmful_probe"].note)
    assert metrics["slowdown_harmful_probe"].value < 1  # censored where it broke off
    assert metrics["slowdown_benign_probe"].value == pytest.approx(5)


def test_data_are_loaded_once_per_seed_and_trajectories_once() -> None:
    """Scenario data of all seeds may not fit in memory: no metric may jump back and forth between seeds."""

    class Counting(FakeRun):
        loads: list[int] = []
        reads: list[tuple] = []

        def cases(self, seed: int):
            self.loads.append(seed)
            return super().cases(seed)

        def trajectory(self, arm, attack, case, task, seed):
            self.reads.append((arm, attack, case.name, task.name, seed))
            return super().trajectory(arm, attack, case, task, seed)

    models = {CONTROL: linear(EYE), "kappa": linear(EYE)}
    for metric in (Conditioning(), Geometry(), Convergence(), ProbeAccuracy(), Verdict()):
        run = Counting(classes(), models, rates(0.9, 0.8))
        run.loads, run.reads = [], []
        metric(run)
        assert run.loads == [0, 1, 2]
        assert len(run.reads) == len(set(run.reads)) == (12 if metric.needs_attack else 0)


# --- accuracy -----------------------------------------------------------------------------------------------------


def classes() -> tuple:
    return (case(random_data(0), random_data(1), kind="classification"),)


def test_accuracies_and_sgrc_by_hand() -> None:
    run = fake(cases=classes(), trajectories=rates(0.8, 0.8, harmful_accuracy=0.6))
    metrics = ProbeAccuracy()(run).metrics
    assert metrics["accuracy_harmful_probe_5x_control"].value == pytest.approx(0.8, abs=1e-6)
    assert metrics["accuracy_harmful_probe_5x"].value == pytest.approx(0.6, abs=1e-6)
    assert metrics["sgrc_harmful_probe_5x"].value == pytest.approx(0.25, abs=1e-6)
    assert metrics["sgrc_benign_worst"].value == pytest.approx(0)
    assert metrics["slowdown_accuracy_benign_probe"].value == pytest.approx(1)
    assert str(metrics["slowdown_accuracy_harmful_probe"].note).startswith("at least")


def test_accuracy_of_regression_is_a_user_error() -> None:
    with pytest.raises(UserError, match="probe_accuracy"):
        ProbeAccuracy()(fake(trajectories=rates(0.8, 0.8)))


# --- verdict ------------------------------------------------------------------------------------------------------


def test_protection_that_keeps_the_benign_task_passes() -> None:
    scores = Verdict()(fake(trajectories=rates(0.95, 0.8)))
    assert scores.metrics["verdict"].value == 1
    assert scores.metrics["verdict_share"].value == 1
    assert "benign task kept" in str(scores.metrics["verdict"].note)


@pytest.mark.parametrize(
    ("harmful", "benign", "reason"),
    [(0.99, 0.99, "benign task damaged"), (0.8, 0.8, "not held back"), (0.6, 0.8, "not held back")],
)
def test_a_broken_model_or_no_effect_fails(harmful: float, benign: float, reason: str) -> None:
    scores = Verdict()(fake(trajectories=rates(harmful, benign)))
    assert scores.metrics["verdict"].value == 0
    assert scores.metrics["verdict_share"].value == 0
    assert reason in str(scores.metrics["verdict"].note)


def test_a_benign_attack_that_diverges_fails() -> None:
    def make(arm: str, attack: str, role: str, seed: int) -> Trajectory:
        if arm != CONTROL and role == "benign":
            return decay(0.8, STEPS, status="diverged")
        return decay(0.8 if arm == CONTROL else 0.95, STEPS)

    assert Verdict()(fake(trajectories=make)).metrics["verdict"].value == 0


def test_slow_by_norm_ratio_but_fast_by_loss_fails() -> None:
    def make(arm: str, attack: str, role: str, seed: int) -> Trajectory:
        found = decay(0.8, STEPS)
        if arm != CONTROL and role == "harmful":
            found.values["norm_ratio"] = [0.95**s for s in STEPS]
        return found

    scores = Verdict()(fake(trajectories=make))
    assert scores.metrics["verdict"].value == 0
    assert "training loss" in str(scores.metrics["verdict"].note)


def test_a_benign_user_stops_at_the_best_point() -> None:
    def make(arm: str, attack: str, role: str, seed: int) -> Trajectory:
        if role == "harmful":
            return decay(0.8 if arm == CONTROL else 0.95, STEPS)
        found = decay(0.8, STEPS)
        if arm != CONTROL:  # overfits after its best point, which is as good as the control's
            found.values["test_loss"] = [
                max(v, 0.01) + 0.001 * s for v, s in zip(found.values["test_loss"], STEPS, strict=True)
            ]
        return found

    assert Verdict()(fake(trajectories=make)).metrics["verdict"].value == 1

    def spoilt(arm: str, attack: str, role: str, seed: int) -> Trajectory:
        found = make(arm, attack, role, seed)
        if role == "benign" and arm != CONTROL:
            found.values["test_loss"] = [0.3 + v for v in found.values["test_loss"]]
        return found

    assert Verdict()(fake(trajectories=spoilt)).metrics["verdict"].value == 0


def test_sgrc_alone_can_carry_the_harmful_side() -> None:
    run = fake(cases=classes(), trajectories=rates(0.8, 0.8, harmful_accuracy=0.4))
    assert Verdict()(run).metrics["verdict"].value == 1


# --- configuration ------------------------------------------------------------------------------------------------

CONFIGS = sorted((ROOT / "conf" / "eval").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_a_metric(path: Path) -> None:
    config = OmegaConf.load(path)
    assert list(config) == [path.stem]
    metric = hydra.utils.instantiate(config[path.stem])
    assert isinstance(metric, RunMetric)
    assert metric.name == path.stem


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: Conditioning(definition="rnak"), "eval.conditioning.definition"),
        (lambda: Conditioning(definition="ridge"), "eval.conditioning.ridge"),
        (lambda: Conditioning(groups=0), "eval.conditioning.groups"),
        (lambda: Geometry(energy=0), "eval.geometry.energy"),
        (lambda: Geometry(dim=0), "eval.geometry.dim"),
        (lambda: Convergence(rfd_smallest=0), "eval.convergence.rfd_smallest"),
        (lambda: ProbeAccuracy(target_share=2), "eval.probe_accuracy.target_share"),
        (lambda: Verdict(min_slowdown=0.5), "eval.verdict.min_slowdown"),
    ],
)
def test_wrong_options_name_their_key(build, key: str) -> None:
    with pytest.raises(UserError) as caught:
        build()
    assert caught.value.key == key


def test_every_metric_name_is_documented() -> None:
    text = (ROOT / "eval" / "metrics.md").read_text()
    wild = {"ROLE": "(harmful|benign)", "ATTACK": "[a-z0-9_]+", "K": r"\d+"}
    documented = re.findall(r"`([a-zA-Z0-9_]+)`", text)
    patterns = [re.compile(re.sub("ROLE|ATTACK|K", lambda m: wild[m[0]], name)) for name in documented]
    run = fake(cases=classes(), trajectories=rates(0.9, 0.8))
    scores = [m(run) for m in (Conditioning(), Geometry(), Convergence(), ProbeAccuracy(), Verdict())]
    scores.append(Conditioning(definition="ridge", ridge=1.0)(run))
    names = {n for s in scores for n in s.metrics}
    assert len(names) > 60
    assert [n for n in names if not any(p.fullmatch(n) for p in patterns)] == []
    assert all(isinstance(s, Scores) for s in scores)
