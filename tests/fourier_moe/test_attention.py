"""fourier_moe.attention: a split module computes what the fused one did, and refuses what it would get wrong."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from open_clip import transformer as open_clip_transformer
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from fourier_moe.attention import FUSED_PROJECTIONS, is_fused_attention, split_attention

N, L, S, E, H = 2, 5, 7, 16, 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_same(actual, expected, dtype=torch.float32, **kwargs):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype], **kwargs)


def randomise(module):
    """Untrained biases, norms and head scales are zeros or ones, which would hide most mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def make_mha(dtype=torch.float64, **options):
    return randomise(nn.MultiheadAttention(E, H, dtype=dtype, **options))


def split_of(module):
    """The split of a copy, since a split module takes over out_proj and norms of its original."""
    return split_attention(copy.deepcopy(module))


def mask_of(kind, *shape, dtype=torch.float64):
    """A random mask that hides some keys of each query, never all."""
    if kind is None:
        return None
    if kind == "float":
        return torch.randn(shape, dtype=dtype)
    hidden = torch.rand(shape) < 0.5
    hidden[..., 0] = False
    hidden[..., 1] = True
    return hidden


def mha_inputs(layout, dtype=torch.float64, kdim=E, vdim=E):
    shapes = [(N, L, E), (N, S, kdim), (N, S, vdim)]
    if layout == "unbatched":
        shapes = [shape[1:] for shape in shapes]
    if layout == "sequence_first":
        shapes = [(shape[1], shape[0], shape[2]) for shape in shapes]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


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
    return randomise(nn.TransformerEncoderLayer(E, H, 32, batch_first=True, dtype=torch.float64, **options)).eval()


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


# open_clip's own Attention


class StandInForOpenClip4(nn.Module):
    """The interface of open_clip 4's Attention, as its callers see it, written naively: one query and head at a time."""

    def __init__(
        self, dim, num_heads=8, kdim=None, vdim=None, qkv_bias=True, qk_norm=False, scaled_cosine=False,
        scale_heads=False, inner_norm=False, attn_drop=0.0, proj_drop=0.0,
    ):  # fmt: skip
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, (dim // num_heads) ** -0.5
        self.scaled_cosine, self.scale_heads, self.logit_scale_max, self.use_sdpa = scaled_cosine, scale_heads, 4.6, True
        self.in_proj_weight = self.q_proj_weight = self.k_proj_weight = self.v_proj_weight = None
        if kdim is None and vdim is None:
            self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim))
        else:
            self.q_proj_weight = nn.Parameter(torch.randn(dim, dim))
            self.k_proj_weight = nn.Parameter(torch.randn(dim, kdim or dim))
            self.v_proj_weight = nn.Parameter(torch.randn(dim, vdim or dim))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * dim)) if qkv_bias else None
        self.logit_scale = nn.Parameter(torch.ones(num_heads, 1, 1)) if scaled_cosine else None
        self.head_scale = nn.Parameter(torch.randn(num_heads, 1, 1)) if scale_heads else None
        self.ln_q = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.ln_k = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.ln_inner = nn.LayerNorm(dim) if inner_norm else nn.Identity()
        self.attn_drop, self.out_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, k_x=None, v_x=None, attn_mask=None):
        k_x, v_x = x if k_x is None else k_x, x if v_x is None else v_x
        separate = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        w_q, w_k, w_v = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = torch.zeros(3, 1) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = x @ w_q.T + b_q, k_x @ w_k.T + b_k, v_x @ w_v.T + b_v
        mask = torch.zeros(1) if attn_mask is None else attn_mask
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -torch.inf)
        mask = mask.reshape(-1, *mask.shape[-2:]) if mask.dim() == 4 else mask
        mask = mask.expand(len(x) * self.num_heads, q.shape[1], k.shape[1])
        samples = []
        for n in range(len(x)):
            heads = []
            for h in range(self.num_heads):
                width = slice(h * self.head_dim, (h + 1) * self.head_dim)
                scores = self.ln_q(q[n, :, width]) @ self.ln_k(k[n, :, width]).T * self.scale
                head = self.attn_drop((scores + mask[n * self.num_heads + h]).softmax(-1)) @ v[n, :, width]
                heads.append(head if self.head_scale is None else head * self.head_scale[h])
            samples.append(torch.cat(heads, dim=-1))
        return self.out_drop(self.out_proj(self.ln_inner(torch.stack(samples))))


InstalledAttention = open_clip_transformer.Attention
if "k_x" in inspect.signature(InstalledAttention.forward).parameters:
    OpenClip3, OpenClip4 = None, InstalledAttention
else:
    StandInForOpenClip4.__module__, StandInForOpenClip4.__qualname__ = "open_clip.transformer", "Attention"
    OpenClip3, OpenClip4 = InstalledAttention, StandInForOpenClip4

needs_open_clip_3 = pytest.mark.skipif(OpenClip3 is None, reason="the installed open_clip has no Attention of version 3")
OPEN_CLIP_OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"scale_heads": True},
        {"inner_norm": True},
        {"qk_norm": True, "scale_heads": True, "inner_norm": True},
    ],
    ids=str,
)
OPEN_CLIP_MASKS = pytest.mark.parametrize("mask", [None, "bool 2-D", "float 2-D", "bool 3-D", "float 3-D", "float 4-D"])


def open_clip_mask(mask, source, dtype):
    kind, dimensions = mask.split() if mask else (None, "2-D")
    shapes = {"2-D": (L, source), "3-D": (N * H, L, source), "4-D": (N, H, L, source)}
    return mask_of(kind, *shapes[dimensions], dtype=dtype)


