"""Merging: the updates of a method without routing go into the frozen weights, and no adapter is left."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fourier_moe.adapter import adapters
from fourier_moe.errors import UserError


def merge_adapters(model: nn.Module) -> None:
    """Replace every adapter by its projection with the update in the weight; the model computes the same up to rounding.

    Raises:
        UserError: naming the projection, if its method routes tokens or has no merge, or if its weight cannot take an update.
            The model stays as it was.
    """
    merged: dict[nn.Module, nn.Module] = {}
    for name, adapter in adapters(model).items():
        try:
            merged[adapter] = adapter.merged()
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    swap(model, merged)


def swap(model: nn.Module, modules: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules by others at every place in `model`."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in modules:
                parent._modules[name] = modules[child]
