"""What the callbacks read of a LightningModule: AdaptationModule, or a user's own with an adapted model inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fourier_moe.errors import UserError
from fourier_moe.inject import is_adapted
from fourier_moe.integrations.loss_hook import token_mask
from lightning_modules.adaptation import AdaptationModule


def adapted_model(pl_module: L.LightningModule, callback: L.Callback) -> nn.Module:
    """Return the model inside `pl_module` that `inject` has adapted.

    Raises:
        UserError: if there is none, or more than one.
    """
    found = {name: module for name, module in pl_module.named_modules() if is_adapted(module)}
    # torch.compile's wrapper has the attributes of the model that it wraps
    models = {n: m for n, m in found.items() if not any(is_adapted(inner) for inner in m.modules() if inner is not m)}
    kinds = type(callback).__name__, type(pl_module).__name__
    if not models:
        raise UserError(f"{kinds[0]}: {kinds[1]} has no adapted model; call inject(model, config) in its __init__")
    if len(models) > 1:
        raise UserError(f"{kinds[0]}: {kinds[1]} has {len(models)} adapted models, {', '.join(models)}, and must have one")
    return next(iter(models.values()))


def adaptation_module(pl_module: L.LightningModule, callback: L.Callback) -> AdaptationModule:
    """Return `pl_module` itself, for a callback that needs its task.

    Raises:
        UserError: if it is a module of another class.
    """
    if not isinstance(pl_module, AdaptationModule):
        raise UserError(
            f"{type(callback).__name__} needs the task of an AdaptationModule, and {type(pl_module).__name__} is none; remove "
            "the callback from the Trainer"
        )
    return pl_module


def num_examples(batch: Any) -> int:
    """Return the number of examples in a batch: of its `id`, else the length of its first tensor; 1 if it has neither."""
    if isinstance(batch, Mapping) and "id" in batch:
        return len(batch["id"])
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    return next((len(tensor) for tensor in tensors), 1)


def real_tokens(pl_module: L.LightningModule, batch: Any) -> Tensor | None:
    """Return true for real tokens (B, L), as the task or the batch's `attention_mask` tells; None if neither does."""
    if isinstance(pl_module, AdaptationModule):
        return pl_module.task.token_mask(batch)
    return token_mask(batch) if isinstance(batch, Mapping) else None
