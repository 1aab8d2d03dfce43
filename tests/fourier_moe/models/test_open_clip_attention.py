"""fourier_moe.models.attention on open_clip's Attention, and on whole models of it."""

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from support.attention_modules import (
    DTYPES,
    E,
    H,
    L,
    N,
    OpenClip3,
    OpenClip4,
    S,
    StandInForOpenClip4,
    assert_same,
    mask_of,
    mha_inputs,
    randomize,
    split_of,
)
from torch import nn

from fourier_moe.models.attention import is_fused_attention, split_attention


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
    module = randomize(OpenClip3(E, H, **options, **norm)).to(dtype)
    x, mask = torch.randn(N, L, E, dtype=dtype), open_clip_mask(mask, L, dtype)
    split = split_of(module)
    assert_same(split(x, attn_mask=mask), module(x, attn_mask=mask), dtype)
    assert_same(split(x, mask), module(x, mask), dtype)


@DTYPES
@OPEN_CLIP_OPTIONS
@OPEN_CLIP_MASKS
def test_open_clip_4(options, mask, dtype):
    module = randomize(OpenClip4(E, H, **options)).to(dtype)
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
    module = randomize(OpenClip4(E, H, **options)).double()
    assert is_fused_attention(module)
    inputs = mha_inputs("batch_first", kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    assert_same(split_of(module)(*inputs), module(*inputs), torch.float64)


OPEN_CLIP_CLASSES = pytest.mark.parametrize(
    "attention", [pytest.param(OpenClip3, marks=needs_open_clip_3, id="3"), pytest.param(OpenClip4, id="4")]
)


@OPEN_CLIP_CLASSES
def test_open_clip_gradients_and_state(attention):
    options = {"qk_norm": True, "scale_heads": True, "inner_norm": True}
    module = randomize(attention(E, H, **options))
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
    module = randomize(attention(E, H, **{option: 0.5}))
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
    model = randomize(CLIP(24, vision_cfg, text_cfg)).eval()
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
