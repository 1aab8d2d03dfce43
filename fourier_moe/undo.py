"""A change to a model that is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that puts back every module's children and attributes, and what was trainable. Tensors are not copied."""
    modules = [(module, dict(module.__dict__), dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        for module, attributes, children in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    return put_back


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """If the body raises, leave the model as it was."""
    put_back = snapshot(model)
    try:
        yield
    except Exception:
        put_back()
        raise
