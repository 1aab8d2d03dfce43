"""UnusedAdapters: report adapted projections that training does not reach."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from fourier_moe import adapters
from fourier_moe.errors import UserError, shorten
from fourier_moe.inject import without_gradient


class UnusedAdapters(L.Callback):
    """Stop a run if no adapter has a gradient in the first step, and name those that have none in the first epoch.

    A model may skip some of them in a step by design (LayerDrop, a branch that a batch does not take), but not in all steps.
    """

    def __init__(self) -> None:
        self._unused: set[str] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unused = {
            name
            for name, adapter in adapters(pl_module).items()
            if any(parameter.requires_grad for group in adapter.parameter_groups().values() for parameter in group)
        }
        self._all = frozenset(self._unused)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if not self._unused:
            return
        self._unused &= set(without_gradient(pl_module))
        if self._unused == self._all:
            raise UserError(
                f"no adapter has a gradient after the first backward pass: the model did not call {_some(self._unused)}; "
                "choose targets that its forward pass uses"
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._unused:
            rank_zero_warn(
                f"{len(self._unused)} of {len(self._all)} adapters had no gradient in a whole epoch: the model does not call "
                f"{_some(self._unused)}; leave them out of targets"
            )
        self._unused = set()


def _some(names: set[str]) -> str:
    return shorten(name.removeprefix("task.model.") for name in sorted(names))
