"""Options of attackers (optimizers, canonical weights, a donor), and attackers that are given
images or none.
"""

import pytest
import torch
from attack_examples import interrupted
from concept_examples import (
    FAST,
    assert_equal,
    attack,
    fresh_pipeline,
    launch,
    model,
    task,
    unbroken,
)
from diffusers import ControlNetModel
from mima_examples import run
from tiny_diffusion import tiny_diffusion

from attacks.diffusion.export import export
from attacks.diffusion.image_conditioned import ControlNet, IpAdapter
from attacks.diffusion.interpolate import Interpolation
from attacks.optimizers import build
from immunize.controls import Reparametrization
from lab.core.errors import UserError
from lab.core.types import Budget


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        pytest.param("lora", "soap", marks=pytest.mark.slow),
        ("full_finetune", "muon"),
        pytest.param("lora", "muon", marks=pytest.mark.slow),
        pytest.param("full_finetune", "soap", marks=pytest.mark.slow),
    ],
)
def test_other_optimizers_learn_and_resume_bit_for_bit(name, optimizer):
    attacker = attack(name, optimizer=optimizer)
    whole = launch(attacker)
    assert whole.values["test_loss"][-1] < whole.values["test_loss"][0]
    assert_equal(interrupted(lambda c: launch(attacker, checkpoint=c), 1), whole)


def test_muon_orthogonalizes_matrices_and_moves_vectors_by_adamw():
    matrix, vector = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (3,)))
    optimizer = build("muon", [matrix, vector], lr=1.0, weight_decay=0.0)
    matrix.grad, vector.grad = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1.0, -2.0, 4.0]),
    )
    optimizer.step()
    values = torch.linalg.svdvals(matrix.detach()) / (0.2 * 4**0.5)  # Moonlight's factor
    assert torch.all((values > 0.6) & (values < 1.3))  # Newton-Schulz with 5 steps is rough
    torch.testing.assert_close(vector.detach(), torch.tensor([-1.0, 1.0, -1.0]))


def test_a_canonical_form_undoes_a_reparametrization():
    changed = run(Reparametrization(exponent=3), of=tiny_diffusion())
    attacker = attack("lora", canonicalize=True, families=())
    plain, undone = launch(attacker), launch(attacker, changed)
    torch.testing.assert_close(
        undone.values["test_loss"], plain.values["test_loss"], rtol=1e-3, atol=0
    )
    naive = launch(attack("lora", families=()), changed).values["test_loss"][-1]
    assert abs(naive - plain.values["test_loss"][-1]) > 1e-3 * naive
    # adapters alone would miss the change of the attention weights
    assert undone.info["form"] == "delta"
    assert any(".attn1.to_q" in name for name in undone.weights)


def test_a_transplant_from_the_attacked_model_itself_is_the_plain_attack(tmp_path):
    donor = str(model().save(tmp_path / "donor"))
    found, plain = launch(attack("lora", donor=donor)), unbroken("lora")
    assert torch.equal(found.samples["name"], plain.samples["name"])
    assert all(torch.equal(found.weights[k], plain.weights[k]) for k in plain.weights)


def test_a_donor_of_another_architecture_is_refused_before_anything_runs(tmp_path):
    narrow = tiny_diffusion()
    for name, module in list(narrow.unet.named_modules()):
        if name.endswith("attn2.to_q"):
            module.weight = torch.nn.Parameter(module.weight[:, :1].clone())
            module.in_features = 1
    with pytest.raises(UserError, match=r"attacks.lora.donor=.*same architecture"):
        attack("lora", donor=str(model().save(tmp_path / "d"))).dry_open(narrow, task())
    with pytest.raises(UserError, match=r"attacks.lora.donor=nowhere"):
        attack("lora", donor="nowhere").fingerprint()


