"""Updates written into frozen weights: a model without adapters, whose routing, if there was any, is fixed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fourier_moe.errors import UserError
from fourier_moe.models.quantization import is_quantized

if TYPE_CHECKING:
    from fourier_moe.adapter import Adapter


def check_takes_update(base: nn.Module) -> None:
    """Refuse a projection whose weight is no plain floating-point tensor.

    Raises:
        UserError: naming the reason.
    """
    weight: Any = base.weight
    if is_quantized(base) or not weight.is_floating_point() or type(weight.data) is not Tensor:
        kind = f"{type(base).__name__} with a weight of {type(weight.data).__name__}, {weight.dtype}"
        raise UserError(
            f"the frozen projection is a {kind}: an update added to a quantised or sharded weight would be rounded away or has "
            "no place in it; load the pretrained model unquantised, in one process"
        )


@torch.no_grad()
def with_update(base: nn.Module, update: Tensor) -> nn.Module:
    """A copy of a projection with `update` (out_features, in_features) added to its weight, rounded once to the weight's dtype.

    Raises:
        UserError: if the weight is quantised or sharded.
    """
    check_takes_update(base)
    merged: Any = copy.deepcopy(base)
    if hasattr(base, "nf"):  # transformers' Conv1D holds its weight as (in, out)
        update = update.T
    merged.weight = nn.Parameter((merged.weight.to(update.dtype) + update).to(merged.weight.dtype), requires_grad=False)
    return merged


def check_mergeable(adapters: Mapping[str, Adapter]) -> None:
    """Refuse what `merged` of one of the adapters will refuse, without computing anything.

    Raises:
        UserError: naming the projection.
    """
    from fourier_moe.adapter import Adapter

    for name, adapter in adapters.items():
        try:
            if type(adapter).merged is Adapter.merged:
                adapter.merged()
            check_takes_update(adapter.base)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error


def merge_adapters(adapters: Mapping[str, Adapter], gates: Mapping[str, Tensor]) -> dict[nn.Module, nn.Module]:
    """The merged projection of every adapter; for `swapped` or `swap`.

    Args:
        gates: of the projections that route, (E,) by name.
    """
    return {adapter: adapter.merged(gates.get(name)) for name, adapter in adapters.items()}


def swap(model: nn.Module, modules: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever in `model` these stand."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in modules:
                parent._modules[name] = modules[child]


@contextmanager
def swapped(model: nn.Module, modules: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """The same until the body ends."""
    swap(model, modules)
    try:
        yield
    finally:
        swap(model, {new: old for old, new in modules.items()})
