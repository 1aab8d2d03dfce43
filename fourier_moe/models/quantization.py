"""Quantized weights: integers that stand for a frozen model's numbers (bitsandbytes' int8, and nf4 with two numbers in a byte).

A projection that holds them can be called and passes gradients on, but its weight can neither be read as numbers nor trained.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Return whether some weight in `module` is quantized."""
    return any(not p.is_floating_point() or _packed_shape(p) is not None for p in module.parameters())


def num_scalars(parameter: Tensor) -> int:
    """Return how many of the model's numbers a parameter holds, however they are packed."""
    shape = _packed_shape(parameter)
    return parameter.numel() if shape is None else math.prod(shape)


def _packed_shape(parameter: Tensor) -> tuple[int, ...] | None:
    """Return the weight's own shape where bitsandbytes packed it in 4 bits, whatever dtype it packed them into."""
    state = getattr(parameter, "quant_state", None)
    return None if state is None else tuple(state.shape)
