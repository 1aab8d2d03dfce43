"""Linear projections as several libraries hold them: their shape, and their weight matrix to read and to write.

A weight may be stored transposed (transformers' Conv1D), sharded over processes (DTensor) or quantized (bitsandbytes).
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.errors import UserError
from fourier_moe.models.quantization import is_quantized


def projection_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear projection: torch's Linear and its quantized kin, or transformers' Conv1D.

    Raises:
        UserError: if the module is no linear projection.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes  # type: ignore[return-value]
    raise UserError(f"{type(module).__name__} is no linear projection; adapters replace torch.nn.Linear and its like")


def is_transposed(projection: nn.Module) -> bool:
    """Return whether the weight is stored as (in_features, out_features), as in transformers' Conv1D."""
    return isinstance(getattr(projection, "nf", None), int)


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's parameters or, if it has none, its buffers are."""
    return next(chain(module.parameters(), module.buffers())).device


def whole(tensor: Any) -> Tensor:
    """Return the tensor itself, gathered if it is sharded (DTensor): then all processes have to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weight_matrix(projection: nn.Module) -> Tensor:
    """W (out_features, in_features) in float32 or float64, without gradient; a view where nothing has to be converted."""
    weight = whole(projection.weight).detach()
    matrix = weight.T if is_transposed(projection) else weight
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


@torch.no_grad()
def set_weight_matrix(projection: nn.Module, matrix: Tensor) -> None:
    """Write W (out_features, in_features) into the weight, rounded to its dtype."""
    weight: Any = projection.weight
    weight.copy_(matrix.T if is_transposed(projection) else matrix)


def check_takes_update(projection: nn.Module) -> None:
    """Refuse a projection whose weight is no plain floating-point tensor.

    Raises:
        UserError: naming the reason.
    """
    weight: Any = projection.weight
    if is_quantized(projection) or not weight.is_floating_point() or type(weight.data) is not Tensor:
        kind = f"{type(projection).__name__} with a weight of {type(weight.data).__name__}, {weight.dtype}"
        raise UserError(
            f"the frozen projection is a {kind}: an update added to a quantized or sharded weight would be rounded away or has "
            "no place in it; load the pretrained model unquantized, in one process"
        )


@torch.no_grad()
def with_update(projection: nn.Module, update: Tensor, shift: Tensor | None = None) -> nn.Module:
    """Return a copy with `update` (out_features, in_features) added to the weight, `shift` (out_features,) to the bias.

    Both are rounded once to the dtype of the weight.

    Raises:
        UserError: if the weight is quantized or sharded, or there is a shift and no bias that takes it.
    """
    check_takes_update(projection)
    if shift is not None and projection.bias is None:  # one that the model's own library would not load again
        raise UserError(
            "the frozen projection has no bias, which an update with normalize_input='moments' needs to be merged; serve the "
            "model with its adapter"
        )
    merged: Any = copy.deepcopy(projection)
    if is_transposed(projection):
        update = update.T
    merged.weight = nn.Parameter((merged.weight.to(update.dtype) + update).to(merged.weight.dtype), requires_grad=False)
    if shift is not None:
        merged.bias = nn.Parameter((merged.bias.to(shift.dtype) + shift).to(merged.bias.dtype), requires_grad=False)
    return merged
