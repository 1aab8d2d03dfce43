"""A change to a model that fails half way leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """If the body raises, put back every module's children and attributes, and what was trainable. Tensors are not copied."""
    modules = [(module, dict(module.__dict__), dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception:
        for module, attributes, children in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
