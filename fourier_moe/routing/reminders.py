"""Warn a training loop, once, if it leaves out what a method needs besides the model's forward pass."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fourier_moe.adapter import Adapter
from fourier_moe.routing.router import Router

_PATIENCE = 256  # forwards of one projection: more than the micro-batches of a step


class Reminder:
    """A forward pre-hook of adapters that warns after `patience` training forwards without a call of `heed`.

    It counts neither in evaluation, nor without gradients, nor where backward computes a checkpointed region again, nor under
    torch.compile.

    Args:
        text: the warning.
        patience: number of forwards.
    """

    def __init__(self, text: str, patience: int) -> None:
        self.text, self.left = text, patience

    def __call__(self, adapter: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self.left and _trains(adapter):
            self.forward(adapter)

    def forward(self, adapter: nn.Module) -> None:
        """Handle the start of a training forward."""
        self.miss()

    def miss(self) -> None:
        """Count a forward, and warn at the last one."""
        self.left = max(0, self.left - 1)
        if not self.left:
            warnings.warn(self.text, stacklevel=2)

    def heed(self) -> None:
        """Never warn again."""
        self.left = 0


class BalanceReminder(Reminder):
    """Remind of the load-balancing loss: count forwards outside of `recording`, and recordings whose loss is not read."""

    def forward(self, adapter: Any) -> None:
        if not adapter.balance_weight:
            return
        recording = adapter.router.record.recording()
        if recording is None:
            self.miss()
        else:
            recording.on_unread = self.miss


def attach_reminders(model: nn.Module) -> None:
    """Attach reminders of the load-balancing loss, the penalty and the work after a step to the adapters of a model."""
    found = [module for module in model.modules() if isinstance(module, Adapter)]
    balanced = [adapter for adapter in found if getattr(adapter, "balance_weight", 0) and isinstance(adapter.router, Router)]
    reminder = BalanceReminder(
        "the adapters train without their load-balancing loss, so that few experts may get all tokens: the forward pass runs "
        "outside of `recording`, or balance_loss is not read in it. Add it:\n"
        "    with recording(model):\n"
        "        loss = compute_loss(model, batch) + balance_loss(model)\n"
        "or set balance_weight=0 in the config",
        patience=1,
    )
    for adapter in balanced:
        adapter.register_forward_pre_hook(reminder)
    for method, text in (
        ("regularization", "the adapters train without their penalty; add it to the loss: loss + regularization(model)"),
        ("after_step", "the adapters' own steps are left out; call after_step(model) after every optimizer.step()"),
    ):
        first = next((adapter for adapter in found if getattr(type(adapter), method) is not getattr(Adapter, method)), None)
        if first is not None:
            first.reminders[method] = Reminder(text, _PATIENCE)
            first.register_forward_pre_hook(first.reminders[method])


def heed(adapter: Adapter, method: str) -> None:
    """Silence the reminder of this method, because the loop calls it."""
    if method in adapter.reminders:
        adapter.reminders[method].heed()


def _trains(adapter: nn.Module) -> bool:
    return (
        adapter.training
        and torch.is_grad_enabled()
        and torch._C._current_graph_task_id() == -1  # not inside of a backward pass
        and any(parameter.requires_grad for parameter in adapter.parameters())
    )
