"""The blocks of a transformer, the units of sharding, of activation checkpointing and of compilation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fourier_moe import Adapter
from fourier_moe.errors import UserError, shorten


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost nn.ModuleList or nn.Sequential around each adapter, in the model's order.

    For a model without adapters (head only), return those of its largest list; for a model without lists, none.
    """
    lists: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList | nn.Sequential) and name and not inside:
            lists[name] = module
    adapted = [one for one in lists.values() if any(isinstance(module, Adapter) for module in one.modules())]
    if not adapted and lists:
        adapted = [max(lists.values(), key=lambda one: sum(parameter.numel() for parameter in one.parameters()))]
    return [block for one in adapted for block in one.children() if any(True for _ in block.parameters())]


def checkpoint_activations(model: nn.Module) -> None:
    """Let every block keep only its input, and recompute the rest in the backward pass.

    Checkpointing is non-reentrant, since the reentrant kind runs the first forward without gradients, and the routers' balance
    loss would have none. Names of modules and parameters do not change.

    Raises:
        UserError: if the model has no blocks.
    """
    for block in _require_blocks(model, "activation_checkpointing=True recomputes"):
        block.forward = partial(_recompute, block, block.forward)


def _require_blocks(model: nn.Module, what: str) -> list[nn.Module]:
    blocks = transformer_blocks(model)
    if not blocks:
        raise UserError(f"{what} transformer blocks, and {type(model).__name__} has no list of them; set it to false")
    return blocks


def _recompute(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Recompute in training only: an evaluation has no backward pass, and may fill a cache, which must happen once."""
    if block.training and torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def check_backend(backend: str, device: torch.device) -> None:
    """Compile a line for the device, so that a backend that cannot work is refused before anything is loaded.

    Raises:
        UserError: if there is no such backend, or it does not work on this machine (inductor without a compiler).
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f"compile={backend!r} must be true, false, or a backend of torch.compile: {', '.join(known)}")
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2, device=device))
    except Exception as error:
        raise UserError(f"compile={backend!r} does not work here: {shorten(str(error).splitlines()[:3])}") from error


def compile_blocks(model: nn.Module, backend: str) -> None:
    """Compile every block for training. Names of modules and parameters do not change; evaluation stays as it is.

    Args:
        backend: of torch.compile.

    Raises:
        UserError: if the model has no blocks.
    """
    for block in _require_blocks(model, "compile=True compiles"):
        block.forward = partial(_compiled_in_training, block, block.forward, _compile_alone(block.forward, backend))


def _compile_alone(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Compile a block as code of its own: blocks share no graph, as routers record by block, and torch keeps 8 of one code."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # equal, and another object
    return torch.compile(call, backend=backend)


def _compiled_in_training(
    block: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Compile training only: a generation has caches that grow by a token, and would be compiled again and again."""
    return (compiled if block.training and torch.is_grad_enabled() else plain)(*args, **kwargs)
