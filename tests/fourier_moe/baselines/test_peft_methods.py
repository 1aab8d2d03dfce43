"""LoRA and its like: what peft itself computes, behind the same files, reports and refusals as FourierMoE."""

import copy
import json
import re
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.method_configs import PEFT_LIBRARY as CONFIGS
from support.method_configs import TARGETS
from support.models import Transformer
from torch import nn
from transformers.pytorch_utils import Conv1D

import datamodules.images.data_module
from datamodules.images.transforms import eval_transform
from fourier_moe import (
    DoRAConfig,
    FourierFTConfig,
    FourierMoEConfig,
    LoRAConfig,
    PEANuTConfig,
    PiSSAConfig,
    adapters,
    inject,
    load_adapter,
    save_adapter,
)
from fourier_moe.files.format import config_of
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
COUNTS = {"lora": 128, "lora_dropout": 64, "rslora": 128, "dora": 144, "pissa": 128, "fourierft": 40, "peanut": 160}
ONE_EACH = [config for config, name in zip(CONFIGS, IDS, strict=True) if name != "lora_dropout"]
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


@pytest.mark.parametrize(("config", "name"), list(zip(CONFIGS, IDS, strict=True)), ids=IDS)
def test_report_counts_adapter_and_head_and_nothing_else_is_trained(config, name):
    model = Transformer()
    report = inject(model, config)
    assert report.trained == {"experts": 0, "router": 0, "head": 51, "backbone": 0, "adapter": 4 * COUNTS[name]}
    assert report.frozen == sum(p.numel() for p in Transformer().parameters()) - 51
    assert re.search(r"q_proj +2 +16 x 16", str(report))
    groups = [p for adapter in adapters(model).values() for p in adapter.parameter_groups()["adapter"]]
    of_head = list(model.classifier.parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in [*groups, *of_head]}
    assert all(p.dtype == torch.float32 for p in groups)


@of_each(CONFIGS)
def test_training_moves_every_adapter_tensor_and_no_frozen_one(config):
    model = Transformer()
    inject(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@of_each([config for config in ONE_EACH if not isinstance(config, FourierFTConfig)])
def test_adapted_model_starts_as_the_pretrained_one(config):
    model = Transformer().eval()
    inject(model, config)
    torch.testing.assert_close(model(X), Transformer().eval()(X), rtol=1e-5, atol=1e-6)


def test_fourierft_starts_with_a_random_update():
    model = Transformer().eval()
    inject(model, replace(CONFIGS[5], num_coefficients=200, scaling=500.0))
    assert (model(X) - Transformer().eval()(X)).abs().max() > 1e-3


def test_adapter_is_float32_over_a_bfloat16_model():
    model = Transformer().bfloat16()
    inject(model, CONFIGS[0])
    (adapter, *_) = adapters(model).values()
    assert {p.dtype for p in adapter.parameter_groups()["adapter"]} == {torch.float32}
    assert adapter.base.weight.dtype == torch.bfloat16
    assert adapter(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ---------------------------------------------------------------- files


@of_each(CONFIGS)
def test_file_gives_a_fresh_model_the_same_outputs_and_holds_no_frozen_weight(config, tmp_path):
    model = trained(config)
    save_adapter(model, tmp_path)
    state = load_file(tmp_path / "adapter.safetensors")
    counts = {"head": 51, "adapter": sum(p.numel() for a in adapters(model).values() for p in a.parameter_groups()["adapter"])}
    assert sum(tensor.numel() for tensor in state.values()) == sum(counts.values())
    stored = json.loads((tmp_path / "adapter.json").read_text())["trained_parameters"]
    assert {kind: count for kind, count in stored.items() if count} == counts

    fresh = Transformer().eval()
    assert load_adapter(fresh, tmp_path).config == config
    assert torch.equal(fresh(X), model(X))
    assert not torch.equal(fresh(X), Transformer().eval()(X))


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


@of_each(ONE_EACH)
def test_file_that_does_not_fit_leaves_the_model_as_it_was(config, tmp_path):
    save_adapter(trained(config), tmp_path)
    model = Transformer(seed=1)  # other pretrained weights
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="whose weights are others"):
        load_adapter(model, tmp_path)
    assert not adapters(model)
    assert dict.fromkeys(expected, True) == {n: torch.equal(v, expected[n]) for n, v in model.state_dict().items()}


@of_each(ONE_EACH)
def test_config_survives_json(config):
    assert config_of(json.loads(json.dumps(config.to_dict()))) == config


# ---------------------------------------------------------------- start


@of_each([config for config in ONE_EACH if not isinstance(config, PiSSAConfig)])
def test_start_depends_on_the_seed_and_on_nothing_drawn_before(config):
    def start(seed):
        model = Transformer()
        inject(model, replace(config, seed=seed))
        return torch.cat([p.flatten() for adapter in adapters(model).values() for p in adapter.parameter_groups()["adapter"]])

    torch.manual_seed(11)
    first, state = start(4), torch.get_rng_state()
    torch.manual_seed(12)
    assert torch.equal(start(4), first)
    assert not torch.equal(start(5), first)
    assert torch.equal(start(None), start(0))
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), state)  # and injection draws nothing that others would miss


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


def test_pissa_leaves_a_module_alone_whose_weight_is_tied_to_a_target():
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 16), "output": nn.Linear(16, 16, bias=False)})
    model["output"].weight = model["embedding"].weight
    expected = model["embedding"].weight.detach().clone()
    inject(model, PiSSAConfig(targets=["output"], r=4))
    assert torch.equal(model["embedding"].weight, expected)
    assert not torch.equal(adapters(model)["output"].base.weight, expected)


