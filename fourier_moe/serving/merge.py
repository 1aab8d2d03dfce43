"""Updates written into frozen weights: a model without adapters, whose routing, if there was any, is fixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from fourier_moe.adapter import Adapter
from fourier_moe.errors import UserError
from fourier_moe.models.projection import check_takes_update


def check_mergeable(adapters: Mapping[str, Adapter]) -> None:
    """Refuse what `merged` of one of the adapters will refuse, without computing anything.

    Raises:
        UserError: naming the projection.
    """
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
