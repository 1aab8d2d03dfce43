"""Changes to a model that are taken back, or made to a copy of its structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores every module's children and attributes, and what was trainable, without copies."""
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


def structure_copy(model: nn.Module, instead: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """Return new modules around the same tensors: what is adapted in the copy leaves the model as it is.

    Args:
        instead: modules to copy in the place of others of the model.
    """
    instead, fields, copies = instead or {}, vars(nn.Module()), dict[nn.Module, nn.Module]()

    def copied(module: nn.Module) -> nn.Module:
        module = instead.get(module, module)
        if module not in copies:
            new = copies[module] = module.__new__(type(module))
            new.__dict__.update({key: copy.copy(value) if key in fields else value for key, value in vars(module).items()})
            new._modules.update({name: child and copied(child) for name, child in module._modules.items()})
        return copies[module]

    return copied(model)
