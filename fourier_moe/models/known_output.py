"""KnownOutput: lets an adapter that calls its projection find what the projection has computed before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn


class KnownOutput(nn.Module):
    """Stands in for the frozen projection inside its adapters: returns what that has computed, and has all its attributes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple: no child, or the weight would be in the model once per adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._base[0], name)

    def forward(self, x: Tensor) -> Tensor:
        output = _KNOWN_OUTPUT.get()
        assert output is not None
        assert output.shape[:-1] == x.shape[:-1]
        return output


# What the frozen projection has computed for the adapter that is running in this thread.
_KNOWN_OUTPUT: ContextVar[Tensor | None] = ContextVar("fourier_moe_known_output", default=None)


@contextmanager
def known_output(y: Tensor) -> Iterator[None]:
    """While open, every KnownOutput of this thread or task returns y."""
    token = _KNOWN_OUTPUT.set(y)
    try:
        yield
    finally:
        _KNOWN_OUTPUT.reset(token)
