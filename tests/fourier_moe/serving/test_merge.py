"""Updates in weights: the merged projection computes what its adapter computes, and what cannot be merged is refused."""

import pytest
import torch
from support.models import randomize
from torch import nn
from transformers.pytorch_utils import Conv1D

from fourier_moe import (
    DoRAConfig,
    FourierFTConfig,
    FourierMoEConfig,
    LoRAConfig,
    PEANuTConfig,
    PiSSAConfig,
    RsLoRAConfig,
    StatisticsReader,
    adapters,
    inject,
    recording,
)
from fourier_moe.adapter import Adapter
from fourier_moe.routing.router import Routing
from fourier_moe.serving.merge import check_mergeable, merge_adapters, swap, swapped
from fourier_moe.spectral.layer import FourierMoELinear

MOE = FourierMoEConfig(targets=["0", "2"], num_coefficients=32, num_experts=4, bandwidth=1.0)
EXACT = [
    LoRAConfig(targets=["0"], r=3, dropout=0.5),
    RsLoRAConfig(targets=["0"], r=3),
    DoRAConfig(targets=["0"], r=3),
    PiSSAConfig(targets=["0"], r=3),
    FourierFTConfig(targets=["0"], num_coefficients=30),
    PEANuTConfig(targets=["0"], r=3),
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


@pytest.mark.parametrize("options", [{}, {"coefficients": "imaginary"}, {"conjugate_symmetry": False}], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, lambda n, m: Conv1D(m, n)], ids=["Linear", "Conv1D"])
def test_routing_frozen_to_given_gates(kind, options):
    config = FourierMoEConfig(targets=["x"], num_coefficients=32, num_experts=4, bandwidth=1.0, **options)
    layer = randomize(FourierMoELinear(kind(10, 12), config, "x"))
    gates, x = torch.tensor([0.5, 0.0, 0.3, 0.2]), torch.randn(2, 5, 10)
    merged = layer.merged(gates)
    expected = layer.base(x) + layer.experts(x, Routing.to_all(gates.expand(2, 5, 4)))
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, layer.base(x), atol=1e-2)


def test_a_half_precision_weight_is_rounded_once():
    layer = randomize(FourierMoELinear(nn.Linear(10, 12).bfloat16(), MOE, "x"))
    merged = layer.merged(torch.ones(4) / 4)
    update = sum(layer.experts.delta_weight(expert) for expert in range(4)) / 4
    assert torch.equal(merged.weight, (layer.base.weight.float() + update).bfloat16())


def test_swap_replaces_at_all_places_and_back():
    model = network(MOE)
    tied = nn.ModuleDict({"a": model, "b": nn.Sequential(model[0], nn.ReLU())})
    gates = {name: torch.ones(4) / 4 for name in adapters(tied)}
    merged = merge_adapters(adapters(tied), gates)
    before = str(tied)
    with swapped(tied, merged):
        assert not adapters(tied)
        assert tied["a"][0] is tied["b"][0]
    assert str(tied) == before
    swap(tied, merged)
    assert not adapters(tied)


def test_mean_gates_are_over_all_tokens():
    model = network(MOE)
    x = torch.randn(9, 10)
    with StatisticsReader(model) as reader:
        with recording(model):
            model(x)
        statistics = reader.read()["0"]
    torch.testing.assert_close(statistics.mean_gate.float(), model[0].router(x).dense(4).mean(0))
    assert float(statistics.mean_gate.sum()) == pytest.approx(1)


def test_gates_must_be_given():
    with pytest.raises(ValueError, match="give the gates to freeze"):
        network(MOE)[0].merged()


class Other(Adapter):
    def parameter_groups(self):
        return {}


def test_what_cannot_be_merged_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layer\.0: Other: this method has no merge"):
        check_mergeable({"layer.0": Other(nn.Linear(2, 2))})
    for config in (MOE, EXACT[0]):
        adapter = network(config)[0]
        check_mergeable({"layer.0": adapter})
        adapter.base.weight = nn.Parameter(torch.zeros(12, 10, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"layer\.0: .*Linear with a weight of Tensor, torch\.int8.*quantised"):
            check_mergeable({"layer.0": adapter})
        with pytest.raises(ValueError, match="quantised"):
            adapter.merged(torch.ones(4))


def test_a_tensor_subclass_is_refused():
    class Packed(torch.Tensor):
        pass

    adapter = network(MOE)[0]
    weight = adapter.base.weight.data.as_subclass(Packed)
    adapter.base.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"Packed, torch\.float32"):
        check_mergeable({"x": adapter})
