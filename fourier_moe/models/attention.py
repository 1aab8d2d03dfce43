"""Fused attention modules, split into one nn.Linear per projection; `fused_linear` has the simplest kind.

`nn.MultiheadAttention` and open_clip's `Attention` keep the query, key and value projections in one parameter,
`in_proj_weight`, and the first reads `out_proj.weight` without calling `out_proj`: an adapter finds nothing to
replace, or is bypassed. `split_attention` returns a drop-in module that calls all four projections as modules, always
on tensors of shape (N, tokens, features), whatever layout the caller uses.

Shapes: N batch, L query tokens, S key tokens, E = H * D embedding width, H heads, D head width.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fourier_moe.errors import UserError
from fourier_moe.models.fused_linear import PARTS, SplitLinear, side_by_side

FUSED_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _FusedWeightIsGone:
    """What a parent finds under `in_proj_weight` of a split `nn.MultiheadAttention`.

    In eval mode nn.TransformerEncoder would hand the weight to a fused kernel, past any adapter. It calls its layers
    instead when a weight overrides torch functions, as this object does. Any other use as a tensor is an error.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UserError("in_proj_weight is gone after split_attention: use q_proj.weight, k_proj.weight, v_proj.weight")


class _SplitAttention(nn.Module):
    """The four projections of a fused attention module: `out_proj` is reused, the others are copied."""

    replaces: ClassVar[tuple[str, str]]  # module and name of the class that this one stands in for
    attributes: ClassVar[str]  # all public attributes of the original, that is, the options we know about
    refuses: ClassVar[dict[str, Callable[[Any], bool]]]  # option -> is it switched on in this module?

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, module: Any):
        super().__init__()
        self.num_heads: int = module.num_heads
        self.head_dim: int = module.head_dim
        weights, biases = _input_projections(module, self.num_heads * self.head_dim)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(module.out_proj.weight, module.out_proj.bias)
        self.train(module.training)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Project (N, L, E), (N, S, kdim), (N, S, vdim) to (N, H, L, D), (N, H, S, D), (N, H, S, D)."""
        shapes = [tuple(x.shape) for x in (query, key, value)]
        same_batch = query.shape[:1] == key.shape[:1] and key.shape[:2] == value.shape[:2]
        if not same_batch or any(len(shape) != 3 for shape in shapes):
            raise UserError(
                "query, key and value must be (batch, tokens, features) with one batch size, and as many values as "
                f"keys; batch first they have the shapes {shapes}"
            )
        projected = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected]


class SplitMultiheadAttention(_SplitAttention):
    """Stands in for `nn.MultiheadAttention`."""

    replaces = ("torch.nn.modules.activation", "MultiheadAttention")
    attributes = (
        "embed_dim kdim vdim num_heads head_dim dropout batch_first add_zero_attn bias_k bias_v "
        "in_proj_weight in_proj_bias q_proj_weight k_proj_weight v_proj_weight out_proj"
    )
    refuses: ClassVar = {"add_bias_kv": lambda m: m.bias_k is not None, "add_zero_attn": lambda m: m.add_zero_attn}

    # nn.TransformerEncoderLayer and nn.TransformerEncoder read these before they choose a fused kernel. Any one of the
    # values keeps the layer to calling this module; an encoder that was built before the split goes by the first only.
    in_proj_weight = _FusedWeightIsGone()
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, module: nn.MultiheadAttention):
        super().__init__(module)
        self.embed_dim, self.batch_first, self.dropout = module.embed_dim, module.batch_first, module.dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Same arguments and results as `nn.MultiheadAttention.forward`; True in a bool mask hides a key.

        Args:
            query: (N, L, E) with `batch_first`, else (L, N, E); unbatched (L, E).
            key: (N, S, kdim), (S, N, kdim) or (S, kdim).
            value: (N, S, vdim), (S, N, vdim) or (S, vdim).
            key_padding_mask: bool or float, (N, S) or (S,).
            need_weights: also return the attention weights, which rules out fused attention kernels.
            attn_mask: bool or float, (L, S) or (N * H, L, S).
            average_attn_weights: return weights of shape (N, L, S) rather than (N, H, L, S).
            is_causal: promises that `attn_mask` is the causal mask, so that a faster kernel may replace it.

        Returns:
            The output in the layout of `query`, and the weights or None.

        Raises:
            UserError: on shapes or mask types that do not fit, on nested tensors, and on `is_causal` without mask.
        """
        if query.is_nested:
            raise UserError("split attention does not take nested tensors: pass padded tensors and key_padding_mask")
        if is_causal and attn_mask is None:
            raise UserError("is_causal=True needs attn_mask, as in nn.MultiheadAttention; got attn_mask=None")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        q, k, v = self._project(query, key, value)
        causal_kernel = is_causal and key_padding_mask is None and not need_weights
        mask = None if attn_mask is None or causal_kernel else _score_mask(attn_mask, q, k)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, "key_padding_mask", k.dtype, key.shape[:2])[:, None, None, :]
            mask = padding if mask is None else mask + padding

        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            output = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal_kernel)
        output = self.out_proj(output.transpose(1, 2).flatten(2))

        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights


