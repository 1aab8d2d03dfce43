"""fourier_moe.models.attention: a split module computes what the fused one did, and refuses what it would get wrong."""

import copy
import pickle
import re

import pytest
import torch
from support.attention_modules import (
    DTYPES,
    E,
    H,
    L,
    N,
    OpenClip4,
    S,
    assert_same,
    make_mha,
    mask_of,
    mha_inputs,
    randomize,
    split_of,
)
from torch import nn

from fourier_moe.models.attention import FUSED_PROJECTIONS, is_fused_attention, split_attention


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# nn.MultiheadAttention


@DTYPES
@pytest.mark.parametrize("layout", ["batch_first", "sequence_first", "unbatched"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("mask", [None, "bool 2-D", "float 2-D", "bool 3-D", "float 3-D"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
def test_mha_layouts_masks_and_weights(layout, padding, mask, dtype):
    module = make_mha(dtype, batch_first=layout == "batch_first")
    split = split_of(module)
    query, key, value = mha_inputs(layout, dtype)
    batch = () if layout == "unbatched" else (N,)
    kind, dimensions = mask.split() if mask else (None, None)
    mask_shape = (L, S) if dimensions == "2-D" else (H * (1 if layout == "unbatched" else N), L, S)
    masks = {
        "key_padding_mask": mask_of(padding, *batch, S, dtype=dtype),
        "attn_mask": mask_of(kind, *mask_shape, dtype=dtype),
    }
    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected = module(query, key, value, **masks, **weights)
        actual = split(query, key, value, **masks, **weights)
        assert_same(actual, expected, dtype)
        assert (actual[1] is None) == ("need_weights" in weights)


@DTYPES
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 6}, {"vdim": 3}, {"kdim": 6, "vdim": 3, "bias": False}, {"dropout": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])  # without grad: the original's native kernel
def test_mha_options_in_eval(options, grad, dtype):
    module = make_mha(dtype, batch_first=True, **options).eval()
    query, key, value = mha_inputs("batch_first", dtype, module.kdim, module.vdim)
    with torch.set_grad_enabled(grad):
        assert_same(split_of(module)(query, key, value), module(query, key, value), dtype)
        if module.kdim == module.vdim == E:
            assert_same(split_of(module)(query, query, query), module(query, query, query), dtype)


@pytest.mark.parametrize("need_weights", [True, False])
def test_mha_dropout_draws_the_same(need_weights):
    module = make_mha(dropout=0.5, batch_first=True)
    split, inputs, results = split_of(module), mha_inputs("batch_first"), []
    for attention in (module, split):
        torch.manual_seed(1)
        results.append(attention(*inputs, need_weights=need_weights))
    assert_same(results[1], results[0], torch.float64)
    assert not torch.allclose(split.eval()(*inputs)[0], results[1][0])


@pytest.mark.parametrize("padding", [None, "bool"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_mha_is_causal(padding, need_weights):
    module = make_mha(batch_first=True)
    split = split_of(module)
    x = torch.randn(N, L, E, dtype=torch.float64)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    arguments = {"attn_mask": causal, "key_padding_mask": mask_of(padding, N, L), "need_weights": need_weights}
    expected = module(x, x, x, is_causal=True, **arguments)
    actual = split(x, x, x, is_causal=True, **arguments)
    assert_same(actual, expected, torch.float64)
    assert_same(actual, split(x, x, x, **arguments), torch.float64)
    assert not torch.allclose(actual[0], split(x, x, x)[0])
    arguments["attn_mask"] = torch.zeros(L, L, dtype=torch.bool)  # a broken promise shows who believes the hint
    assert_same(split(x, x, x, is_causal=True, **arguments), module(x, x, x, is_causal=True, **arguments), torch.float64)
    with pytest.raises(ValueError, match="is_causal=True needs attn_mask"):
        split(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_mha_query_without_visible_key(need_weights):
    module = make_mha(batch_first=True)
    inputs = mha_inputs("batch_first")
    arguments = {"key_padding_mask": torch.tensor([[True] * S, [False] * S]), "need_weights": need_weights}
    expected = module(*inputs, **arguments)
    assert_same(split_of(module)(*inputs, **arguments), expected, torch.float64, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("need_weights", [True, False])
def test_mha_gradients(need_weights, dtype):
    module = make_mha(dtype, batch_first=True)
    split = split_of(module)
    inputs = mha_inputs("batch_first", dtype)
    target = torch.randn(N, L, E, dtype=dtype)
    input_gradients = []
    for attention in (module, split):
        leaves = [x.clone().requires_grad_() for x in inputs]
        (attention(*leaves, need_weights=need_weights)[0] * target).sum().backward()
        input_gradients.append([leaf.grad for leaf in leaves])
    assert_same(input_gradients[1], input_gradients[0], dtype)
    projections = [split.q_proj, split.k_proj, split.v_proj]
    assert_same(torch.cat([p.weight.grad for p in projections]), module.in_proj_weight.grad, dtype)
    assert_same(torch.cat([p.bias.grad for p in projections]), module.in_proj_bias.grad, dtype)
    assert_same(split.out_proj.weight.grad, module.out_proj.weight.grad, dtype)
    assert module.in_proj_weight.grad.abs().min() > 0


def test_mha_autocast_to_bfloat16():
    module = make_mha(torch.float32, batch_first=True)
    inputs = mha_inputs("batch_first", torch.float32)
    mask = mask_of("float", L, S, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (True, False):
            expected = module(*inputs, attn_mask=mask, need_weights=need_weights)[0]
            actual = split_of(module)(*inputs, attn_mask=mask, need_weights=need_weights)[0]
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": torch.zeros(1, S)}, "attn_mask has shape (1, 7)"),
        ({"attn_mask": torch.zeros(1, L, S)}, "attn_mask has shape (1, 5, 7)"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, "attn_mask has shape (5, 7) and torch.int64"),
        ({"key_padding_mask": torch.zeros(1, S)}, "key_padding_mask has shape (1, 7)"),
        ({"key": torch.zeros(1, S, E), "value": torch.zeros(1, S, E)}, "query, key and value must be"),
        ({"value": torch.zeros(N, S - 1, E)}, "query, key and value must be"),
        ({"key": torch.zeros(S, E)}, "query, key and value must be"),
    ],
)
def test_mha_refuses_shapes_that_would_broadcast(arguments, message):
    inputs = dict(zip(("query", "key", "value"), mha_inputs("batch_first", torch.float32), strict=True))
    split = split_attention(make_mha(torch.float32, batch_first=True))
    with pytest.raises(ValueError, match=re.escape(message)):
        split(**inputs | arguments)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_mha_refused_options(option):
    with pytest.raises(ValueError, match=option):
        split_attention(nn.MultiheadAttention(E, H, **{option: True}))


# The module as an object


def test_parameters_keep_values_and_flags():
    module = make_mha(torch.bfloat16).eval()
    module.in_proj_weight.requires_grad_(False)
    module.out_proj.bias.requires_grad_(False)
    split = split_attention(module)
    names = [f"{projection}.{kind}" for projection in FUSED_PROJECTIONS for kind in ("weight", "bias")]
    assert list(split.state_dict()) == names
    assert all(type(getattr(split, name)) is nn.Linear for name in FUSED_PROJECTIONS)
    assert not any(child.training for child in split.modules())
    frozen = {name for name, parameter in split.named_parameters() if not parameter.requires_grad}
    assert frozen == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.bias"}
    weights = [getattr(split, name).weight for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(torch.cat(list(weights)), module.in_proj_weight)
    assert {parameter.dtype for parameter in split.parameters()} == {torch.bfloat16}
    memory = [parameter.untyped_storage().data_ptr() for parameter in [*split.parameters(), *module.parameters()]]
    assert len(set(memory)) == 8 + 2  # q, k, v and out of the split; in_proj of the original
    assert split.out_proj.weight is module.out_proj.weight
    assert split_attention(make_mha()).training


def test_split_draws_no_random_numbers_and_is_picklable():
    module = make_mha()
    state = torch.get_rng_state()
    split = split_attention(module)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(L, N, E, dtype=torch.float64)
    for clone in (copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        assert torch.equal(clone(x, x, x)[0], split(x, x, x)[0])


def test_meta_device():
    split = split_attention(nn.MultiheadAttention(E, H, kdim=6, device="meta"))
    assert {parameter.device.type for parameter in split.parameters()} == {"meta"}
    split.to_empty(device="cpu")
    assert split(torch.zeros(L, E), torch.zeros(S, 6), torch.zeros(S, E))[0].shape == (L, E)


@pytest.mark.parametrize("layout", ["batch_first", "sequence_first", "unbatched"])
def test_projections_are_called_with_batch_first_tokens(layout):
    split, seen = split_attention(make_mha(batch_first=layout == "batch_first")), {}
    for name in FUSED_PROJECTIONS:
        getattr(split, name).register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape}))
    split(*mha_inputs(layout))
    batch = 1 if layout == "unbatched" else N
    assert seen == {"q_proj": (batch, L, E), "k_proj": (batch, S, E), "v_proj": (batch, S, E), "out_proj": (batch, L, E)}


# Parents of nn.MultiheadAttention that read its parameters


def encoder_layer(**options):
    return randomize(nn.TransformerEncoderLayer(E, H, 32, batch_first=True, dtype=torch.float64, **options)).eval()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("mask", [None, "bool", "causal"])
def test_transformer_encoder_layer_in_eval(grad, mask):
    layer = encoder_layer()
    x = torch.randn(N, L, E, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    arguments = {"causal": {"src_mask": causal, "is_causal": True}, "bool": {"src_mask": mask_of("bool", L, L)}}
    split = copy.deepcopy(layer)
    split.self_attn = split_attention(split.self_attn)
    with torch.set_grad_enabled(grad):
        expected = layer(x, **arguments.get(mask, {}))
        assert_same(split(x, **arguments.get(mask, {})), expected, torch.float64)
        split.self_attn.v_proj = nn.Linear(E, E, dtype=torch.float64)  # as an adapter would be put in
        assert not torch.allclose(split(x, **arguments.get(mask, {})), expected)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_with_padding_in_eval(grad):
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    split = copy.deepcopy(encoder)
    for layer in split.layers:
        layer.self_attn = split_attention(layer.self_attn)
    x = torch.randn(N, L, E, dtype=torch.float64)
    padding = torch.tensor([[False] * L, [False, False, False, True, True]])
    assert not nn.TransformerEncoder(split.layers[0], 1, enable_nested_tensor=False).use_nested_tensor
    with torch.set_grad_enabled(grad):
        actual, expected = split(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding)
    assert split.use_nested_tensor  # so that the encoder did look for in_proj_weight
    assert_same(actual[~padding], expected[~padding], torch.float64)  # the original zeroes padded positions


def test_fused_weight_of_a_split_module_is_an_error():
    split = split_attention(make_mha())
    with pytest.raises(ValueError, match="in_proj_weight is gone"):
        nn.functional.linear(torch.ones(1, E), split.in_proj_weight)
    nested = torch.nested.nested_tensor([torch.ones(3, E), torch.ones(2, E)], layout=torch.jagged)
    with pytest.raises(ValueError, match="nested"):
        split(nested, nested, nested)


# What is recognized, and what is refused


class Subclass(nn.MultiheadAttention):
    pass


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * E, E))

    def forward(self, hidden_states):
        return hidden_states


def test_is_fused_attention():
    fused = [nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H, kdim=6), OpenClip4(E, H), Foreign()]
    fused += [Subclass(E, H), Subclass(E, H, kdim=6)]
    assert all(map(is_fused_attention, fused))
    others = [split_attention(nn.MultiheadAttention(E, H)), nn.Linear(E, E), encoder_layer(), nn.Identity()]
    assert not any(map(is_fused_attention, others))


@pytest.mark.parametrize("module", [Foreign(), Subclass(E, H), nn.Linear(E, E)], ids=lambda m: type(m).__name__)
def test_unknown_class_is_refused(module):
    with pytest.raises(ValueError, match="cannot split attention of class") as error:
        split_attention(module)
    expected = [type(module).__qualname__, "torch.nn.modules.activation.MultiheadAttention(query, key", "target modules"]
    assert all(part in str(error.value) for part in expected)
    assert "open_clip.transformer.Attention(x, attn_mask)" in str(error.value)


@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(E, H), lambda: OpenClip4(E, H)], ids=["torch", "open_clip"])
def test_changed_modules_are_refused(make):
    changes = {
        "unknown attributes ['rope']": lambda m: m.add_module("rope", nn.Identity()),
        "unknown attributes ['gate']": lambda m: m.register_parameter("gate", nn.Parameter(torch.ones(1))),
        "unknown attributes ['causal']": lambda m: setattr(m, "causal", True),
        "unknown attributes ['forward']": lambda m: setattr(m, "forward", m.forward),
        "lacks ['in_proj_bias']": lambda m: delattr(m, "in_proj_bias"),
        "hooks": lambda m: m.register_forward_hook(lambda *_: None),
        "out_proj is a Identity": lambda m: setattr(m, "out_proj", nn.Identity()),
    }
    for message, change in changes.items():
        module = make()
        change(module)
        with pytest.raises(ValueError, match=re.escape(message)):
            split_attention(module)
    hooked = make()
    hooked.out_proj.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        split_attention(hooked)


def test_other_signature_is_refused(monkeypatch):
    module = OpenClip4(E, H)
    monkeypatch.setattr(OpenClip4, "forward", lambda self, query, key: query)
    with pytest.raises(ValueError, match=re.escape("open_clip.transformer.Attention(query, key)")):
        split_attention(module)
