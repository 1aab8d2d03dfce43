"""LoRA and its like: what peft itself computes, behind the same targets and files as FourierMoE."""

import copy
from dataclasses import replace

import peft
import pytest
import torch
from support.method_configs import PEFT_LIBRARY as CONFIGS
from support.method_configs import TARGETS
from support.models import Transformer
from torch import nn

from fourier_moe import (
    FourierMoEConfig,
    LoRAConfig,
    PiSSAConfig,
    adapters,
    inject,
    load_adapter,
    save_adapter,
)
from fourier_moe.models.snapshot import unchanged_on_error

PEFT_CONFIGS = [
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    peft.LoraConfig(r=2, lora_alpha=16, lora_dropout=0.3, target_modules=TARGETS),
    peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS),
    peft.LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=TARGETS),
    peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=TARGETS),
    peft.FourierFTConfig(n_frequency=40, scaling=20.0, target_modules=TARGETS),
    peft.PeanutConfig(r=4, depth=1, scaling=2.0, target_modules=TARGETS),
]
IDS = ["lora", "lora_dropout", "rslora", "dora", "pissa", "fourierft", "peanut"]
X = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3


def of_each(configs):
    return pytest.mark.parametrize("config", configs, ids=lambda config: type(config).__name__)


def losses(model, steps=10):
    """Losses of training everything that requires a gradient."""
    model.train()
    model.norm.eval()  # frozen, and so are its statistics
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)  # dropout
    values = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X.to(model.layers[0].norm.weight.dtype)).float(), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def trained(config, seed=0):
    model = Transformer()
    inject(model, config)
    losses(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("config", "peft_config"), list(zip(CONFIGS, PEFT_CONFIGS, strict=True)), ids=IDS)
def test_losses_are_those_of_peft_itself(config, peft_config, dtype):
    ours, theirs = Transformer().to(dtype), Transformer().to(dtype)
    inject(ours, config)
    torch.manual_seed(config.seed or 0)
    theirs = peft.get_peft_model(theirs, copy.deepcopy(peft_config)).base_model.model
    theirs.classifier.requires_grad_(True)
    expected = losses(theirs)
    assert losses(ours) == expected
    assert expected[-1] < 0.97 * expected[0]


def test_fourierft_starts_with_a_random_update():
    model = Transformer().eval()
    inject(model, replace(CONFIGS[5], num_coefficients=200, scaling=500.0))
    assert (model(X) - Transformer().eval()(X)).abs().max() > 1e-3


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("change", "message"),
    [({"r": 2}, "r: 4 against 2"), ({"alpha": 9.0}, "alpha: 8 against 9"), ({"targets": ["q_proj"]}, "targets")],
)
def test_file_of_other_settings_is_refused(change, message, tmp_path):
    save_adapter(trained(CONFIGS[0]), tmp_path)
    model = Transformer()
    inject(model, replace(CONFIGS[0], **change))
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)


def test_file_of_another_variant_is_refused_and_another_seed_or_dropout_is_not(tmp_path):
    save_adapter(trained(CONFIGS[0]), tmp_path)
    model, other = Transformer(), Transformer()
    inject(model, replace(CONFIGS[0], seed=5, dropout=0.5))
    load_adapter(model, tmp_path)
    inject(other, CONFIGS[2])
    with pytest.raises(ValueError, match="LoRAConfig against RsLoRAConfig"):
        load_adapter(other, tmp_path)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["attention.v_proj"], [r"layers\.1\..*_proj"], ["layers.0.attention.out_proj"]]
)
def test_targets_mean_what_they_mean_for_fourier_moe(targets):
    ours, reference = Transformer(), Transformer()
    inject(ours, LoRAConfig(targets=targets, r=2))
    inject(reference, FourierMoEConfig(targets=targets, num_coefficients=32, num_experts=4))
    assert list(adapters(ours)) == list(adapters(reference))
    assert len(adapters(ours)) < 8


def test_fused_attention_is_split_where_a_target_names_a_part():
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    expected = model(X)
    inject(model, LoRAConfig(targets=["q_proj", "linear1"], r=2))
    assert list(adapters(model)) == ["self_attn.q_proj", "linear1"]
    torch.testing.assert_close(model(X), expected)
    adapters(model)["linear1"].layer.lora_B["default"].weight.data.fill_(1.0)
    assert not torch.allclose(model(X), expected)


def test_projection_with_two_parents_gets_one_adapter():
    projection = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": nn.ModuleDict({"proj": projection}), "b": nn.ModuleDict({"proj": projection})})
    report = inject(model, PiSSAConfig(targets=["proj"], r=2))
    assert model["a"]["proj"] is model["b"]["proj"]
    assert report.trained["adapter"] == 2 * 2 * 16


# ---------------------------------------------------------------- refusals


def test_pissa_is_taken_back_with_its_weights():
    model = Transformer()
    expected = model.layers[0].attention.q_proj.weight.detach().clone()
    with pytest.raises(ValueError, match="adapted already"), unchanged_on_error(model):
        inject(model, PiSSAConfig(targets=["q_proj"], r=4)) and inject(model, PiSSAConfig(targets=["q_proj"], r=4))
    assert torch.equal(model.layers[0].attention.q_proj.weight, expected)
