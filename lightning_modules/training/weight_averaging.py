"""Weight averaging: Lightning's WeightAveraging callbacks, applied to the trained weights only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from fourier_moe.errors import UserError


class WeightAverage(L.Callback):
    """Average the trained weights; validate, write and end with the average. Replaces a WeightAveraging callback.

    Lightning's own copies the whole module, frozen weights included, before the strategy has built it, and uses the average in
    validation and checkpoints only. As in Lightning, checkpoints have the average as their weights; the current weights are the
    state of this callback, so a resumed run continues with both, to the bit. The average is over parameters and, with
    `use_buffers`, over batch statistics of trained layers; all other buffers are those of the current model.

    Args:
        rule: when and how to average; only its arguments and `should_update` are used.

    Raises:
        UserError: if `rule` overrides other methods.
    """

    def __init__(self, rule: WeightAveraging) -> None:
        own = {name for cls in type(rule).__mro__ if cls not in WeightAveraging.__mro__ for name in vars(cls)}
        hooks = sorted(name for name in own - {"should_update"} if hasattr(Callback, name) and not name.startswith("__"))
        if hooks:
            raise UserError(
                f"{type(rule).__name__} overrides {', '.join(hooks)}; of WeightAveraging only should_update can be overridden"
            )
        self.rule = rule
        self._average: AveragedModel | None = None
        self._names: list[list[str]] = []  # a shared tensor has several
        self._trained = nn.Module()
        self._holds_average = False  # whether the module has the average now, and `_average` the current weights
        self._last_step, self._last_epoch = 0, -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average is None:  # otherwise it comes from the checkpoint
            self._begin(pl_module)
        self._trained, self._names = _trained(pl_module, self.rule._use_buffers)  # buffers have moved to the device

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._last_step and self.rule.should_update(step_idx=step - 1):
            self._update()
            self._last_step = step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch > self._last_epoch and self.rule.should_update(epoch_idx=epoch):
            self._update()
            self._last_epoch = epoch

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._use(True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._use(True)

    def put_current_back(self) -> None:
        """Restore the current weights after a validation."""
        self._use(False)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the module the average within this context."""
        before = self._holds_average
        self._use(True)
        try:
            yield
        finally:
            self._use(before)

    def averaged(self) -> dict[str, Tensor]:
        """Return the average by the names of the module's state dict; empty before training."""
        return self._state(self._holds_average)

    def state_dict(self) -> dict[str, Any]:
        if self._average is None:
            return {}
        progress = {"last_step": self._last_step, "last_epoch": self._last_epoch}
        return {"current": self._state(not self._holds_average), "count": int(self._average.n_averaged), **progress}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average from the module, which has loaded it as its weights, and restore the current weights."""
        if trainer.state.fn != "fit":
            return
        self._begin(pl_module)
        assert self._average is not None
        stored = checkpoint["callbacks"].get(self.state_key)
        if stored is None:
            rank_zero_warn(
                f"the checkpoint is of a run without {type(self.rule).__name__}: the average starts from its weights"
            )
            self._last_step, self._last_epoch = checkpoint["global_step"], checkpoint["epoch"] - 1
            return
        for names, tensor in zip(self._names, _tensors(self._trained), strict=True):
            tensor.data.copy_(stored["current"][names[0]])
        self._average.n_averaged.fill_(stored["count"])
        self._last_step, self._last_epoch = stored["last_step"], stored["last_epoch"]

    def _begin(self, pl_module: L.LightningModule) -> None:
        self._trained, self._names = _trained(pl_module, self.rule._use_buffers)
        device = self.rule._device or pl_module.device
        self._average = AveragedModel(self._trained, device=device, use_buffers=True, **self.rule._kwargs)
        self._holds_average = False

    def _update(self) -> None:
        assert self._average is not None
        self._use(False)
        self._average.update_parameters(self._trained)

    def _use(self, average: bool) -> None:
        """Swap the average and the current weights, unless the module has the wanted ones."""
        if self._average is None or self._holds_average == average:
            return
        with torch.no_grad():
            for one, other in zip(_tensors(self._trained), _tensors(self._average.module), strict=True):
                before = one.detach().clone()
                one.copy_(other)
                other.copy_(before)
        self._holds_average = average

    def _state(self, of_module: bool) -> dict[str, Tensor]:
        if self._average is None:
            return {}
        model = self._trained if of_module else self._average.module
        tensors = zip(self._names, _tensors(model), strict=True)
        return {name: tensor.detach() for names, tensor in tensors for name in names}


def attach_weight_average(trainer: L.Trainer) -> WeightAverage | None:
    """Replace the trainer's WeightAveraging callback by a WeightAverage, before all other callbacks.

    Raises:
        UserError: if there are several.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, (WeightAveraging, WeightAverage))]
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"trainer.callbacks has {len(found)} WeightAveraging callbacks; keep one")
    own = WeightAverage(found[0].rule if isinstance(found[0], WeightAverage) else found[0])
    callbacks.remove(found[0])
    callbacks.insert(0, own)
    return own


def check_resumed(trainer: L.Trainer, checkpoint: dict[str, Any], average: WeightAverage | None) -> None:
    """Refuse to train on from an averaged checkpoint without averaging: its optimizer belongs to other weights.

    Raises:
        UserError: naming what to do.
    """
    averaged = "WeightAverage" in checkpoint.get("callbacks", {}) or "averaging_state" in checkpoint
    if trainer.state.fn != "fit" or not averaged:
        return
    if average is None:
        raise UserError(
            "the checkpoint is of a run with weight averaging; add its callback (EMAWeightAveraging) to trainer.callbacks, or "
            "start a new run from its average with --model.adapter_path"
        )


def _trained(pl_module: nn.Module, batch_statistics: bool) -> tuple[nn.Module, list[list[str]]]:
    """Return a module with the tensors to average, and all names of each tensor in the state dict of `pl_module`."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in pl_module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    for prefix, module in pl_module.named_modules(remove_duplicate=False):
        if batch_statistics and isinstance(module, _BatchNorm) and any(p.requires_grad for p in module.parameters()):
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    names.setdefault(buffer, []).append(f"{prefix}.{name}")
    holder = nn.Module()
    for index, tensor in enumerate(names):
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(str(index), tensor)
        else:
            holder.register_buffer(str(index), tensor)
    return holder, list(names.values())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