class SplitOpenClipAttention(_SplitAttention):
    """Stands in for the `Attention` of open_clip 4, for self and cross attention."""

    replaces = ("open_clip.transformer", "Attention")
    attributes = (
        "num_heads head_dim scale scaled_cosine scale_heads logit_scale logit_scale_max head_scale use_sdpa ln_q ln_k "
        "in_proj_weight in_proj_bias q_proj_weight k_proj_weight v_proj_weight attn_drop ln_inner out_proj out_drop"
    )
    refuses: ClassVar = {"scaled_cosine": lambda m: m.scaled_cosine or m.logit_scale is not None}

    def __init__(self, module: Any):
        super().__init__(module)
        self.scale: float = module.scale
        self.ln_q, self.ln_k, self.ln_inner = module.ln_q, module.ln_k, module.ln_inner
        self.attn_drop, self.out_drop = module.attn_drop, module.out_drop
        self.head_scale: Tensor | None = module.head_scale

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Attend from `x` to `k_x` and `v_x`.

        Args:
            x: (N, L, E).
            k_x: (N, S, kdim); `x` when None.
            v_x: (N, S, vdim); `x` when None.
            attn_mask: (L, S), (N * H, L, S) or (N, H, L, S); bool, where True SHOWS a key (open_clip 3: hides), or
                float to be added to the scores.

        Returns:
            The output, (N, L, E).

        Raises:
            UserError: on shapes or mask types that do not fit.
        """
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        return self._attend(x, x if k_x is None else k_x, x if v_x is None else v_x, attn_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        q, k, v = self._project(query, key, value)
        mask = None if attn_mask is None else _score_mask(attn_mask, q, k)
        dropout = self.attn_drop.p if self.training else 0.0
        output = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, mask, dropout, scale=self.scale)
        if self.head_scale is not None:
            output = output * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(output.transpose(1, 2).flatten(2))))


class SplitOpenClipSelfAttention(SplitOpenClipAttention):
    """Stands in for the `Attention` of open_clip 3, which has self attention only."""

    attributes = (
        "num_heads head_dim scale scaled_cosine scale_heads logit_scale logit_scale_max head_scale use_fsdpa ln_q ln_k "
        "in_proj_weight in_proj_bias attn_drop ln_inner out_proj out_drop"
    )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Attend from `x` (N, L, E) to itself. True in a bool mask HIDES a key; otherwise as in the base class."""
        return self._attend(x, x, x, attn_mask)


_KINDS: tuple[type[_SplitAttention], ...] = (
    SplitMultiheadAttention,
    SplitOpenClipAttention,
    SplitOpenClipSelfAttention,
)


def is_fused_attention(module: nn.Module) -> bool:
    """Return whether `module` holds its input projections as bare parameters, which an adapter cannot replace.

    True for every module with a tensor `in_proj_weight`, so that kinds which `split_attention` refuses show up too.
    """
    has_fused_weight = isinstance(getattr(module, "in_proj_weight", None), Tensor)
    return has_fused_weight or isinstance(module, nn.MultiheadAttention) or _kind(module) is not None


