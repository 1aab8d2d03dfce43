"""The product with a router's matrix, in float32 whatever the input and autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def logits(x: Tensor, weight_EN: Tensor) -> Tensor:
    """R x (..., E) in float32 (float64 for a float64 R), autocast or not."""
    return _Logits.apply(x, weight_EN.to(torch.promote_types(weight_EN.dtype, torch.float32)))


class _Logits(torch.autograd.Function):
    """R x in the dtype of R, autocast or not.

    Saved for the backward pass is x as it came. Left to itself autograd would keep the float32 copy of a half-precision x that
    the matrix product reads, another one for every projection.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_EN: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_EN)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(weight_EN.dtype), weight_EN)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_EN = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            grad_TE, x_TN = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (grad, x))
            grad_x = (grad @ weight_EN).to(x.dtype) if needs_x else None
            grad_weight_EN = grad_TE.T @ x_TN.to(grad.dtype) if needs_weight else None
        return grad_x, grad_weight_EN
