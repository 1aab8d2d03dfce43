"""AdapterBank: every example of a mixed batch gets what its own adapter loaded alone gives, and nothing is left behind."""

import copy

import open_clip
import pytest
import torch
from support.models import Tower
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

from fourier_moe import (
    DoRAConfig,
    FourierFTConfig,
    FourierMoEConfig,
    FullFineTuning,
    HeadOnly,
    LoRAConfig,
    PEANuTConfig,
    PiSSAConfig,
    adapters,
    inject,
    load_adapter,
    save_adapter,
)
from fourier_moe.models import known_output
from fourier_moe.serving.bank import AdapterBank
from fourier_moe.serving.bank_layers import BankProjection

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def roberta(num_labels=3):
    torch.manual_seed(0)
    return Roberta(RobertaConfig(vocab_size=40, max_position_embeddings=20, num_labels=num_labels, **SIZES)).double()


def llama():
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **SIZES, **tokens)).double()


def trained(directory, model, config):
    """An adapter directory of `model` whose every trained tensor is random."""
    inject(model, config)
    torch.manual_seed(len(str(directory)) + sum(map(ord, directory.name)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    save_adapter(model.float(), directory)  # in float32, as files are
    return directory


HEAD = {"head": ["classifier"]}
UNEQUAL = {"densities": [1, 3], "shared_coefficients": 6}
SMALL = {"num_coefficients": 16, "num_experts": 2, "top_k": 1, "bandwidth": 1.0}
CONFIGS = {
    "moe": (3, FourierMoEConfig(targets=["query", "value"], num_coefficients=64, num_experts=4, bandwidth=1.0, **HEAD)),
    "other_moe": (
        5,
        FourierMoEConfig(targets=["key", "output.dense"], router_scope="block", dropout=0.5, **UNEQUAL, **SMALL, **HEAD),
    ),
    "lora": (2, LoRAConfig(targets=["query", "intermediate.dense"], r=3, dropout=0.5, **HEAD)),
    "dora": (3, DoRAConfig(targets=["value"], r=2, **HEAD)),
    "fourier_ft": (3, FourierFTConfig(targets=["value"], num_coefficients=20, **HEAD)),
    "peanut": (3, PEANuTConfig(targets=["query"], r=4, **HEAD)),
    "head": (3, HeadOnly(**HEAD)),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: trained(root / name, roberta(classes), config) for name, (classes, config) in CONFIGS.items()}


@pytest.fixture(scope="module")
def alone(directories):
    """The model with one adapter loaded alone, float64; None is the plain model."""
    models = {None: roberta().eval()}
    for name, (classes, _) in CONFIGS.items():
        model = roberta(classes)
        load_adapter(model, directories[name])
        models[name] = model.double().eval()
    return models


@pytest.fixture
def bank(directories):
    bank = AdapterBank(roberta())
    for name, directory in directories.items():
        bank.load(name, directory)
    bank.model.double()
    return bank


def tokens(count, length=5, seed=1):
    return torch.randint(2, 40, (count, length), generator=torch.Generator().manual_seed(seed))


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


MIXED = ["moe", None, "lora", "other_moe", "moe", "dora", "fourier_ft", "head", "peanut", "lora", None]


@pytest.mark.parametrize("names", [MIXED, ["lora"], [None], [None, None, None], ["moe"] * 3, ["lora", None]], ids=str)
def test_every_example_gets_what_its_adapter_gives_alone(bank, alone, names):
    ids = tokens(len(names))
    with torch.no_grad(), bank.per_example(names):
        logits = bank.model(ids).logits
    assert logits.shape == (len(names), max({"other_moe": 5, "lora": 2}.get(name, 3) for name in set(names)))
    for row, name in enumerate(names):
        expected = alone[name](ids[row : row + 1]).logits[0]
        same(logits[row, : len(expected)], expected)
        assert (logits[row, len(expected) :] == -torch.inf).all()


def test_adapters_differ_here(alone):
    logits = [alone[name](tokens(1)).logits for name in (None, "moe", "dora", "fourier_ft", "peanut", "head")]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(logits) for b in logits[:i])


def test_activate_disabled_and_nesting(bank, alone):
    ids = tokens(3)
    outputs = {name: model(ids).logits for name, model in alone.items()}
    assert bank.active is None
    same(bank.model(ids).logits, outputs[None])
    bank.activate("other_moe")
    same(bank.model(ids).logits, outputs["other_moe"])
    with bank.disabled():
        same(bank.model(ids).logits, outputs[None])
        with bank.per_example(["dora"] * 3):
            same(bank.model(ids).logits, outputs["dora"])
            with bank.disabled():
                same(bank.model(ids).logits, outputs[None])
            same(bank.model(ids).logits, outputs["dora"])
    with pytest.raises(RuntimeError), bank.per_example(["moe"] * 3):
        raise RuntimeError
    same(bank.model(ids).logits, outputs["other_moe"])
    bank.activate(None)
    same(bank.model(ids).logits, outputs[None])


def test_base_is_there_once_and_computed_once_and_idle_adapters_never(bank):
    plain = {id(parameter) for parameter in bank.model.parameters()}
    layers = [module for module in bank.model.modules() if isinstance(module, BankProjection)]
    calls = {"base": 0}
    for layer in layers:
        layer.base.register_forward_hook(lambda *_: calls.__setitem__("base", calls["base"] + 1))
        for name, adapter in layer.adapters.items():
            hook = lambda _, inputs, __, name=name: calls.setdefault(name, []).append(len(inputs[0]))  # noqa: E731
            adapter.register_forward_hook(hook)
    with bank.per_example(["moe", None, "moe", "lora", "moe"]):
        bank.model(tokens(5))
    assert calls == {"base": len(layers), "moe": [3] * 4, "lora": [1] * 4}
    assert known_output._KNOWN_OUTPUT.get() is None  # activations are not kept
    base = sum(parameter.numel() for parameter in roberta().parameters())
    own = sum(p.numel() for layer in layers for adapter in layer.adapters.values() for p in adapter.parameters())
    heads = sum(p.numel() for head in bank.model.classifier.heads.values() for p in head.parameters())
    assert sum(parameter.numel() for parameter in bank.model.parameters()) == base + own + heads
    assert len(plain) == len(list(bank.model.parameters()))


def test_unload_of_all_leaves_the_model_as_it_was(directories):
    model = roberta()
    before = copy.deepcopy(model)
    bank = AdapterBank(model)
    for name in ("moe", "lora"):
        bank.load(name, directories[name])
    bank.unload("moe")
    assert bank.names == ("lora",)
    bank.unload("lora")
    assert str(model) == str(before.eval())
    assert model.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True))
    load_adapter(model, directories["dora"])  # it can be adapted again


