"""Fused attention to split, random and small, and what both files of its tests measure it with."""

import copy
import inspect

import pytest
import torch
from open_clip import transformer as open_clip_transformer
from torch import nn

from fourier_moe.models.attention import split_attention

N, L, S, E, H = 2, 5, 7, 16, 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def assert_same(actual, expected, dtype=torch.float32, **kwargs):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype], **kwargs)


def randomize(module):
    """Untrained biases, norms and head scales are zeros or ones, which would hide most mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def make_mha(dtype=torch.float64, **options):
    return randomize(nn.MultiheadAttention(E, H, dtype=dtype, **options))


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
