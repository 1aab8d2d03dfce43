"""Centered and scaled inputs: measured without padding, exact in every method that takes them, in files, merges, the bank."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.method_configs import LORA_RELATIVES, PEFT_LIBRARY
from support.models import Transformer, config, randomize, randomize_trained, tokens
from support.one_projection import SIZES
from support.routed_cases import CONFIGS as ROUTED
from torch import nn
from transformers.pytorch_utils import Conv1D

from fourier_moe import (
    AdapterBank,
    FourierMoEConfig,
    FourierMoELinear,
    LoRAConfig,
    adapters,
    inject,
    load_adapter,
    measure_inputs,
    save_adapter,
)
from fourier_moe.models.input_moments import MIN_STD, unmeasured
from fourier_moe.serving.lora_export import export_loras
from fourier_moe.serving.merge import merge_adapters

METHODS = [config(head=["classifier"], seed=3, bandwidth=1.0), *PEFT_LIBRARY, *LORA_RELATIVES, *ROUTED]
TAKING = [replace(method, normalize_input="moments") for method in METHODS if method.normalizes_input]
REFUSING = {type(method): method for method in METHODS if not method.normalizes_input}
NORMALIZED = config(head=["classifier"], normalize_input="moments", router_features=6)
LORA = LoRAConfig(targets=["q_proj", "v_proj"], head=["classifier"], r=2, normalize_input="moments")


def skewed(*shape, seed=0):
    """Features of other means and sizes; the last one is constant."""
    x = tokens(*shape, seed=seed) * torch.linspace(0.1, 3.0, shape[-1]) + torch.linspace(-2.0, 5.0, shape[-1])
    x[..., -1] = 4.0
    return x


def moments(x):
    """z of tokens (T, N) by the definition, in float64."""
    x = x.double()
    std = x.std(0, correction=0)
    std = std.clamp(min=MIN_STD * std.square().mean().sqrt())
    z = (x - x.mean(0)) / std
    return (x.square().mean() / z.square().mean()).sqrt() * z


def trained(settings, dtype=torch.float32):
    """A measured model whose trained parameters are random."""
    model = Transformer().to(dtype)
    inject(model, settings)
    measure_inputs(model, [skewed(4, 6, 16).to(dtype)])
    return randomize_trained(model)


# ---------------------------------------------------------------- the definition


@pytest.mark.parametrize("split", [1, 3])
def test_moments_are_those_of_all_real_tokens_whatever_the_batches(split):
    model, x = nn.Sequential(nn.Linear(11, 7)), skewed(6, 5, 11)
    inject(model, replace(LORA, targets=["0"], head=[]))
    mask = torch.arange(5) < torch.tensor([5, 2, 0, 4, 1, 3])[:, None]
    x[~mask] = 1e6
    batches = list(zip(x.chunk(split), mask.chunk(split), strict=True))
    measure_inputs(model, batches, lambda batch: model(batch[0]), lambda batch: batch[1])
    z = model[0].reads(x[mask].double())
    torch.testing.assert_close(z, moments(x[mask]), rtol=1e-5, atol=1e-5)
    assert z[:, -1].abs().max() < 1e-4  # the constant feature
    assert float(z.square().mean()) == pytest.approx(float(x[mask].double().square().mean()), rel=1e-6)


@pytest.mark.parametrize("method", TAKING, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "Conv1D"])
def test_the_update_reads_z_and_the_projection_x(method, kind):
    base = Conv1D(20, 12) if kind == "Conv1D" else nn.Linear(12, 20)
    x = skewed(3, 4, 12)
    base, x = (base.bfloat16(), x.bfloat16()) if kind == "bfloat16" else (base, x)
    with_moments, without = nn.Sequential(base), nn.Sequential(copy.deepcopy(base))
    inject(with_moments, replace(method, targets=["0"], head=[]))
    inject(without, replace(method, targets=["0"], head=[], normalize_input="none"))
    measure_inputs(with_moments, [x])
    generator = torch.Generator().manual_seed(3)
    for one, other in zip(with_moments.parameters(), without.parameters(), strict=True):
        if one.requires_grad:
            other.data = one.data = torch.randn(one.shape, generator=generator) / 4
    for model in (with_moments.eval(), without.eval()):
        model.to(torch.float64) if kind != "bfloat16" else None
    x = x if kind == "bfloat16" else x.double()
    z = with_moments[0].reads(x)
    assert z.dtype == x.dtype
    expected = without(z) - without[0].base(z) + base.to(x.dtype)(x)
    assert (expected - base(x)).abs().max() > 0.1
    tolerance = 0.3 if kind == "bfloat16" else 1e-9
    torch.testing.assert_close(with_moments(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("M", "N"), [*SIZES, (7, 11), (1, 9)])
def test_product_and_gradients_are_those_of_the_dense_definition(M, N):
    model, x = nn.Sequential(nn.Linear(N, M)), skewed(5, N)
    settings = config(targets=["0"], num_coefficients=8, num_experts=2, bandwidth=2.0, normalize_input="moments")
    inject(model, settings)
    measure_inputs(model, [x])
    layer = randomize(model.double())[0]
    x = x.double().requires_grad_()
    z = (x - layer.input_moments.mean) * layer.input_moments.scale
    gates = layer.router(z).dense(2)
    updates = torch.stack([layer.experts.delta_weight(expert) for expert in range(2)])
    y = layer.base(x) + torch.einsum("te,emn,tn->tm", gates, updates, z)
    weight = torch.randn(5, M, dtype=torch.float64)
    inputs = [x, layer.experts.coefficients, layer.router.weight]
    found, expected = (torch.autograd.grad((weight * one).sum(), inputs) for one in (layer(x), y))
    torch.testing.assert_close(layer(x), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: layer(x), x, atol=1e-4)


# ---------------------------------------------------------------- measuring


def test_measuring_leaves_the_model_as_it_was_and_known_moments_stay():
    model, x = trained(NORMALIZED), skewed(2, 6, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.norm.eval()
    measure_inputs(model, [x])
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_measured_are_the_pretrained_models_own_activations():
    """Also of a second block, and of a method whose update begins at random."""
    (fourier_ft,) = (method for method in TAKING if type(method).__name__ == "FourierFTConfig")
    found = [Transformer(), Transformer()]
    for model, settings in zip(found, (NORMALIZED, fourier_ft), strict=True):
        inject(model, settings)
        measure_inputs(model, [{"x": skewed(4, 6, 16)}])
    plain, seen = Transformer(), []
    plain.layers[1].attention.q_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    plain(skewed(4, 6, 16))
    for model in found:
        torch.testing.assert_close(
            adapters(model)["layers.1.attention.q_proj"].reads(seen[0]).double().flatten(0, 1),
            moments(seen[0].flatten(0, 1).detach()),
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("settings", [NORMALIZED, LORA], ids=["spectral", "lora"])
def test_unmeasured_moments_refuse_to_run_from_a_file_too(settings, tmp_path):
    model = Transformer().eval()
    inject(model, settings)
    save_adapter(model, tmp_path)
    loaded = Transformer().eval()
    load_adapter(loaded, tmp_path)
    for one in (model, loaded):
        assert list(unmeasured(one)) == list(adapters(one))
        with pytest.raises(ValueError, match=r"normalize_input='moments': .* have not been measured; train with"):
            one(skewed(2, 6, 16))


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (skewed(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool), "gave it 0 tokens without padding"),
        (skewed(2, 6, 16), torch.ones(6, 2, dtype=torch.bool), r"token_mask has shape \(6, 2\)"),
        (skewed(2, 6, 16) * torch.nan, None, "layers.0.attention.q_proj hold NaN or infinity"),
        (torch.zeros(2, 6, 16), None, "are the same for all tokens"),
        (None, None, "gave it 0 tokens without padding"),
    ],
    ids=["all padding", "other mask", "nan", "constant", "no batch"],
)
def test_inputs_that_cannot_be_measured_are_named_and_nothing_is_set(x, mask, message):
    model = Transformer()
    inject(model, NORMALIZED)
    with pytest.raises(ValueError, match=message):
        measure_inputs(model, [] if x is None else [x], token_mask=lambda batch: mask)
    assert list(unmeasured(model)) == list(adapters(model))


@pytest.mark.parametrize("method", REFUSING.values(), ids=lambda method: type(method).__name__)
def test_other_methods_refuse_by_name(method):
    with pytest.raises(ValueError, match=f"{type(method).__name__}: normalize_input='moments' must be 'none' for this method"):
        replace(method, normalize_input="moments")
    with pytest.raises(ValueError, match="normalize_input='mean' must be one of none, moments"):
        replace(method, normalize_input="mean")


# ---------------------------------------------------------------- files, merges, the bank


@pytest.mark.parametrize("method", TAKING, ids=lambda method: type(method).__name__)
def test_files_round_trip_to_the_bit_and_merge_where_the_method_merges(method, tmp_path):
    model, loaded, x = trained(method), Transformer().eval(), skewed(2, 6, 16, seed=5)
    save_adapter(model, tmp_path)
    load_adapter(loaded, tmp_path)
    expected = model(x)
    assert torch.equal(loaded(x), expected)
    if hasattr(adapters(loaded)["layers.0.attention.q_proj"], "layer"):  # those of peft
        merge_adapters(loaded)
        assert not adapters(loaded)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    other = Transformer()
    inject(other, replace(method, normalize_input="none"))
    with pytest.raises(ValueError, match="normalize_input: 'moments' against 'none'"):
        load_adapter(other, tmp_path)


def test_an_empty_batch_and_an_expert_without_tokens():
    model = trained(NORMALIZED)
    layer = adapters(model)["layers.0.attention.q_proj"]
    assert layer(torch.zeros(0, 16)).shape == (0, 16)
    assert layer(skewed(1, 16)).isfinite().all()  # two of four experts are idle


def test_a_projection_without_bias_does_not_merge():
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    inject(model, replace(LORA, targets=["0"], head=[]))
    measure_inputs(model, [skewed(9, 16)])
    with pytest.raises(ValueError, match="0: the frozen projection has no bias"):
        merge_adapters(model)


def test_the_bank_gives_each_example_what_its_adapter_gives_alone(tmp_path):
    settings = {"moe": NORMALIZED, "lora": LORA, "plain": replace(LORA, normalize_input="none")}
    x, alone = skewed(3, 6, 16, seed=5), {}
    bank = AdapterBank(Transformer())
    for name, one in settings.items():
        model = trained(one)
        alone[name] = model(x)
        save_adapter(model, tmp_path / name)
        bank.load(name, tmp_path / name)
    with bank.per_example(["moe", "lora", "plain"]):
        found = bank.model(x)
    for index, name in enumerate(settings):
        torch.testing.assert_close(found[index], alone[name][index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", ["all", 4])
@pytest.mark.parametrize("kind", [nn.Linear, lambda N, M: Conv1D(M, N)], ids=["Linear", "Conv1D"])
def test_exported_experts_and_router_are_the_adapter(kind, features, tmp_path):
    torch.manual_seed(0)
    base, x = nn.ModuleDict({"proj": kind(12, 20)}), skewed(5, 12)
    model = copy.deepcopy(base)
    settings = {"num_coefficients": 32, "num_experts": 4, "bandwidth": 2.0, "router_features": features}
    inject(model, FourierMoEConfig(targets=["proj"], normalize_input="moments", **settings))
    measure_inputs(model, [x], lambda x: model["proj"](x))
    layer = randomize(model)["proj"]
    assert isinstance(layer, FourierMoELinear)
    export_loras(model, tmp_path)
    router, description = load_file(tmp_path / "router.safetensors"), json.loads((tmp_path / "router.json").read_text())
    p = torch.softmax(x @ router["proj"].T + router["proj.bias"], -1)
    gates, chosen = p.topk(description["top_k"], -1)
    gates = torch.zeros_like(p).scatter(-1, chosen, gates / gates.sum(-1, keepdim=True))
    plain = base["proj"](x)
    y = plain.clone()
    assert (description["router"], len(description["experts"]), description["shared"]) == ("router.safetensors", 4, None)
    for expert, folder in enumerate(description["experts"]):
        one = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        y = y + gates[:, [expert]] * (one.base_model.model["proj"](x) - plain)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)
    assert (y - plain).abs().max() > 0.1
