"""Training loops that leave out what a method needs beside the model's forward pass are told so, once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fourier_moe.adapter import Adapter
from fourier_moe.routing.router import Router

_PATIENCE = 256  # forwards of one projection: more than the micro-batches of a step


class Reminder:
    """A forward pre-hook of adapters that warns when as many training forwards as `patience` have gone by unheeded.

    Not in evaluation, not without gradients, not where backward computes a checkpointed region again, not under torch.compile.
    """

    def __init__(self, text: str, patience: int) -> None:
        self.text, self.left = text, patience

    def __call__(self, adapter: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self.left and _trains(adapter):
            self.forward(adapter)

    def forward(self, adapter: nn.Module) -> None:
        """A training forward has begun."""
        self.miss()

    def miss(self) -> None:
        """One more has gone by."""
        self.left = max(0, self.left - 1)
        if not self.left:
            warnings.warn(self.text, stacklevel=2)

    def heed(self) -> None:
        """Nothing more to say."""
        self.left = 0


class BalanceReminder(Reminder):
    """Of the load-balancing loss: a forward outside of `recording` is a miss, and so is a recording whose loss nobody read."""

    def forward(self, adapter: Any) -> None:
        if not adapter.balance_weight:
            return
        recording = adapter.router.record.recording()
        if recording is None:
            self.miss()
        else:
            recording.on_unread = self.miss


def attach_reminders(model: nn.Module) -> None:
    """Let the adapters of a model remind of their load-balancing loss, their penalty and what they do after a step."""
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
    """The loop does what the reminder of this method is about."""
    if method in adapter.reminders:
        adapter.reminders[method].heed()


def _trains(adapter: nn.Module) -> bool:
    return (
        adapter.training
        and torch.is_grad_enabled()
        and torch._C._current_graph_task_id() == -1  # not inside of a backward pass
        and any(parameter.requires_grad for parameter in adapter.parameters())
    )