def test_the_rest_works_on_when_one_is_unloaded(bank, alone):
    bank.activate("dora")
    bank.unload("moe")
    same(bank.model(tokens(2)).logits, alone["dora"](tokens(2)).logits)
    with bank.per_example(["lora", "head"]):
        logits = bank.model(tokens(2)).logits
    same(logits[1], alone["head"](tokens(2)).logits[1])


def test_nothing_of_a_bank_is_trained_and_dropout_is_off(bank):
    assert not any(parameter.requires_grad for parameter in bank.model.parameters())
    assert not any(module.training for module in bank.model.modules())


# ---------------------------------------------------------------- fused attention


@pytest.fixture
def towers(tmp_path):
    configs = {
        "attention": (4, FourierMoEConfig(targets=["q_proj", "out_proj"], num_coefficients=32, num_experts=2, head=["head"])),
        "feed_forward": (3, LoRAConfig(targets=["linear1", "linear2"], r=2, head=["head"])),
    }
    return {name: (n, trained(tmp_path / name, Tower(n), config)) for name, (n, config) in configs.items()}


def test_fused_attention_is_split_while_needed_and_whole_again_afterwards(towers):
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    model = Tower().eval()
    before, plain = copy.deepcopy(model), model(x)
    bank = AdapterBank(model)
    for name in ("feed_forward", "attention"):
        bank.load(name, towers[name][1])
    model.double()
    names = ["attention", None, "feed_forward"]
    with torch.no_grad(), bank.per_example(names):
        logits = model(x)
    for row, name in enumerate(names):
        expected = plain
        if name is not None:
            alone = Tower(towers[name][0])
            load_adapter(alone, towers[name][1])
            expected = alone.double().eval()(x)
        same(logits[row, : expected.shape[1]], expected[row])
    assert sum(p.numel() for m in bank._split.values() for p in (m.in_proj_weight, m.in_proj_bias)) == 0  # held once
    for name in names[::2]:
        bank.unload(name)
    assert str(model) == str(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.state_dict().items())
    assert [m.activation_relu_or_gelu for m in model.encoder.layers] == [
        m.activation_relu_or_gelu for m in before.encoder.layers
    ]
    with torch.no_grad():  # torch takes another kernel with it
        assert torch.equal(model(x), before(x))


