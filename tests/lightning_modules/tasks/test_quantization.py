"""Quantized bases: what is quantized, and that adapters over them learn as over plain layers of the same numbers."""

import copy
import logging
from functools import cache

import bitsandbytes as bnb
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from datamodules.shared.data_module import BaseDataModule
from fourier_moe import (
    DoRAConfig,
    FourierFTConfig,
    FourierMoEConfig,
    FullFineTuning,
    LoRAConfig,
    PEANuTConfig,
    PiSSAConfig,
    adapter_state_dict,
    adapters,
    inject,
    is_quantized,
    load_adapter,
    save_adapter,
)
from fourier_moe.models.quantization import num_scalars
from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup
from lightning_modules.tasks import CausalLanguageModel, SequenceClassification
from lightning_modules.tasks.backbones.hugging_face import load_causal_language_model, load_sequence_classifier

KINDS = ["int8", "nf4"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
LLAMA = FourierMoEConfig(targets=["q_proj", "down_proj"], num_coefficients=64, num_experts=4, scaling=20)
BERT = FourierMoEConfig(targets=["query", "output.dense"], num_coefficients=64, num_experts=4, scaling=20, head=["classifier"])
IDS = torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(0))


@cache
def directory(kind, root):
    """A pretrained model's; weights far from zero, so that what is quantized matters."""
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
        "bert": lambda: BertForSequenceClassification(
            BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        ),
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=3)),
    }[kind]()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(root / kind)
    return str(root / kind)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def loaded(root, kind, quantization=None, dtype="float32"):
    if kind == "llama":
        return load_causal_language_model(directory(kind, root), dtype=dtype, quantization=quantization)
    return load_sequence_classifier(directory(kind, root), 3, dtype=dtype, quantization=quantization)


