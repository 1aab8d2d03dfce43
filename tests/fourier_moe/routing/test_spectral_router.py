"""Routers that read a few numbers of the token's own spectrum."""

import math

import pytest
import torch
from support.models import config
from support.one_projection import SIZES
from torch import nn

from fourier_moe import FourierMoEConfig, TopKRouter, inject, load_adapter, recording, save_adapter
from fourier_moe.routing.router import lowest_waves


def reference(layer, x, k):
    """p by the definition."""
    X = torch.fft.fft(x.double())[..., 1 : k // 2 + 1]
    features = math.sqrt(2 / x.shape[-1]) * torch.cat([X.real, X.imag], -1)
    return torch.softmax(features @ layer.weight.double().T, -1)


@pytest.mark.parametrize(("N", "k"), [(7, 2), (7, 6), (8, 6), (12, 4), (384, 16)])
def test_probabilities_and_gradients_are_those_of_the_transform(N, k):
    layer = TopKRouter(N, 5, 2, num_features=k, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(3, 4, N, dtype=torch.float64, requires_grad=True)
    expected = reference(layer, x, k)
    torch.testing.assert_close(layer.probabilities(x), expected, rtol=1e-6, atol=1e-7)
    weight = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((weight * p).sum(), [x, layer.weight]) for p in (layer.probabilities(x), expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert layer.weight.shape == (5, k)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_tokens_are_routed_in_float32(autocast):
    layer = TopKRouter(12, 5, 2, num_features=4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 12).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        p = layer.probabilities(x)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.double(), reference(layer, x, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("k", "N"), [(6, 7), (6, 8), (16, 1024)])
def test_features_of_variance_one_give_numbers_of_variance_one_whatever_the_width(k, N):
    waves = lowest_waves(k, N).double()
    torch.testing.assert_close(waves @ waves.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("M", "N"), SIZES)
@pytest.mark.parametrize("scope", ["projection", "input", "block"])
def test_files_and_the_balance_loss(M, N, scope, tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.ModuleDict({"q_proj": nn.Linear(N, M), "v_proj": nn.Linear(N, M)})

    settings = config(num_coefficients=16, bandwidth=1.0, router_scope=scope, router_features=6, seed=3)
    adapted, loaded, x = model(), model(), torch.randn(5, N)
    report = inject(adapted, settings)
    assert report.trained["router"] == 4 * 6 * (2 if scope == "projection" else 1)
    nn.init.normal_(adapted["q_proj"].router.weight)
    nn.init.normal_(adapted["v_proj"].experts.coefficients)
    save_adapter(adapted, tmp_path)
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded["v_proj"](x), adapted["v_proj"](x))
    with recording(adapted):
        routing = adapted["q_proj"].router(x)
        loss = adapted["q_proj"].balance_loss()
    torch.testing.assert_close(routing.probabilities.double(), reference(adapted["q_proj"].router, x, 6), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, adapted["q_proj"].router.weight)
    assert gradient.abs().sum() > 0
    other = model()
    inject(other, config(num_coefficients=16, bandwidth=1.0, router_scope=scope, seed=3))
    with pytest.raises(ValueError, match="router_features: 6 against 'all'"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("k", [0, -2, 5, "some"])
def test_impossible_number_is_named(k):
    with pytest.raises(ValueError, match=f"router_features={k!r} must be 'all' or a positive even number"):
        config(router_features=k)


@pytest.mark.parametrize(("N", "largest"), [(7, 6), (8, 6)])
def test_more_than_a_projection_has_is_named(N, largest):
    settings = FourierMoEConfig(targets=["0"], num_coefficients=2, num_experts=1, top_k=1, router_features=8)
    with pytest.raises(ValueError, match=f"0 is 5 x {N}: router_features=8 must be 'all' or at most {largest}"):
        inject(nn.Sequential(nn.Linear(N, 5)), settings)
