"""A head that is new and that an injection freezes is named in a warning; a trained one, or a chosen one, is not."""

import warnings

import pytest
import torch
from support.models import Transformer, config
from torch import nn

from fourier_moe import HeadOnly, inject
from fourier_moe.models.fresh_heads import fresh_heads


def warned(model, settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inject(model, settings)
    return [str(warning.message) for warning in caught if "newly initialized" in str(warning.message)]


def test_new_head_that_stays_frozen_is_named():
    (text,) = warned(Transformer(), config())
    assert text.startswith("classifier looks newly initialized and is frozen now")
    assert "head=['classifier']" in text
    (text,) = warned(nn.ModuleDict({"model": Transformer()}), config())
    assert "head=['model.classifier']" in text


def test_warning_points_at_the_call_of_inject():
    with pytest.warns(UserWarning, match="newly initialized") as caught:
        inject(Transformer(), config())
    assert caught[0].filename == __file__


def test_head_that_is_trained_trained_before_or_frozen_on_purpose_is_not():
    assert warned(Transformer(), config(head=["classifier"])) == []
    assert warned(Transformer(), HeadOnly(head=["classifier"])) == []
    pretrained = Transformer()
    with torch.no_grad():
        pretrained.classifier.weight *= 3
    assert warned(pretrained, config()) == []
    frozen = Transformer()
    frozen.classifier.requires_grad_(False)
    assert warned(frozen, config()) == []
    with torch.device("meta"):
        assert warned(Transformer(), config()) == []


def head(weight, bias):
    linear = nn.Linear(64, 10, bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return nn.ModuleDict({"score": linear})


@pytest.mark.parametrize("seed", range(5))
def test_what_counts_as_new(seed):
    torch.manual_seed(seed)
    normal, zeros, moved = 0.02 * torch.randn(10, 64), torch.zeros(10), 0.01 * torch.randn(10)
    assert list(fresh_heads(head(normal, zeros))) == ["score"]  # transformers
    assert list(fresh_heads(head(normal, None))) == ["score"]
    assert list(fresh_heads(nn.ModuleDict({"fc": nn.Linear(64, 10)}))) == ["fc"]  # torch
    assert list(fresh_heads(nn.ModuleDict({"fc": nn.Linear(64, 10, bias=False)}))) == ["fc"]
    assert not fresh_heads(head(normal, moved))
    assert not fresh_heads(nn.ModuleDict({"fc": nn.Linear(64, 0)}))
    assert not fresh_heads(head(2 * normal, None))
    assert not fresh_heads(head(0.3 * torch.randn(10, 64), moved))


def test_layers_inside_of_the_model_are_no_heads():
    assert not fresh_heads(nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)})])}))


def test_heads_that_transformers_makes():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))
    llama = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, num_labels=3, pad_token_id=0))
    for model, target, expected in ((roberta, "query", "classifier"), (llama, "q_proj", "score")):
        (text,) = warned(model, config(targets=[target]))
        assert f"head=['{expected}']" in text
    causal = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    assert warned(causal, config(targets=["q_proj"])) == []