def test_open_clip_tower(tmp_path):
    def clip():
        torch.manual_seed(0)
        sizes = {"vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}}
        text = {"layers": 1, "width": 16, "heads": 1, "vocab_size": 50, "context_length": 8}
        return open_clip.CLIP(embed_dim=8, text_cfg=text, **sizes).visual

    directory = trained(
        tmp_path / "a", clip(), FourierMoEConfig(targets=["q_proj", "c_fc"], num_coefficients=32, num_experts=2)
    )
    images = torch.randn(3, 3, 16, 16)
    alone, plain = clip(), clip().eval()(images)
    load_adapter(alone, directory)
    bank = AdapterBank(clip())
    bank.load("a", directory)
    with bank.per_example([None, "a", None]):
        features = bank.model(images)
    torch.testing.assert_close(features[1], alone.eval()(images)[1])
    torch.testing.assert_close(features[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(features[1], plain[1], atol=1e-3)
    bank.unload("a")
    torch.testing.assert_close(bank.model(images), plain)


class Int8Linear(nn.Module):
    """A frozen projection whose weight is no floating-point parameter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("scale", linear.weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_quantized_base(directories, alone):
    def quantized():
        model = roberta().eval().requires_grad_(False)
        for layer in model.roberta.encoder.layer:
            layer.attention.self.query = Int8Linear(layer.attention.self.query)
            layer.attention.self.value = Int8Linear(layer.attention.self.value)
        return model

    bank, expected = AdapterBank(quantized()), quantized()
    bank.load("moe", directories["moe"])
    load_adapter(expected, directories["moe"])
    bank.model.double()
    ids = tokens(3)
    with torch.no_grad(), bank.per_example(["moe", None, "moe"]):
        logits = bank.model(ids).logits
    same(logits[[0, 2]], expected.double().eval()(ids).logits[[0, 2]])
    same(logits[1], quantized()(ids).logits[1])
    assert not torch.allclose(logits[0], alone["moe"](ids).logits[0], atol=1e-6)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_writes_for_each_prompt_what_its_adapter_writes(tmp_path, beams):
    configs = {
        "moe": FourierMoEConfig(targets=["q_proj", "down_proj"], num_coefficients=32, num_experts=2),
        "lora": LoRAConfig(targets=["v_proj", "lm_head"], r=2),
    }
    directories = {name: trained(tmp_path / name, llama(), config) for name, config in configs.items()}
    bank = AdapterBank(llama())
    for name, directory in directories.items():
        bank.load(name, directory)
    bank.model.double()
    names = ["moe", None, "lora", "moe"]
    config = GenerationConfig(max_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=0)
    ids = tokens(4, length=3)

    def write(model, ids):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)

    with bank.per_example([name for name in names for _ in range(beams)]):
        written = write(bank.model, ids)
    texts = set()
    for row, name in enumerate(names):
        alone = llama()
        if name is not None:
            load_adapter(alone, directories[name])
        expected = write(alone.double().eval(), ids[row : row + 1])[0]
        assert torch.equal(written[row], expected)
        texts.add(tuple(expected[3:].tolist()))
    assert len(texts) > 1


# ---------------------------------------------------------------- mistakes


def test_wrong_number_of_examples_names_the_layer(bank):
    message = r"2 examples, but roberta\.encoder\S+ .* \(3, 5, 16\)"
    with bank.per_example(["moe", None]), pytest.raises(ValueError, match=message):
        bank.model(tokens(3))


def test_layer_that_sees_tokens_first_is_named(tmp_path):
    config = LoRAConfig(targets=["linear1"], r=2)
    directory = trained(tmp_path / "a", Tower(batch_first=False), config)
    bank = AdapterBank(Tower(batch_first=False))
    bank.load("a", directory)
    bank.model.double()
    x, message = torch.randn(4, 3, 16, dtype=torch.float64), r"3 examples, but encoder\.layers\.0\.linear1 .* \(4, 3, 16\)"
    with bank.per_example(["a", None, "a"]), pytest.raises(ValueError, match=message):
        bank.model(x)


@pytest.mark.parametrize("config", [FullFineTuning(), PiSSAConfig(targets=["query"], r=2)], ids=["full", "pissa"])
def test_adapters_that_change_the_base_are_refused_and_nothing_is_changed(bank, alone, tmp_path, config):
    model = roberta()
    inject(model.float(), config)
    save_adapter(model, tmp_path / "x")
    bank.model.float()
    with pytest.raises(ValueError, match=rf"x is {type(config).__name__}, which changes the pretrained weights"):
        bank.load("x", tmp_path / "x")
    assert "x" not in bank.names
    bank.model.double()
    bank.activate("moe")
    same(bank.model(tokens(2)).logits, alone["moe"](tokens(2)).logits)


def test_adapter_of_another_backbone_is_refused_and_nothing_is_changed(bank, alone, tmp_path):
    other = roberta()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    trained(tmp_path / "x", other, LoRAConfig(targets=["query"], r=2))
    with pytest.raises(ValueError, match="was trained on backbone"):
        bank.load("x", tmp_path / "x")
    bank.activate("moe")
    same(bank.model(tokens(2)).logits, alone["moe"](tokens(2)).logits)


@pytest.mark.parametrize(
    "config", [LoRAConfig(targets=["classifier.dense"], r=2), HeadOnly(head=["classifier.dense"])], ids=["adapter", "head"]
)
def test_adapter_or_head_inside_another_ones_head_is_refused(bank, tmp_path, config):
    trained(tmp_path / "x", roberta(), config)
    with pytest.raises(ValueError, match=r"'moe' brings a classifier of its own, of which 'x' changes classifier\.dense"):
        bank.load("x", tmp_path / "x")
    assert "x" not in bank.names


def test_adapter_of_another_ones_head_is_refused_whichever_comes_first(tmp_path):
    configs = {"trains": HeadOnly(head=["head"]), "adapts": LoRAConfig(targets=["head"], r=2)}
    directories = {name: trained(tmp_path / name, Tower(), config) for name, config in configs.items()}
    for first, second in (("trains", "adapts"), ("adapts", "trains")):
        bank = AdapterBank(Tower().float())
        bank.load(first, directories[first])
        with pytest.raises(ValueError, match="'trains' brings a head of its own, of which 'adapts' changes head;"):
            bank.load(second, directories[second])


def test_head_of_another_shape_than_its_classes_is_refused(bank, tmp_path):
    torch.manual_seed(0)
    wide = Roberta(RobertaConfig(vocab_size=40, max_position_embeddings=20, **SIZES | {"hidden_size": 18})).double()
    trained(tmp_path / "x", wide, HeadOnly(**HEAD))
    with pytest.raises(ValueError, match="does not fit this model"):
        bank.load("x", tmp_path / "x")


def test_head_without_examples_first_is_refused_in_a_mixed_batch(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x @ self.weight

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Flat())

    directory = trained(tmp_path / "x", model(), HeadOnly(head=["1"]))
    bank = AdapterBank(model())
    bank.load("x", directory)
    bank.activate("x")
    assert bank.model(torch.randn(3, 4)).shape == (3,)
    with pytest.raises(ValueError, match=r"the head 1 gives \(2,\) for 2 examples"), bank.per_example(["x", None, "x"]):
        bank.model(torch.randn(3, 4))


def test_names(bank, directories):
    for name in ("moe", ""):
        with pytest.raises(ValueError, match=f"name='{name}' must be new and not empty; loaded: moe, other_moe"):
            bank.load(name, directories["moe"])
    for call in (bank.activate, bank.unload, lambda name: bank.per_example([None, name]).__enter__()):
        with pytest.raises(ValueError, match="no adapter 'lorra' is loaded; loaded: moe"):
            call("lorra")
    with pytest.raises(ValueError, match="must be a list"):
        bank.per_example("moe").__enter__()
    bank.activate("moe")
    with pytest.raises(ValueError, match="'moe' is active"):
        bank.unload("moe")
    bank.activate(None)
    with pytest.raises(ValueError, match="'lora' is active"), bank.per_example(["lora"]):
        bank.unload("lora")


@pytest.mark.parametrize("name", ["train", "type", "keys", "v1.0", "a b"])
def test_any_text_is_a_name(directories, alone, name):
    bank = AdapterBank(roberta())
    bank.load(name, directories["moe"])
    bank.model.double()
    bank.activate(name)
    same(bank.model(tokens(2)).logits, alone["moe"](tokens(2)).logits)


def test_an_adapted_model_takes_no_bank(bank):
    model = roberta()
    inject(model, LoRAConfig(targets=["query"]))
    with pytest.raises(ValueError, match="adapted already"):
        AdapterBank(model)
    with pytest.raises(ValueError, match="adapted already"):
        AdapterBank(bank.model)
    assert adapters(bank.model)