@DTYPES
@needs_open_clip_3
@OPEN_CLIP_OPTIONS
@OPEN_CLIP_MASKS
def test_open_clip_3(options, mask, dtype):
    norm = {"norm_layer": nn.LayerNorm}  # its default computes in float32
    module = randomise(OpenClip3(E, H, **options, **norm)).to(dtype)
    x, mask = torch.randn(N, L, E, dtype=dtype), open_clip_mask(mask, L, dtype)
    split = split_of(module)
    assert_same(split(x, attn_mask=mask), module(x, attn_mask=mask), dtype)
    assert_same(split(x, mask), module(x, mask), dtype)


@DTYPES
@OPEN_CLIP_OPTIONS
@OPEN_CLIP_MASKS
def test_open_clip_4(options, mask, dtype):
    module = randomise(OpenClip4(E, H, **options)).to(dtype)
    module.scale = 0.3
    split = split_of(module)
    x, k_x, v_x = mha_inputs("batch_first", dtype)
    self_mask, cross_mask = open_clip_mask(mask, L, dtype), open_clip_mask(mask, S, dtype)
    assert_same(split(x, attn_mask=self_mask), module(x, attn_mask=self_mask), dtype)
    assert_same(split(x, x.flip(1)), module(x, x.flip(1)), dtype)
    if OpenClip4 is StandInForOpenClip4 or "3-D" not in str(mask):  # open_clip reshapes 3-D masks to (N, H, L, L)
        expected = module(x, k_x=k_x, v_x=v_x, attn_mask=cross_mask)
        assert_same(split(x, k_x=k_x, v_x=v_x, attn_mask=cross_mask), expected, dtype)


@pytest.mark.parametrize("options", [{"kdim": 6}, {"vdim": 3, "qkv_bias": False}, {"kdim": 6, "vdim": 3}], ids=str)
def test_open_clip_4_with_separate_widths(options):
    module = randomise(OpenClip4(E, H, **options)).double()
    assert is_fused_attention(module)
    inputs = mha_inputs("batch_first", kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    assert_same(split_of(module)(*inputs), module(*inputs), torch.float64)


OPEN_CLIP_CLASSES = pytest.mark.parametrize(
    "attention", [pytest.param(OpenClip3, marks=needs_open_clip_3, id="3"), pytest.param(OpenClip4, id="4")]
)


@OPEN_CLIP_CLASSES
def test_open_clip_gradients_and_state(attention):
    options = {"qk_norm": True, "scale_heads": True, "inner_norm": True}
    module = randomise(attention(E, H, **options))
    split = split_of(module)
    x = torch.randn(N, L, E)
    for each in (module, split):
        each(x).square().sum().backward()
    fused = dict(module.named_parameters())
    parameters = dict(split.named_parameters())
    projections = [parameters.pop(f"{name}.weight") for name in ("q_proj", "k_proj", "v_proj")]
    biases = [parameters.pop(f"{name}.bias") for name in ("q_proj", "k_proj", "v_proj")]
    torch.testing.assert_close(torch.cat([p.grad for p in projections]), fused.pop("in_proj_weight").grad)
    torch.testing.assert_close(torch.cat([p.grad for p in biases]), fused.pop("in_proj_bias").grad, atol=1e-4, rtol=1e-4)
    assert parameters.keys() == fused.keys() >= {"head_scale", "ln_q.weight", "ln_inner.bias", "out_proj.weight"}
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, fused[name].grad, atol=1e-4, rtol=1e-4)


@OPEN_CLIP_CLASSES
@pytest.mark.parametrize("option", ["attn_drop", "proj_drop"])
def test_open_clip_dropout(attention, option):
    module = randomise(attention(E, H, **{option: 0.5}))
    split, x = split_of(module), torch.randn(N, L, E)
    assert not torch.allclose(split(x), split(x))
    if option == "proj_drop":
        torch.manual_seed(1)
        expected = module(x)
        torch.manual_seed(1)
        assert_same(split(x), expected)
    assert_same(split.eval()(x), module.eval()(x))


@OPEN_CLIP_CLASSES
def test_open_clip_scaled_cosine_is_refused(attention):
    with pytest.raises(ValueError, match="scaled_cosine"):
        split_attention(attention(E, H, scaled_cosine=True))


# Whole open_clip models


def split_all(model):
    """Replaces every fused attention; returns how many."""
    fused = [name for name, module in model.named_modules() if is_fused_attention(module)]
    for name in fused:
        model.set_submodule(name, split_attention(model.get_submodule(name)))
    return len(fused)


@pytest.mark.parametrize(
    ("vision", "text", "expected_splits"),
    [
        ({}, {}, 2 + 2),
        ({"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}, {}, 3 + 2),
        ({"qk_norm": True, "scale_heads": True, "scale_attn_inner": True}, {"block_type": "custom"}, 2 + 2),
    ],
    ids=["default", "attentional_pool", "custom"],
)
def test_open_clip_model(vision, text, expected_splits):
    vision_cfg = CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=4, image_size=8, **vision)
    text_cfg = CLIPTextCfg(context_length=6, vocab_size=20, width=32, heads=4, layers=2, **text)
    model = randomise(CLIP(24, vision_cfg, text_cfg)).eval()
    inputs = torch.randn(N, 3, 8, 8), torch.randint(20, (N, 6))
    expected, expected_without_grad = model(*inputs)[:2], torch.no_grad()(model)(*inputs)[:2]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert split_all(model) == expected_splits
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert not any("in_proj" in name for name in model.state_dict())
    assert_same(model(*inputs)[:2], expected)
    assert_same(torch.no_grad()(model)(*inputs)[:2], expected_without_grad)
    model.get_submodule("visual.transformer.resblocks.0.attn.v_proj").weight.data.mul_(2)
    assert not torch.allclose(model(*inputs)[0], expected[0], atol=1e-3)


# What is recognised, and what is refused


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