def dequantized(model):
    """The same numbers in plain layers."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.float() * module.weight.SCB[:, None] / 127
        elif isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
        else:
            continue
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight = nn.Parameter(weight.to(torch.float32))
        plain.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    return model


def adapted(model, config):
    """With adapters that do something, the same for all models of a shape."""
    inject(model, config)
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters(model).values():
        for group in adapter.parameter_groups().values():
            for parameter in group:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model):
    model.train().zero_grad()
    model(input_ids=IDS).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- what is quantized


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize(("kind", "outside"), [("llama", "lm_head"), ("bert", "classifier"), ("roberta", "classifier.dense")])
def test_linear_layers_of_the_body_are_quantized_and_head_or_output_layer_are_not(root, kind, outside, quantization):
    model = loaded(root, kind, quantization, dtype="bfloat16")
    layer = {"int8": bnb.nn.Linear8bitLt, "nf4": bnb.nn.Linear4bit}[quantization]
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kinds[outside] is nn.Linear
    assert {kinds[name] for name in kinds if name.startswith(f"{model.base_model_prefix}.")} == {layer}
    assert model.get_submodule(outside).weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.training
    assert is_quantized(model)
    assert not is_quantized(loaded(root, kind))


@pytest.mark.parametrize(("quantization", "most", "least"), [("int8", 0.01, 0.001), ("nf4", 0.12, 0.05)])
def test_weights_are_those_of_the_files_up_to_rounding(root, quantization, most, least):
    plain, rounded = loaded(root, "llama"), dequantized(loaded(root, "llama", quantization))
    for name, weight in plain.named_parameters():
        error = (rounded.get_parameter(name) - weight).norm() / weight.norm()
        assert (least < error < most) if "_proj" in name else error == 0, name


def test_nf4_leaves_layers_alone_whose_rows_end_within_a_block_of_64(tmp_path):
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 48})).save_pretrained(tmp_path)
    for quantization, layer in (("nf4", nn.Linear), ("int8", bnb.nn.Linear8bitLt)):
        mlp = load_causal_language_model(str(tmp_path), quantization=quantization).model.layers[0].mlp
        assert type(mlp.down_proj) is layer  # 64 x 48
        assert type(mlp.up_proj) is not nn.Linear  # 48 x 64


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize(("kind", "config"), [("llama", LLAMA), ("bert", BERT)])
def test_report_counts_the_numbers_that_the_weights_stand_for(root, kind, config, quantization):
    assert str(inject(loaded(root, kind, quantization), config)) == str(inject(loaded(root, kind), config))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bits_are_known_and_counted_whatever_they_are_stored_in(storage):
    layer = bnb.nn.Linear4bit(64, 3, bias=False, quant_type="nf4", quant_storage=storage).to("cpu")
    assert layer.weight.dtype == storage
    assert is_quantized(layer)
    assert num_scalars(layer.weight) == 3 * 64


# ---------------------------------------------------------------- adapters over it


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("kind", "config"), [("llama", LLAMA), ("bert", BERT)])
def test_outputs_and_gradients_are_those_over_plain_layers_of_the_same_numbers(root, kind, config, checkpointing, quantization):
    model = loaded(root, kind, quantization)
    plain = adapted(dequantized(model), config)
    model = adapted(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad():
        model.eval()(input_ids=IDS)  # bitsandbytes packs 4-bit weights for evaluation where it may, and these have no gradient
    torch.testing.assert_close(model.train()(input_ids=IDS).logits, plain.train()(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    expected, found = gradients(plain), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("config", [LLAMA, LoRAConfig(targets=["q_proj", "down_proj"], r=4)], ids=["fourier_moe", "lora"])
def test_adapter_only_adds_to_what_the_quantized_projection_gives(root, quantization, config):
    model = adapted(loaded(root, "llama", quantization, dtype="bfloat16"), config)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    adapter = adapters(model)["model.layers.1.self_attn.q_proj"]
    base = adapter.base(x)
    assert base.dtype == torch.bfloat16
    if isinstance(config, LoRAConfig):
        a, b = (layer["default"].weight for layer in (adapter.layer.lora_A, adapter.layer.lora_B))
        expected = base + 4 * x.float() @ a.T @ b.T
    else:
        expected = base + adapter.experts(x, adapter.router(x)).to(torch.bfloat16)
    assert torch.equal(adapter(x), expected.to(torch.bfloat16))


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize(
    "config", [DoRAConfig(targets=["q_proj"], r=4), FourierFTConfig(targets=["q_proj"])], ids=["dora", "fft"]
)
def test_other_methods_give_what_they_give_over_plain_layers(root, config, quantization):
    model = loaded(root, "llama", quantization)
    plain = adapted(dequantized(model), config)
    expected, found = gradients(plain), gradients(adapted(model, config))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()), msg=name)


# ---------------------------------------------------------------- runs and files


class Sentences(BaseDataModule):
    class_names = ("a", "b", "c")

    def train_dataloader(self):
        labels = torch.tensor([0, 1, 2])
        batch = {"id": ["x", "y", "z"], "input_ids": IDS, "attention_mask": torch.ones_like(IDS), "label": labels}
        return DataLoader([batch] * 12, batch_size=None)


def numbers_of_base(model):
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value.clone() for name, value in model.state_dict().items() if name not in trained}


@pytest.mark.parametrize("quantization", KINDS)
def test_training_leaves_the_base_as_it_was_and_checkpoint_and_file_hold_the_adapter_only(root, tmp_path, quantization):
    task = SequenceClassification(directory("bert", root), dtype="bfloat16", quantization=quantization)
    rates = {name: ParameterGroup(lr=lr) for name, lr in (("experts", 0.05), ("router", 1e-3), ("head", 1e-2))}
    config = FourierMoEConfig(targets=BERT.targets, num_coefficients=64, num_experts=4, scaling=20)
    module = AdaptationModule(task, config, Optimization(**rates))
    losses, before = [], {}

    class Watch(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            before.update(numbers_of_base(pl_module.model))

        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            losses.append(float(outputs["loss"]))

    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", precision="bf16-mixed", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Watch(), ModelCheckpoint(tmp_path, save_last=True)],
    )  # fmt: skip
    trainer.fit(module, Sentences())
    assert losses[-1] < 0.8 * losses[0]
    after = numbers_of_base(module.model)
    assert {name: torch.equal(value, after[name]) for name, value in before.items()} == dict.fromkeys(after, True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} <= {torch.float32, torch.int64, torch.int32}
    assert not any(".base." in name or "embeddings" in name for name in state)

    save_adapter(module.model, tmp_path / "adapter")
    for other in (None, quantization):
        fresh = SequenceClassification(directory("bert", root), dtype="bfloat16", quantization=other)
        load_adapter(fresh.build(3), tmp_path / "adapter")
        mine, theirs = adapter_state_dict(module.model), adapter_state_dict(fresh.model)
        assert {name: torch.equal(value, theirs[name]) for name, value in mine.items()} == dict.fromkeys(theirs, True)
        batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        difference = fresh.eval()(batch) - task.eval()(batch)
        assert (difference.abs().max() > 0) == (other is None)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PiSSAConfig(targets=["q_proj"], r=2),
            "^PiSSAConfig computes with the pretrained weights, and those of 'model.layers.0.",
        ),
        (PEANuTConfig(targets=["q_proj"], r=2), "^PEANuTConfig computes with the pretrained weights"),
        (FullFineTuning(), "^FullFineTuning trains the pretrained weights, and these are quantized"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_method_that_needs_the_weights_is_refused_and_leaves_the_model_as_it_was(root, config, message, quantization):
    model = loaded(root, "llama", quantization)
    with pytest.raises(ValueError, match=message):
        inject(model, config)
    assert not adapters(model)
    inject(model, LLAMA)


def test_methods_that_need_the_weights_take_a_layer_that_is_not_quantized(root):
    inject(loaded(root, "llama", "nf4"), PiSSAConfig(targets=["lm_head"], r=2))


@pytest.mark.parametrize("task", [CausalLanguageModel, SequenceClassification])
def test_unknown_quantization_and_missing_package_are_named_before_anything_is_loaded(task, monkeypatch):
    with pytest.raises(ValueError, match="quantization='int4' must be one of int8, nf4, or null"):
        task("no/such-model", quantization="int4")
    monkeypatch.setattr("lightning_modules.tasks.backbones.quantization.is_bitsandbytes_available", lambda _: False)
    with pytest.raises(
        ValueError, match=r"^quantization='nf4' needs bitsandbytes 0.50 or newer: pip install -e '.\[quantized\]'$"
    ):
        task("no/such-model", quantization="nf4")
    task("no/such-model")


# ---------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.parametrize(("config", "quantization"), [("commonsense_llama2_7b", "nf4"), ("glue_cola", "int8")])
def test_smoke_overlay_quantizes_the_tiny_model_without_a_line_per_layer(run, caplog, tmp_path, config, quantization):
    words = ("--config", f"configs/{config}.yaml", "--config", "configs/smoke.yaml", "--trainer.callbacks", "null")
    words += ("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1")
    words += ("--model.adapter.init_args.num_coefficients", "512", "--model.task.init_args.dtype", "float32")
    quantized = ("--model.task.init_args.quantization", quantization)
    logging.getLogger("bitsandbytes").propagate = True
    fitted = run("fit", *words, *quantized, "--trainer.accumulate_grad_batches", "1")
    assert fitted.trainer.global_step == 2
    assert is_quantized(fitted.model.model)
    assert [record for record in caplog.records if record.name.startswith("bitsandbytes")] == []

    save_adapter(fitted.model.model, tmp_path / "adapter", class_names=fitted.model.class_names)
    losses = []
    for options in (quantized, ()):
        run_ = run("validate", *words, *options, "--model.adapter_path", str(tmp_path / "adapter"))
        losses.append(float(run_.trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
