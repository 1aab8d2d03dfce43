"""Updates in weights: the merged projection computes what its adapter computes, and what cannot be merged is refused."""

import pytest
import torch
from support.models import randomize
from torch import nn
from transformers.pytorch_utils import Conv1D

from fourier_moe import (
    DoRAConfig,
    FFTMoEConfig,
    FourierFTConfig,
    FourierMoEConfig,
    LoRAConfig,
    MoLoRAConfig,
    PEANuTConfig,
    PiSSAConfig,
    RsLoRAConfig,
    adapters,
    inject,
)
from fourier_moe.models.projection import with_update
from fourier_moe.serving.merge import merge_adapters

EXACT = [
    LoRAConfig(targets=["0"], r=3, dropout=0.5),
    RsLoRAConfig(targets=["0"], r=3),
    DoRAConfig(targets=["0"], r=3),
    PiSSAConfig(targets=["0"], r=3),
    FourierFTConfig(targets=["0"], num_coefficients=30),
    PEANuTConfig(targets=["0"], r=3),
    FourierMoEConfig(targets=["0"], num_coefficients=24, num_experts=1, top_k=1),
    FourierMoEConfig(targets=["0"], num_coefficients=24, num_experts=1, top_k=1, shared_coefficients=8, permute=True),
]


def network(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 6)).to(dtype)
    inject(model, config)
    randomize(model)
    with torch.no_grad():
        for adapter in adapters(model).values():
            for parameter in (p for group in adapter.parameter_groups().values() for p in group):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("config", EXACT, ids=lambda config: type(config).__name__)
def test_methods_without_routing_merge_exactly_and_the_adapter_stays_as_it_was(config):
    model = network(config)
    x, adapter = torch.randn(7, 10), model[0]
    expected, weight = adapter(x), adapter.base.weight.clone()
    merged = adapter.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged.weight, weight, atol=1e-3)
    assert torch.equal(adapter.base.weight, weight)
    assert torch.equal(adapter(x), expected)


@pytest.mark.parametrize("kind", [nn.Linear, lambda n, m: Conv1D(m, n)], ids=["Linear", "Conv1D"])
def test_an_update_is_added_to_the_weight_and_rounded_once(kind):
    projection, update = kind(10, 12).bfloat16(), torch.randn(12, 10)
    expected = (projection.weight.float() + (update if kind is nn.Linear else update.T)).bfloat16()
    assert torch.equal(with_update(projection, update).weight, expected)


def test_a_projection_that_stands_at_several_places_is_merged_once():
    model = network(EXACT[0])
    tied = nn.ModuleDict({"a": model, "b": nn.Sequential(model[0], nn.ReLU())})
    merge_adapters(tied)
    assert not adapters(tied)
    assert tied["a"][0] is tied["b"][0]


@pytest.mark.parametrize(
    "config",
    [
        FourierMoEConfig(targets=["0"], num_coefficients=32, num_experts=4, bandwidth=1.0),
        MoLoRAConfig(targets=["0"], r=4, num_experts=2),
        FFTMoEConfig(targets=["0"], num_experts=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_methods_that_route_are_refused_by_name(config):
    with pytest.raises(ValueError, match=r"0: \w+Linear cannot be merged into one weight"):
        merge_adapters(network(config))


class Packed(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(12, 10, dtype=torch.int8), r"0: .*Linear with a weight of Tensor, torch\.int8.*quantized"),
        (torch.zeros(12, 10).as_subclass(Packed), r"0: .*Packed, torch\.float32"),
    ],
)
def test_a_weight_that_takes_no_update_is_refused_by_name_and_the_model_stays(weight, message):
    model = network(EXACT[0])
    model[0].base.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=message):
        merge_adapters(model)
    assert len(adapters(model)) == 1