def fused_modules(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return what `split_attention` is for, by name: the projections that a split gives. A shared module has all its names."""
    names = [name for name, module in model.named_modules(remove_duplicate=False) if name and is_fused_attention(module)]
    return {**dict.fromkeys(names, FUSED_PROJECTIONS), **dict.fromkeys(side_by_side(model), PARTS)}


def fused_projection(module: Any, name: str) -> nn.Linear:
    """Return the projection of this name that a split would give, on the meta device.

    Raises:
        UserError: if the kind of attention is unknown.
    """
    if type(module) is nn.Linear:
        return nn.Linear(module.in_features, module.out_features // 3, device="meta")
    if _kind(module) is None:
        raise UserError(f"{type(module).__name__} is not an attention module that can be split")
    if name == "out_proj":
        weight = module.out_proj.weight
    elif module.in_proj_weight is not None:
        weight = module.in_proj_weight[: len(module.in_proj_weight) // 3]
    else:
        weight = getattr(module, f"{name}_weight")
    return nn.Linear(weight.shape[1], weight.shape[0], device="meta")


def is_split_attention(module: nn.Module) -> bool:
    """Return whether `module` came out of `split_attention`."""
    return isinstance(module, (_SplitAttention, SplitLinear))


def fuse_attention(split: nn.Module, fused: nn.Module) -> None:
    """Copy the weights of a split attention back into the fused module that it was made from, or one of the same kind.

    Raises:
        UserError: if the two do not belong together.
    """
    if isinstance(split, SplitLinear) and type(fused) is nn.Linear:
        split.copy_to(fused)
        return
    if not isinstance(split, _SplitAttention) or _kind(fused) is not type(split):
        raise UserError(f"a {type(split).__name__} is no split {type(fused).__name__}")
    projections = [split.q_proj, split.k_proj, split.v_proj]
    if fused.in_proj_weight is not None:
        fused.in_proj_weight = _joined([projection.weight for projection in projections])
    else:
        for name, projection in zip("qkv", projections, strict=True):
            setattr(fused, f"{name}_proj_weight", nn.Parameter(projection.weight.detach(), False))
    if fused.in_proj_bias is not None:
        fused.in_proj_bias = _joined([projection.bias for projection in projections])
    fused.out_proj.weight, fused.out_proj.bias = split.out_proj.weight, split.out_proj.bias  # type: ignore[union-attr]


def _joined(parts: list[Any]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), False)


def split_attention(module: nn.Module) -> nn.Module:
    """Return a drop-in for a fused attention module, with `FUSED_PROJECTIONS` as plain nn.Linear children.

    Call signature, results, device, dtype, training flag and `requires_grad` are those of `module`. The state dict
    has `q_proj.weight` and so on in place of `in_proj_weight`, so load pretrained weights before the split. The new
    module takes over `out_proj`'s parameters and the norms of `module`, which should not be used any more.

    Args:
        module: an `nn.MultiheadAttention` or `open_clip.transformer.Attention`, not of a subclass; or an nn.Linear that
            computes query, key and value side by side, which becomes a `SplitLinear`.

    Returns:
        The split module; put it where `module` was.

    Raises:
        UserError: if the class is none of these, or has an option, attribute or hook that the split would lose.
    """
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if type(module) is nn.Linear and module.out_features % len(PARTS) == 0:
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise UserError(f"cannot split {name}: the split would lose its hooks, so register them afterwards")
        return SplitLinear(module)
    kind = _kind(module)
    if kind is None:
        supported = "; ".join(f"{'.'.join(kind.replaces)}({', '.join(_arguments(kind))})" for kind in _KINDS)
        raise UserError(
            f"cannot split attention of class {name}({', '.join(_arguments(type(module)))}). Supported, without "
            f"subclasses: {supported}. Rewrite it with {', '.join(FUSED_PROJECTIONS)} as nn.Linear, or leave it out of "
            "the target modules."
        )
    plain = {attribute for attribute in vars(module) if not attribute.startswith("_") and attribute != "training"}
    found = plain | module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    expected = set(kind.attributes.split())
    if found != expected:
        raise UserError(
            f"cannot split {name}: it has unknown attributes {sorted(found - expected)} and lacks "
            f"{sorted(expected - found)}. Remove what was added to the module, or use a library version known here."
        )
    refused = [option for option, is_on in kind.refuses.items() if is_on(module)]
    if refused:
        raise UserError(f"cannot split {name} with {', '.join(refused)}: switch it off, or choose other target modules")
    out_proj = module.out_proj
    if type(out_proj) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        raise UserError(f"cannot split {name}: out_proj is a {type(out_proj).__qualname__}, expected an nn.Linear")
    if any(getattr(owner, hooks) for owner in (module, out_proj) for hooks in _HOOKS):
        raise UserError(f"cannot split {name}: the split would lose its hooks, so register them afterwards")
    return kind(module)


def _arguments(cls: type) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


def _kind(module: nn.Module) -> type[_SplitAttention] | None:
    """Return the split class for `module`: made for a class of this name, and with a signature that begins alike."""
    cls = type(module)
    for kind in _KINDS:
        ours = _arguments(kind)
        if kind.replaces == (cls.__module__, cls.__qualname__) and _arguments(cls)[: len(ours)] == ours:
            return kind
    return None


def _input_projections(module: Any, width: int) -> tuple[list[nn.Parameter], list[nn.Parameter | None]]:
    """Return the weights and biases of q, k and v. Parts of fused parameters are copies that share no memory."""

    def split(fused: nn.Parameter) -> list[nn.Parameter]:
        assert fused.shape[0] == 3 * width
        return [nn.Parameter(part.detach().clone(), fused.requires_grad) for part in fused.split(width)]

    if module.in_proj_weight is not None:
        weights = split(module.in_proj_weight)
    else:  # kdim or vdim differ from the width
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    return weights, [None] * 3 if module.in_proj_bias is None else [*split(module.in_proj_bias)]


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Return an nn.Linear around existing parameters; built on meta, so that it neither allocates nor draws random numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear


def _score_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return `attn_mask` for q (N, H, L, D) and k (N, H, S, D), as an additive mask that broadcasts to (N, H, L, S)."""
    (n, h, length, _), source = q.shape, k.shape[2]
    mask = _additive(mask, "attn_mask", q.dtype, (length, source), (n * h, length, source), (n, h, length, source))
    return mask.unflatten(0, (n, h)) if mask.dim() == 3 else mask


def _additive(mask: Tensor, name: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor:
    """Return a bool (True hides a key) or float mask of one of the `shapes`, as a `dtype` mask to add to the scores."""
    if mask.shape not in shapes or not (mask.dtype == torch.bool or mask.is_floating_point()):
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise UserError(f"{name} has shape {tuple(mask.shape)} and {mask.dtype}, expected {expected}, bool or float")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