@pytest.mark.filterwarnings("error")
@of_each([LoRAConfig(targets=["0"], r=2), DoRAConfig(targets=["0"], r=2), PiSSAConfig(targets=["0"], r=2)])
def test_conv1d_of_transformers_is_adapted(config):
    model = nn.Sequential(Conv1D(6, 16))
    expected = model(X)
    (projection,) = inject(model, config).projections
    assert (projection.in_features, projection.out_features) == (16, 6)
    torch.testing.assert_close(model(X), expected)


@of_each(ONE_EACH)
def test_copy_of_an_adapted_model_stands_on_its_own(config):
    model = trained(config)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    expected = model(X)
    for adapter in adapters(twin).values():
        adapter.base.weight.data.zero_()
    assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (LoRAConfig, {"r": 0}, "r=0 must be at least 1"),
        (LoRAConfig, {"alpha": 0.0}, "alpha=0.0 must be a positive number"),
        (DoRAConfig, {"alpha": float("nan")}, "alpha=nan must be a positive number"),
        (LoRAConfig, {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        (FourierFTConfig, {"num_coefficients": 0}, "num_coefficients=0 must be at least 1"),
        (FourierFTConfig, {"scaling": float("inf")}, "scaling=inf must be a positive number"),
        (PEANuTConfig, {"r": 0}, "r=0 must be at least 1"),
        (PEANuTConfig, {"depth": -1}, "depth=-1 must be 0 or more"),
        (PEANuTConfig, {"scaling": 0.0}, "scaling=0.0 must be a positive number"),
        (LoRAConfig, {"targets": []}, "targets is empty"),
    ],
)
def test_impossible_value_is_named(config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(**{"targets": TARGETS, **options})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(targets=["q_proj", "quary"]), "targets entry 'quary' matches no module"),
        (LoRAConfig(targets=["q_proj", "small"], r=5), "^small is 4 x 16: r=5 must be at most 4$"),
        (PiSSAConfig(targets=["q_proj", "small"], r=5), "^small is 4 x 16: r=5 must be at most 4$"),
        (PEANuTConfig(targets=["q_proj", "small"], r=5), "^small is 4 x 16: r=5 must be at most 4$"),
        (
            FourierFTConfig(targets=["q_proj", "small"], num_coefficients=65),
            "^small is 4 x 16: num_coefficients=65 must be at most 64$",
        ),
        (
            PEANuTConfig(targets=["q_proj", "turned"], r=4),
            "^turned: PEANuTConfig cannot adapt a Conv1D: ",
        ),
        (PiSSAConfig(targets=["q_proj", "doubled"], r=4), "^doubled: PiSSAConfig cannot adapt a Linear: .*float32"),
        (LoRAConfig(targets=["q_proj", "norm"]), "targets match 'layers.0.norm': LayerNorm is no linear projection"),
    ],
)
def test_adapter_that_cannot_fit_is_one_message_and_leaves_the_model_as_it_was(config, message):
    model = Transformer()
    model.small, model.turned, model.doubled = nn.Linear(16, 4), Conv1D(16, 16), nn.Linear(16, 16).double()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        inject(model, config)
    assert "\n" not in str(error.value)
    assert not adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_pissa_is_taken_back_with_its_weights():
    model = Transformer()
    expected = model.layers[0].attention.q_proj.weight.detach().clone()
    with pytest.raises(ValueError, match="adapted already"), unchanged_on_error(model):
        inject(model, PiSSAConfig(targets=["q_proj"], r=4)) and inject(model, PiSSAConfig(targets=["q_proj"], r=4))
    assert torch.equal(model.layers[0].attention.q_proj.weight, expected)


# ---------------------------------------------------------------- in the trainer


def test_pissa_resumes_to_the_weights_of_an_uninterrupted_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(datamodules.images.data_module, "train_transform", eval_transform)
    words = ("--config", "configs/demo.yaml", "--config", "configs/adapters/pissa.yaml", "--trainer.limit_train_batches", "3")
    words += ("--trainer.limit_val_batches", "1", "--model.optimization.schedule", "constant")
    whole = run("fit", *words, "--trainer.max_epochs", "2")
    assert {group["name"] for group in whole.trainer.optimizers[0].param_groups} == {"adapter", "head"}
    run("fit", *words, "--trainer.max_epochs", "1", "--trainer.logger.init_args.name", "part")
    last = tmp_path / "part/version_0/checkpoints/last.ckpt"
    resumed = run("fit", *words, "--trainer.max_epochs", "2", "--ckpt_path", str(last))
    expected = whole.model.model.state_dict()
    assert resumed.trainer.global_step == 6
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.model.state_dict().items())


def test_adapter_parameters_without_a_group_are_refused_before_training(run):
    lora = ("--config", "configs/demo.yaml", "--config", "configs/adapters/lora.yaml")
    with pytest.raises(ValueError, match=r"optimization\.adapter is missing, but LoRAConfig trains adapter parameters"):
        run("fit", *lora, "--model.optimization.adapter", "null")
    with pytest.raises(ValueError, match=r"optimization\.experts is given, but LoRAConfig trains no experts"):
        run("fit", *lora, "--model.optimization.experts.lr", "0.1")


def test_fourierft_overlay_takes_the_coefficients_and_targets_of_the_config_it_lies_on(run):
    words = ("--config", "configs/demo.yaml", "--config", "configs/adapters/fourierft.yaml", "--trainer.max_steps", "1")
    adapter = run("fit", *words, "--trainer.limit_val_batches", "0", "--seed_everything", "7").model.adapter
    assert adapter == FourierFTConfig(targets=["q_proj", "v_proj"], num_coefficients=512, scaling=150, seed=7)
