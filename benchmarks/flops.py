"""Floating-point operations of a training step: torch's counter, with formulas for what it does not know.

Torch counts matrix products and attention. Added here are transforms (5 n log2 n for n complex numbers, half of that for real
ones, as FFT libraries state their speed) and the routed spectral product. A complex multiplication is 6 operations, an addition
2. Nobody counts the elementwise work of the model (norms, activations, softmax) and of the optimizer.

A single expert is counted by its positions too, although the operator may compute it through its matrix.

Shape legend: T tokens, N in_features, M out_features, K active experts per token, P positions per expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fourier_moe.spectral.product  # noqa: F401  registers the operators

Shape = Sequence[int]


def real_transform(length: int) -> float:
    """Return the operations of a real FFT of `length`, or of its inverse."""
    return 2.5 * length * math.log2(length)


def product_forward_flops(T: int, N: int, M: int, K: int, P: int) -> int:
    """Two transforms and the final scale; each position: times c (6), times the gate (2), added up (2)."""
    return round(T * (real_transform(N) + real_transform(M) + M + 10 * K * P))


def product_backward_flops(T: int, N: int, M: int, K: int, P: int, needs: Sequence[bool]) -> int:
    """The gradient is transformed, then what `needs` (x, gates, coefficients) asks for.

    For gates or coefficients x is transformed and multiplied by the gradient (6 for each position). The gates then take the
    real part of another product and a sum (4), the coefficients the gate and a sum (4), x the same as the forward pass.
    """
    x, gates, coefficients = needs
    flops = real_transform(M)
    if gates or coefficients:
        flops += real_transform(N) + (6 + 4 * gates + 4 * coefficients) * K * P
    if x:
        flops += real_transform(N) + N + 10 * K * P
    return round(T * flops)


def _forward(
    x: Shape, gates: Shape, experts: Shape, coefficients: Shape, frequencies: Shape, M: int, *_: Any, **__: Any
) -> int:
    return product_forward_flops(x[0], x[1], M, gates[1], coefficients[1])


def _backward(
    grad: Shape, x: Shape, gates: Shape, experts: Shape, coefficients: Shape, frequencies: Shape, scale: float,
    needs: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    return product_backward_flops(x[0], x[1], grad[1], gates[1], coefficients[1], needs)


def _complex_transform(x: Shape, dim: Sequence[int], *_: Any, out_shape: Shape, **__: Any) -> int:
    return round(5 * math.prod(x) * sum(math.log2(x[d]) for d in dim))


def _real_to_complex(x: Shape, dim: Sequence[int], *_: Any, **__: Any) -> int:
    return round(2.5 * math.prod(x) * sum(math.log2(x[d]) for d in dim))


def _complex_to_real(x: Shape, dim: Sequence[int], *_: Any, out_shape: Shape, **__: Any) -> int:
    return round(2.5 * math.prod(out_shape) * sum(math.log2(out_shape[d]) for d in dim))


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.fourier_moe.routed_spectral_product: _forward,
    torch.ops.fourier_moe.routed_spectral_product_backward: _backward,
    torch.ops.aten._fft_c2c: _complex_transform,
    torch.ops.aten._fft_r2c: _real_to_complex,
    torch.ops.aten._fft_c2r: _complex_to_real,
}


def count_flops(work: Callable[[], Any]) -> int:
    """Return the floating-point operations of `work()`, which is run once."""
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        work()
    return counter.get_total_flops()
