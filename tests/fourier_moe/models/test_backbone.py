"""The fingerprint of a backbone: measured once, the same in every precision, and another one for every other model."""

import copy

import pytest
import torch
from support.models import Transformer, config
from torch import nn

from fourier_moe import FullFineTuning, HeadOnly, inject, load_adapter, save_adapter
from fourier_moe.inject import is_adapted
from fourier_moe.models.backbone import (
    Fingerprint,
    backbone_fingerprint,
    check_backbone,
    keep_fingerprint,
    kept_fingerprint,
    measure_backbone,
)

OTHERS = r"adapter was trained on backbone .*; load the same pretrained weights"


class LanguageModel(nn.Module):
    """Token embedding whose first row is padding, two blocks, and an untied output; norms at their initial 1 and 0."""

    def __init__(self, seed=0, name="lm"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(50, 16, padding_idx=0)
            self.body = Transformer(seed=seed).layers
        self.backbone_name = name


class Int8Linear(nn.Module):
    """A projection as quantized bases have it: whole numbers and scales, and the bias as it was."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantized(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model


def adapted(model, settings=None):
    inject(model, settings or config())
    return model


def prints_of(model):
    """What a file of an adapter of this model would keep."""
    return backbone_fingerprint(adapted(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_the_same_backbone(dtype):
    stored = prints_of(Transformer())
    assert len(stored) >= 8
    check_backbone(adapted(Transformer().to(dtype)), "x", stored, "adapter")
    with pytest.raises(ValueError, match=OTHERS):
        check_backbone(adapted(Transformer(seed=1).to(dtype)), "x", stored, "adapter")


def test_numbers_below_the_normal_range_of_float16_may_be_rounded():
    """Rows of rare tokens in pretrained models can be as good as zero."""
    models = [LanguageModel() for _ in range(2)]
    for model in models:
        nn.init.normal_(model.embedding.weight, 0, 2e-7, generator=torch.Generator().manual_seed(0))
    check_backbone(adapted(models[1].half()), "lm", prints_of(models[0]), "adapter")


def test_constant_parameters_may_be_rounded_to_bfloat16():
    """1 + 2^-8 lies as far from its neighbors in bfloat16 as a number can; in a constant parameter nothing averages it out."""
    models = [Transformer() for _ in range(2)]
    for model in models:
        for block in model.layers:
            nn.init.constant_(block.norm.weight, 1 + 2**-8)
            nn.init.constant_(block.norm.bias, 1 + 2**-8)
    check_backbone(adapted(models[1].to(torch.bfloat16)), "x", prints_of(models[0]), "adapter")


def test_large_matrices_of_another_initialization_are_another_backbone():
    """Over a whole matrix of this size the root mean squares of two initializations are equal to 0.1 %."""

    def model(seed):
        torch.manual_seed(seed)
        return nn.ModuleDict({f"q_proj_{i}": nn.Linear(768, 768, bias=False) for i in range(4)} | {"v_proj": nn.Linear(16, 16)})

    settings = config(targets=["v_proj"])
    stored = [backbone_fingerprint(adapted(model(seed), settings)) for seed in (0, 1)]
    assert {"q_proj_0.weight", "q_proj_3.weight"} < stored[0].keys() == stored[1].keys()
    matrices = [{key: value for key, value in values.items() if "q_proj" in key} for values in stored]
    check_backbone(adapted(model(0), settings), "x", matrices[0], "adapter")
    with pytest.raises(ValueError, match=OTHERS):
        check_backbone(adapted(model(0), settings), "x", matrices[1], "adapter")


@pytest.mark.parametrize("stored_quantized", [False, True])
@pytest.mark.parametrize("present_quantized", [False, True])
def test_quantized_and_full_precision_model_are_one_backbone_and_other_weights_are_not(stored_quantized, present_quantized):
    def model(quantize, seed=0):
        fresh = LanguageModel(seed).to(torch.bfloat16)
        return adapted(quantized(fresh) if quantize else fresh)

    stored = backbone_fingerprint(model(stored_quantized))
    check_backbone(model(present_quantized), "lm", stored, "adapter")
    with pytest.raises(ValueError, match=rf"{OTHERS[:30]}.*with other weights"):
        check_backbone(model(present_quantized, seed=1), "lm", stored, "adapter")


def test_quantized_weights_without_biases_are_told_apart_by_the_embedding_behind_its_padding_row():
    def model(seed, quantize):
        fresh = LanguageModel(seed)
        for module in fresh.body.modules():
            if isinstance(module, nn.Linear):
                module.bias = None
        return adapted(quantized(fresh) if quantize else fresh)

    stored = backbone_fingerprint(model(0, quantize=False))
    assert stored["embedding.weight"] == 0
    assert stored["embedding.weight[25]"] > 0
    check_backbone(model(0, quantize=True), "lm", stored, "adapter")
    with pytest.raises(ValueError, match=OTHERS):
        check_backbone(model(1, quantize=True), "lm", stored, "adapter")


def test_parameter_of_a_type_of_its_own_is_not_measured():
    """As quantization libraries have them: they say that they are bfloat16 and hold something else."""

    class Packed(nn.Parameter):
        pass

    model = Transformer()
    plain = measure_backbone(model).values
    model.layers[0].attention.k_proj.weight = Packed(model.layers[0].attention.k_proj.weight.detach())
    model.layers[1].attention.k_proj.weight = nn.Parameter(torch.ones(16, 16).to(torch.float8_e4m3fn), requires_grad=False)
    assert plain.keys() - measure_backbone(model).values.keys() == {f"layers.{i}.attention.k_proj.weight" for i in range(2)}


@pytest.mark.parametrize(("names", "same"), [(("a", "a"), True), (("a", None), True), (("a", "b"), False)])
@pytest.mark.parametrize("stored", [{}, {"layers.0.norm.weight": 1.0, "layers.0.norm.bias": 0.0}, {"elsewhere": 0.3}])
def test_where_values_tell_nothing_names_decide(names, same, stored):
    model = adapted(Transformer())
    model.backbone_name = names[1]
    if same:
        check_backbone(model, names[0], stored, "adapter")
    else:
        with pytest.raises(ValueError, match=r"adapter was trained on backbone 'a', this model is 'b'"):
            check_backbone(model, names[0], stored, "adapter")


def test_constant_that_differs_is_another_backbone_whatever_the_name():
    model = adapted(Transformer())
    model.backbone_name = "a"
    with pytest.raises(ValueError, match="with other weights"):
        check_backbone(model, "a", {"layers.0.norm.weight": 0.0}, "adapter")


def test_fingerprint_is_that_of_the_pretrained_weights_alone():
    model = Transformer()
    inject(model, config(head=["classifier"]))
    assert kept_fingerprint(model).values.keys() <= {name for name, _ in Transformer().named_parameters()}
    names = {name for name, _ in Transformer().named_parameters() if not name.startswith("classifier")}
    assert kept_fingerprint(model).values.keys() == names
    assert set(kept_fingerprint(model).sample) < names
    assert backbone_fingerprint(model).items() <= measure_backbone(Transformer()).values.items()


def test_fingerprint_is_measured_once_and_survives_what_becomes_of_the_weights():
    model = adapted(Transformer(), config(head=["classifier"]))
    before = dict(backbone_fingerprint(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert backbone_fingerprint(model) == backbone_fingerprint(copy.deepcopy(model)) == before
    assert backbone_fingerprint(model.to("meta")) == before


def test_meta_device_has_none_until_another_process_hands_its_own_over(tmp_path):
    model = adapted(Transformer())
    empty = adapted(Transformer(seed=1).to("meta"))
    assert kept_fingerprint(empty) == Fingerprint()
    assert backbone_fingerprint(empty) == {}
    keep_fingerprint(empty, kept_fingerprint(model))
    assert backbone_fingerprint(empty) == backbone_fingerprint(model) != {}
    check_backbone(empty, "x", backbone_fingerprint(model), "adapter")


def test_failed_injection_and_full_fine_tuning_keep_none():
    model = Transformer()
    with pytest.raises(ValueError):
        inject(model, config(targets=["nothing"]))
    assert kept_fingerprint(model) == Fingerprint()
    assert kept_fingerprint(adapted(model, FullFineTuning())) == Fingerprint()


@pytest.mark.parametrize("settings", [config(), HeadOnly(head=["body.1"])])
def test_adapter_of_a_full_precision_model_loads_on_the_quantized_one_and_the_other_way_round(tmp_path, settings):
    first, second = LanguageModel(), quantized(LanguageModel())
    if isinstance(settings, HeadOnly):
        second.body[1] = LanguageModel().body[1]  # what is trained is not quantized
    load_adapter(second, save_adapter(adapted(first, settings), tmp_path / "full"))
    load_adapter(LanguageModel(), save_adapter(second, tmp_path / "quantized"))
    other = quantized(LanguageModel(seed=1))
    if isinstance(settings, HeadOnly):
        other.body[1] = LanguageModel(seed=1).body[1]
    with pytest.raises(ValueError, match="trained on backbone 'lm', with other weights"):
        load_adapter(other, tmp_path / "full")
    assert not is_adapted(other)
    assert kept_fingerprint(other) == Fingerprint()


def fingerprint_of_other_parameters(model):
    """Of another sample than `inject` takes: evenly over the parameters that are frozen."""
    frozen = sorted((n.replace(".base.", "."), p) for n, p in model.named_parameters() if not p.requires_grad)
    return {name: float(p.flatten()[:16].double().square().mean().sqrt()) for name, p in frozen[:: max(1, len(frozen) // 8)]}


@pytest.mark.parametrize("quantize", [False, True])
def test_fingerprints_of_other_parameters_are_compared_in_full(quantize):
    stored = fingerprint_of_other_parameters(adapted(LanguageModel()))
    present = adapted(quantized(LanguageModel()) if quantize else LanguageModel())
    assert quantize or stored.keys() <= kept_fingerprint(present).values.keys()
    check_backbone(present, "lm", stored, "adapter")
    other = LanguageModel(seed=1)
    with pytest.raises(ValueError, match=OTHERS):
        check_backbone(adapted(quantized(other) if quantize else other), "lm", stored, "adapter")


def test_parts_of_a_fused_attention_have_the_names_of_its_projections():
    torch.manual_seed(0)
    model = adapted(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    assert {"self_attn.q_proj.weight", "self_attn.out_proj.bias", "norm1.weight"} < kept_fingerprint(model).values.keys()
