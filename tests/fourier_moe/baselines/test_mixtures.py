"""Other mixtures of experts against their equations token by token, and their starts."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from support.routed_cases import (
    CONFIGS,
    LORA,
    ONE_EACH,
    SIZES,
    fitting,
    gates_by_the_equations,
    moved_layer,
    of_each,
    projection,
    tokens,
)
from torch import nn

from fourier_moe import (
    AdaMoLEConfig,
    FFTMoEConfig,
    GOATConfig,
    HydraLoRAConfig,
)
from fourier_moe.adapter import build_layer

# ---------------------------------------------------------------- equations


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("M", "N"), SIZES)
@of_each(CONFIGS)
def test_output_is_that_of_the_equations_token_by_token(config, M, N, bias):
    layer, base = moved_layer(config, M, N, bias)
    config = fitting(config, M, N)
    x = tokens(3, 6, N)
    y = layer(x)
    assert y.shape == (3, 6, M)
    b = base.bias if bias else torch.zeros(M, dtype=torch.float64)
    num_active = set()
    for token, actual in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        gates = gates_by_the_equations(config, layer, token)
        num_active.add(sum(gate > 0 for gate in gates))
        if isinstance(config, FFTMoEConfig):
            experts = layer.experts
            expected = sum(
                gate * (experts.weight[e] @ token + (experts.bias[e] if bias else 0)) for e, gate in enumerate(gates)
            )
        else:
            rank = config.r if isinstance(config, HydraLoRAConfig) else config.r // 4
            s = math.sqrt(3 * config.eta * N / rank) if getattr(config, "eta", None) else config.alpha / rank
            A, B = layer.experts.A, layer.experts.B
            shared = isinstance(config, HydraLoRAConfig)
            weight = layer.base.weight if isinstance(config, GOATConfig) else base.weight
            update = sum(gate * B[e] @ (A[0 if shared else e] @ token) for e, gate in enumerate(gates))
            expected = weight @ token + b + s * update
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    if isinstance(config, AdaMoLEConfig):
        assert len(num_active) > 1  # else the threshold would not have been put to the test


@of_each(CONFIGS)
def test_gradients_are_those_of_finite_differences(config):
    layer, _ = moved_layer(config, 5, 4)
    x = tokens(3, 4, seed=2).requires_grad_()
    parameters = [p for group in layer.parameter_groups().values() for p in group]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


@of_each(LORA)
def test_delta_weight_of_each_expert_is_what_its_gate_weighs(config):
    layer, _ = moved_layer(config, 7, 5)
    x = tokens(6, 5)
    gates = layer.router(x).dense(4)
    updates = torch.stack([layer.experts.delta_weight(e) for e in range(4)])
    expected = layer.base(x) + torch.einsum("te,emn,tn->tm", gates, updates, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@of_each(ONE_EACH)
@pytest.mark.parametrize("shape", [(7,), (0, 7), (1, 7), (2, 3, 4, 7)])
def test_any_leading_shape(config, shape):
    layer, _ = moved_layer(config, 5, 7)
    x = tokens(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y.reshape(-1, 5), layer(x.reshape(-1, 7)))


def test_upcycled_experts_compute_no_token_that_they_do_not_serve(monkeypatch):
    layer, _ = moved_layer(FFTMoEConfig(targets=["proj"], num_experts=16), 5, 7)
    x = tokens(6, 7)
    expected = layer(x)
    rows, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: rows.append(len(x)) or linear(x, *rest))
    torch.testing.assert_close(layer.experts(x, layer.router(x)), expected)
    rows.remove(6)  # the router
    assert sum(rows) == 6 * 2
    assert min(rows) >= 1


# ---------------------------------------------------------------- start


@pytest.mark.parametrize(("M", "N"), [(8, 12), (13, 9), (9, 13)])
@of_each([config for config in CONFIGS if isinstance(config, GOATConfig)])
def test_goat_starts_with_the_first_triplets_of_every_segment(config, M, N):
    base = projection(M, N)
    layer = build_layer(copy.deepcopy(base), config, "proj").double()
    U, S, Vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    rank, length = config.r // 4, min(M, N) // 4
    rest = base.weight.detach().clone()
    for e in range(4):
        wanted = range(e * length, e * length + rank)
        expected = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in wanted) / config.rho
        torch.testing.assert_close(layer.experts.delta_weight(e), expected, rtol=1e-5, atol=1e-6)
        norms = torch.stack([S[i] for i in wanted]) / (layer.experts.scaling * config.rho)
        torch.testing.assert_close(layer.experts.A[e].square().sum(1), norms, rtol=1e-5, atol=1e-7)  # both halves alike
        torch.testing.assert_close(layer.experts.B[e].square().sum(0), norms, rtol=1e-5, atol=1e-7)
        rest -= expected / 4
    torch.testing.assert_close(layer.base.weight.detach(), rest, rtol=1e-5, atol=1e-6)


def test_goat_starts_at_the_pretrained_weight_where_gates_are_even_and_near_it_elsewhere():
    base = projection(16, 16)
    layer = build_layer(copy.deepcopy(base), replace(CONFIGS[7], rho=10.0), "proj").double()
    x = tokens(200, 16)
    away = (layer(x) - base(x)).norm() / base(x).norm()
    assert 0.01 < away < 0.1
    layer.router.weight.data.zero_()
    layer.router.top_k = 4
    torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-6)
