"""The product with a router's matrix, in float32 whatever the input and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.routing.forward_mode import has_tangent, in_transform


def logits(x: Tensor, weight_EN: Tensor) -> Tensor:
    """R x (..., E) in float32 (float64 for a float64 R), autocast or not."""
    weight_EN = weight_EN.to(torch.promote_types(weight_EN.dtype, torch.float32))
    if has_tangent(x, weight_EN):  # torch.compile takes no Function with a jvp of its own
        return _product(x, weight_EN)
    # A Function that torch.func takes costs several times as much to call, at every projection.
    return (_TransformedLogits if in_transform() else _Logits).apply(x, weight_EN)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast in the body. A device that has none, such as meta, needs no context and refuses to make one."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


# torch.compile of 2.11 cannot look inside.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _product(x: Tensor, weight_EN: Tensor) -> Tensor:
    with without_autocast(x.device):
        return nn.functional.linear(x.to(weight_EN.dtype), weight_EN)


class _Logits(torch.autograd.Function):
    """R x in the dtype of R, autocast or not.

    Saved for the backward pass is x as it came. Left to itself autograd would keep the float32 copy of a half-precision x that
    the matrix product reads, another one for every projection.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_EN: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_EN)
        return _product(x, weight_EN)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_EN = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        with without_autocast(x.device):
            grad_TE, x_TN = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (grad, x))
            grad_x = (grad @ weight_EN).to(x.dtype) if needs_x else None
            grad_weight_EN = grad_TE.T @ x_TN.to(grad.dtype) if needs_weight else None
        return grad_x, grad_weight_EN


class _TransformedLogits(torch.autograd.Function):
    """The same for torch.func, which wants the context set up apart from the forward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight_EN: Tensor) -> Tensor:
        return _product(x, weight_EN)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    backward = staticmethod(_Logits.backward)
