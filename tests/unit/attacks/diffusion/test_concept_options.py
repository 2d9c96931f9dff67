"""Options that every attacker has, or LoRA alone: optimizers, canonical weights, a donor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attack_examples import interrupted
from concept_examples import FAST, assert_equal, attack, launch, model, task, unbroken
from tiny_diffusion import tiny_case, tiny_diffusion

from attacks.diffusion.interpolate import Interpolation
from attacks.optimizers import build
from immunize.controls import Reparametrization
from lab.core.errors import UserError


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
@pytest.mark.parametrize("name", ["lora", "full_finetune"])
def test_other_optimizers_learn_and_resume_bit_for_bit(name: str, optimizer: str) -> None:
    attacker = attack(name, optimizer=optimizer)
    whole = launch(attacker)
    assert whole.values["test_loss"][-1] < whole.values["test_loss"][0]
    assert_equal(interrupted(lambda c: launch(attacker, checkpoint=c), 1), whole)


def test_muon_orthogonalizes_matrices_and_moves_vectors_by_adamw() -> None:
    matrix, vector = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (3,)))
    optimizer = build("muon", [matrix, vector], lr=1.0, weight_decay=0.0)
    matrix.grad, vector.grad = torch.randn(4, 3), torch.tensor([1.0, -2.0, 4.0])
    optimizer.step()
    values = torch.linalg.svdvals(matrix.detach()) / (0.2 * 4**0.5)  # Moonlight's factor
    assert torch.all((values > 0.6) & (values < 1.3))  # Newton-Schulz with 5 steps is rough
    torch.testing.assert_close(vector.detach(), torch.tensor([-1.0, 1.0, -1.0]))


def test_a_canonical_form_undoes_a_reparametrization() -> None:
    control = Reparametrization(condition=100.0)
    changed = control(
        tiny_diffusion(), tiny_case(), seed=0, checkpoint=None, log=lambda *_, **__: None
    )
    attacker = attack("lora", canonicalize=True)
    plain, undone = launch(attacker), launch(attacker, changed)
    torch.testing.assert_close(
        undone.values["test_loss"], plain.values["test_loss"], rtol=1e-3, atol=0
    )
    naive = launch(attack("lora"), changed).values["test_loss"][-1]
    assert abs(naive - plain.values["test_loss"][-1]) > 1e-3 * naive
    # adapters alone would miss the change of the attention weights
    assert undone.info["form"] == "delta"
    assert any(".attn1.to_q" in name for name in undone.weights)


def test_a_transplant_from_the_attacked_model_itself_is_the_plain_attack(tmp_path: Path) -> None:
    donor = str(model().save(tmp_path / "donor"))
    found, plain = launch(attack("lora", donor=donor)), unbroken("lora")
    assert torch.equal(found.samples["name"], plain.samples["name"])
    assert all(torch.equal(found.weights[k], plain.weights[k]) for k in plain.weights)


def test_a_donor_of_another_architecture_is_refused_before_anything_runs(tmp_path: Path) -> None:
    narrow = tiny_diffusion()
    for name, module in list(narrow.unet.named_modules()):
        if name.endswith("attn2.to_q"):
            module.weight = torch.nn.Parameter(module.weight[:, :1].clone())
            module.in_features = 1
    with pytest.raises(UserError, match=r"attacks.lora.donor=.*same architecture"):
        attack("lora", donor=str(model().save(tmp_path / "d"))).dry_open(narrow, task())
    with pytest.raises(UserError, match=r"attacks.lora.donor=nowhere"):
        attack("lora", donor="nowhere").fingerprint()


def test_an_interpolation_ends_at_its_reach_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    base = model().copy()
    with torch.no_grad():
        for parameter in base.unet.parameters():
            parameter += 0.1
    path = str(base.save(tmp_path / "base"))
    attacker = Interpolation(name="interpolate", base=path, reach=0.5, **FAST)
    whole = launch(attacker)
    for name, parameter in model().unet.named_parameters():
        torch.testing.assert_close(whole.weights[f"unet.{name}"], parameter + 0.05)
    assert_equal(interrupted(lambda c: launch(attacker, checkpoint=c), 1), whole)