@pytest.mark.slow
def test_an_interpolation_ends_at_its_reach_and_resumes_bit_for_bit(tmp_path):
    base = model().copy()
    with torch.no_grad():
        for parameter in base.unet.parameters():
            parameter += 0.1
    path = str(base.save(tmp_path / "base"))
    attacker = Interpolation(name="interpolate", base=path, reach=0.5, **FAST)
    whole = launch(attacker)
    halfway = {f"unet.{k}": p.detach() + 0.05 for k, p in model().unet.named_parameters()}
    torch.testing.assert_close(whole.weights, halfway)
    assert_equal(interrupted(lambda c: launch(attacker, checkpoint=c), 1), whole)


@pytest.mark.parametrize("kind", [ControlNet, pytest.param(IpAdapter, marks=pytest.mark.slow)])
def test_attacks_by_images_learn_and_leave_the_released_weights(kind):
    net, copied = tiny_diffusion(), tiny_diffusion()
    net.copy = lambda: copied
    attacker = kind(name="mine", lr=0.02, **FAST)
    found = launch(attacker, net)
    assert found.values["test_loss"][-1] < found.values["test_loss"][0]
    state = copied.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model().state_dict().items())
    assert_equal(interrupted(lambda c: launch(attacker, checkpoint=c), 1), found)


def test_edges_of_a_step_and_of_nothing():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1, :, :, 4:] = 255
    edges = ControlNet(name="c").features(images)
    assert edges.shape == (2, 3, 8, 8)
    assert float(edges[0].max()) == 0
    assert torch.equal(edges[1, 0, 3], torch.tensor([0.0, 0, 0, 1, 1, 0, 0, 0]))


def test_guidance_gives_both_halves_the_same_image():
    net = model().copy()
    moving = ControlNet(name="c").open(net, task(), 0)
    moving.condition(net.latents(3, 0, "given"), True)
    noisy, text = net.latents(3, 0, "noisy").repeat(2, 1, 1, 1), net.text(["a fox"] * 6)
    with torch.no_grad():
        torch.nn.init.normal_(moving.parameters["controlnet.controlnet_mid_block.weight"])
        found = net.predict(noisy, torch.zeros(6).long(), text)
        moving.condition(net.latents(3, 0, "given"), False)
        other = net.predict(noisy, torch.zeros(6).long(), text)
    torch.testing.assert_close(found[:3], found[3:])
    torch.testing.assert_close(other, found)  # six rows of three images in turn


def test_diffusers_loads_a_controlnet_and_an_ip_adapter(tmp_path):
    control = launch(ControlNet(name="c", lr=0.02, **FAST), budget=Budget(2, 1, at=()))
    export(control, tmp_path / "c")
    loaded = ControlNetModel.from_pretrained(tmp_path / "c" / "controlnet").state_dict()
    assert all(torch.equal(loaded[k.split(".", 1)[1]], v) for k, v in control.weights.items())

    adapter = launch(IpAdapter(name="i", lr=0.02, **FAST), budget=Budget(2, 1, at=()))
    export(adapter, tmp_path / "i")
    pipe = fresh_pipeline(tmp_path / "base")
    name = "ip_adapter.safetensors"
    pipe.load_ip_adapter(
        str(tmp_path / "i"), subfolder="", weight_name=name, image_encoder_folder=None
    )
    net = model().copy()
    moving = IpAdapter(name="i").open(net, task(), 0)
    noisy, t = net.latents(2, 0, "n"), torch.tensor([3, 3])
    text = net.text(["a fox", "a cat"]).hidden
    embeds = [torch.ones(2, 1, adapter.weights["image_proj.proj.weight"].shape[1])]
    own = {k: v.clone() for k, v in adapter.weights.items()}
    with torch.no_grad():
        for key, parameter in moving.parameters.items():
            file = key.removeprefix("ip_adapter.").replace("_ip.0.", "_ip.")
            file = file.replace("image_proj.image_embeds.", "image_proj.proj.")
            parameter.copy_(own[file])
        moving.close()
        extra = {"added_cond_kwargs": {"image_embeds": embeds}}
        left = net.unet(noisy, t, text, **extra).sample
        right = pipe.unet(noisy, t, text, **extra).sample
    torch.testing.assert_close(left, right)
