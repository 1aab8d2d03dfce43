"""KaSA and MiLoRA against their equations in float64, and KaSA against peft and its authors' penalty."""

from dataclasses import replace

import peft
import pytest
import torch
from support.method_configs import KASA, MILORA
from support.models import Transformer
from support.one_projection import SIZES, assert_equal, layer_of, tokens
from torch import nn

from fourier_moe import (
    KaSAConfig,
    MiLoRAConfig,
    adapters,
    after_step,
    inject,
    regularization,
)

X = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_milora_starts_as_the_smallest_triplets_and_trains_beside_what_is_left(M, N):
    layer, W, bias, (A, B) = layer_of(MILORA, M, N, moved=False)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    smallest = (U[:, -4:] * S[-4:]) @ Vh[-4:]
    assert_equal(2 * B @ A, smallest)
    assert_equal(B.norm(dim=0), (S[-4:] / 2).sqrt())  # half of S on each side
    assert_equal(A.norm(dim=1), (S[-4:] / 2).sqrt())
    assert_equal(layer.base.weight.detach(), W - smallest)
    assert_equal(layer(tokens(N)), tokens(N).double() @ W.T + bias)

    layer, W, bias, (A, B) = layer_of(MILORA, M, N)
    assert_equal(layer(tokens(N)), tokens(N).double() @ (W - smallest + 2 * B @ A).T + bias)


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_kasa_trains_a_diagonal_beside_the_weight_without_its_smallest_triplets(M, N):
    layer, W, bias, (A, B, d) = layer_of(KASA, M, N)
    assert (A.shape, B.shape, d.shape) == ((4, N), (M, 4), (4,))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = (U[:, :-4] * S[:-4]) @ Vh[:-4]
    assert_equal(layer(tokens(N)), tokens(N).double() @ (kept + 2 * B @ torch.diag(d) @ A).T + bias)
    assert_equal(layer.regularization(), kasa_penalty([(A, B, d)], 0.3, 0.2))


def kasa_penalty(layers, beta, gamma):
    """The authors' penalty with their Gram matrices, of all layers' A, B and d."""
    total = 0
    for A, B, d in layers:
        grams = [A.T @ A, B @ B.T]
        distances = [torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype)) for gram in grams]
        total = total + beta * d.square().sum() + gamma * sum(distances)
    return total / len(layers)


def kasa_tensors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]


def test_kasa_penalty_is_its_authors_in_value_and_gradient():
    model = Transformer()
    inject(model, KASA)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is zero at first, where its penalty has no slope
        (model(X).square().mean() + regularization(model)).backward()
        optimizer.step()
    model.zero_grad()
    tensors = [kasa_tensors(adapter.layer) for adapter in adapters(model).values()]
    trained = [tensor for layer in tensors for tensor in layer]
    total, expected = regularization(model), kasa_penalty(tensors, 0.3, 0.2)
    torch.testing.assert_close(total, expected)
    gradients = torch.autograd.grad(total, trained)
    assert len(gradients) == 12
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, trained))


def test_kasa_penalty_does_not_grow_with_the_number_of_projections():
    penalties = []
    for layers in (1, 5):
        model = Transformer(layers=layers)
        inject(model, replace(KASA, beta=0.0))
        with torch.no_grad():
            for adapter in adapters(model).values():
                for tensor in kasa_tensors(adapter.layer):
                    tensor.fill_(0.1)
        penalties.append(float(regularization(model)))
    assert penalties[0] == pytest.approx(penalties[1])


def train(model, steps=12, penalty=regularization):
    model.train()
    model.norm.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X.to(model.classifier.weight.dtype)).float(), LABELS)
        (loss + penalty(model)).backward()
        optimizer.step()
        after_step(model)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kasa_losses_are_those_of_peft_itself_with_the_authors_penalty(dtype):
    ours, theirs = Transformer().to(dtype), Transformer().to(dtype)
    inject(ours, KASA)
    torch.manual_seed(KASA.seed)
    kasa = peft.KasaConfig(beta=0.3, gamma=0.2)
    peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, kasa_config=kasa, target_modules=["q_proj", "v_proj"]))
    theirs.classifier.requires_grad_(True)
    layers = [kasa_tensors(module) for module in theirs.modules() if hasattr(module, "lora_diag")]
    expected = train(theirs, penalty=lambda _: kasa_penalty(layers, 0.3, 0.2))
    assert train(ours) == pytest.approx(expected, rel=1e-6)


def test_kasa_says_which_peft_it_needs(monkeypatch):
    monkeypatch.setattr("fourier_moe.baselines.singular.version", lambda _: "0.20.1.dev0")
    with pytest.raises(ValueError, match=r"^KaSAConfig: needs peft 0.21 or newer, and 0.20.1.dev0 is installed"):
        KaSAConfig(targets=["q_proj"])
    MiLoRAConfig(targets=["q_proj"])
