"""Other mixtures of experts: their files, projections of other kinds, and what they refuse."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.models import Transformer
from support.routed_cases import (
    CONFIGS,
    ONE_EACH,
    X,
    fitting,
    of_each,
    trained,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from fourier_moe import (
    AdaMoLEConfig,
    FFTMoEConfig,
    GOATConfig,
    HydraLoRAConfig,
    MoLoRAConfig,
    adapters,
    inject,
    load_adapter,
    save_adapter,
)
from fourier_moe.files.format import config_of

# ---------------------------------------------------------------- files


@of_each(CONFIGS)
def test_file_gives_a_fresh_model_the_same_outputs(config, tmp_path):
    model = trained(config)
    save_adapter(model, tmp_path)
    fresh = Transformer().eval()
    assert load_adapter(fresh, tmp_path).config == config
    assert torch.equal(fresh(X), model(X))
    assert not torch.equal(fresh(X), Transformer().eval()(X))
    state = load_file(tmp_path / "adapter.safetensors")
    if not config.trains_backbone:
        assert not [key for key in state if ".base." in key]
        assert sum(tensor.numel() for tensor in state.values()) == inject(Transformer(), config).total


@of_each(ONE_EACH)
def test_file_of_other_experts_is_refused(config, tmp_path):
    save_adapter(trained(config), tmp_path)
    model = Transformer()
    inject(model, replace(config, num_experts=2))
    with pytest.raises(ValueError, match="num_experts: 4 against 2"):
        load_adapter(model, tmp_path)


@of_each(ONE_EACH)
def test_file_goes_on_with_another_seed_dropout_and_balance_weight_but_no_other_value(config):
    other = {"seed": 99, "dropout": 0.5, "balance_weight": 0.5}
    other = {name: value for name, value in other.items() if hasattr(config, name)}
    assert config.difference(replace(config, **other)) is None
    for name in ("r", "alpha", "top_k", "max_threshold", "rho"):
        if value := getattr(config, name, None):
            changed = replace(config, **{name: value * 2 if name in ("r", "alpha", "rho") else value + 1})
            assert config.difference(changed).startswith(f"{name}: ")


@of_each(CONFIGS)
def test_config_survives_json(config):
    assert config_of(json.loads(json.dumps(config.to_dict()))) == config


# ---------------------------------------------------------------- other projections


@of_each([config for config in ONE_EACH if isinstance(config, (GOATConfig, FFTMoEConfig, MoLoRAConfig))])
def test_conv1d_of_transformers_is_adapted(config):
    model = nn.Sequential(Conv1D(6, 16))
    expected = model(X)
    (adapted,) = inject(model, replace(fitting(config, 6, 16), targets=["0"], head=[])).projections
    assert (adapted.in_features, adapted.out_features) == (16, 6)
    torch.testing.assert_close(model(X), expected, rtol=0.2, atol=0.1 if isinstance(config, GOATConfig) else 1e-6)


def test_goat_leaves_a_module_alone_whose_weight_is_tied_to_a_target():
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 16), "output": nn.Linear(16, 16, bias=False)})
    model["output"].weight = model["embedding"].weight
    expected = model["embedding"].weight.detach().clone()
    inject(model, GOATConfig(targets=["output"], r=8))
    assert torch.equal(model["embedding"].weight, expected)
    assert not torch.equal(adapters(model)["output"].base.weight, expected)


@of_each(ONE_EACH)
def test_copy_of_an_adapted_model_stands_on_its_own(config):
    model = trained(config)
    expected, twin = model(X), copy.deepcopy(model)
    assert torch.equal(twin(X), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(model(X), expected)


# ---------------------------------------------------------------- refusals


class QuantizedLinear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.in_features = self.out_features = 16
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GOATConfig(targets=["q_proj", "packed"], r=16),
            "^GOATConfig computes with the pretrained weights, and those of 'packed' are",
        ),
        (FFTMoEConfig(targets=["q_proj", "packed"]), "^FFTMoEConfig trains the pretrained weights, and these are quantised"),
        (FFTMoEConfig(targets=["q_proj"]), "^FFTMoEConfig trains the pretrained weights, and these are quantised"),
    ],
)
def test_quantised_weight_is_refused_by_methods_that_start_from_it(config, message):
    model = Transformer()
    model.packed = QuantizedLinear(torch.ones(16, 16, dtype=torch.int8))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        inject(model, config)
    assert "\n" not in str(error.value)
    assert not adapters(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_other_mixtures_take_a_quantised_projection_as_it_is():
    model = nn.ModuleDict({"packed": QuantizedLinear(torch.ones(16, 16, dtype=torch.int8))})
    for config in (MoLoRAConfig, AdaMoLEConfig, HydraLoRAConfig):
        assert inject(copy.deepcopy(model), config(targets=["packed"])).total > 0


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (MoLoRAConfig, {"num_experts": 0}, "MoLoRAConfig: num_experts=0 must be at least 1"),
        (MoLoRAConfig, {"r": 30}, "r=30 must be a positive multiple of num_experts = 8; nearest valid: 24 or 32$"),
        (MoLoRAConfig, {"r": 4}, "r=4 .* nearest valid: 8$"),
        (MoLoRAConfig, {"r": 0}, "r=0 .* nearest valid: 8$"),
        (MoLoRAConfig, {"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        (MoLoRAConfig, {"top_k": 0}, "top_k=0 must be between 1"),
        (MoLoRAConfig, {"alpha": 0.0}, "alpha=0.0 must be a positive number"),
        (MoLoRAConfig, {"alpha": None}, "alpha=None must be a positive number"),
        (MoLoRAConfig, {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        (MoLoRAConfig, {"balance_weight": -1.0}, "balance_weight=-1.0 must be 0 or more"),
        (AdaMoLEConfig, {"max_threshold": 0.0}, "max_threshold=0.0 must be above 0 and at most 1"),
        (AdaMoLEConfig, {"max_threshold": 1.1}, "max_threshold=1.1 must be above 0 and at most 1"),
        (HydraLoRAConfig, {"r": 0}, "r=0 must be at least 1"),
        (GOATConfig, {"rho": 0.0}, "rho=0.0 must be a positive number"),
        (GOATConfig, {"eta": 1.0}, "alpha=16.0 has no effect beside eta=1.0; set one of them to null"),
        (GOATConfig, {"alpha": None}, "alpha=None must be a positive number"),
        (GOATConfig, {"alpha": None, "eta": -1.0}, "eta=-1.0 must be a positive number"),
        (FFTMoEConfig, {"top_k": 1}, "top_k=1 must be between 2 and num_experts=8"),
        (FFTMoEConfig, {"balance_weight": float("nan")}, "balance_weight=nan must be 0 or more"),
        (FFTMoEConfig, {"targets": []}, "targets is empty"),
    ],
)
def test_impossible_value_is_named(config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(**{"targets": ["q_proj"], **options})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MoLoRAConfig(targets=["q_proj", "small"], r=40), "^small is 4 x 16: r=40 must be at most 32$"),
        (HydraLoRAConfig(targets=["q_proj", "small"], r=5), "^small is 4 x 16: r=5 must be at most 4$"),
        (GOATConfig(targets=["q_proj", "small"], r=8), "^small is 4 x 16: r=8 must be at most 0$"),
        (GOATConfig(targets=["q_proj", "small"], num_experts=4, r=8), "^small is 4 x 16: r=8 must be at most 4$"),
    ],
)
def test_rank_that_a_projection_has_no_room_for_is_one_message_before_anything_changes(config, message):
    model = Transformer()
    model.small = nn.Linear(16, 4)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        inject(model, config)
    assert not adapters(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
