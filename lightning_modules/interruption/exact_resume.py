"""ExactResume: a resumed run gives bitwise the same result as an uninterrupted one."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_modules.interruption.random_state import (
    RandomState,
    all_random_states,
    new_state,
    random_state,
    set_random_state,
)

_LOOP, _VAL_LOOP = "epoch_loop.", "epoch_loop.val_loop."


class ExactResume(L.Callback):
    """Keep the random state and the position in checkpoints; AdaptationModule adds it to every run.

    Random numbers: every training batch starts from the state after the previous one, whatever validation, loggers or startup
    draw in between. A checkpoint has this state for every process. Several processes start from different states, derived from
    (seed of the run, 0, rank); with equal seeds they would drop the same activations. A run resumed with another number of
    processes or on another kind of device derives new states from (seed, step, rank), and warns.

    Position: Lightning's record of its loops has gaps, which the checkpoint closes. A checkpoint written during accumulation,
    or before a batch was trained on, would lose gradients or the batch: it goes back to the first batch of the optimizer step.
    One written when a validation is due or has begun would skip it or resume with half of the metrics: the validation is
    repeated from its start. One written at the end of an epoch or between two epochs would resume differently with max_steps,
    limits or no validation: it resumes at the start of the next epoch.

    Uses Lightning's private `_load_combined_loader_states` and `_data_fetcher` of the fit loop, and `_batches_that_stepped`,
    `_should_accumulate`, `_should_check_val_fx` and `_num_ready_batches_reached` of the epoch loop.
    """

    def __init__(self) -> None:
        self._next: RandomState | None = None  # of the next training batch
        self._first: RandomState | None = None  # of the first batch of this optimizer step
        self._in_batch = False
        self._validating = False
        self._validated = False  # after the current batch
        self._seed = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._in_batch = self._validating = self._validated = False
        self._seed = torch.initial_seed()  # here, since restoring a state changes it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the loader's position, and count batches as the loader does, even if their size has changed."""
        # Lightning restores only loaders that have not been created yet; the schedule has created this one to count its steps.
        trainer.fit_loop._load_combined_loader_states()
        loader = trainer.train_dataloader
        position = loader.state_dict() if isinstance(loader, DataLoader) and hasattr(loader, "state_dict") else {}
        if trainer.fit_loop.restarting and "batches" in position:
            progress = trainer.fit_loop.epoch_loop.batch_progress.current
            change = position["batches"] - progress.ready
            for name in ("ready", "started", "processed", "completed"):
                setattr(progress, name, getattr(progress, name) + change)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        device = trainer.strategy.root_device
        if self._next is None:
            alone = trainer.world_size == 1
            own = (self._seed, trainer.global_step, trainer.global_rank)
            self._next = random_state(device) if alone else new_state(*own, device)
        set_random_state(self._next, device)
        self._in_batch, self._validated = True, False
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._first = self._next
        # The x-axis of TensorBoard; Lightning's is off by one after some resumptions.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._next = random_state(trainer.strategy.root_device)
        self._in_batch = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validating = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = self._validating
        self._validating = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        surplus, unfinished = _batches_since_step(trainer), _unfinished_batch(trainer)
        if self._in_batch and not unfinished:  # called from another callback's on_train_batch_end, which precedes ours
            self._next = random_state(trainer.strategy.root_device)
        state = self._first if surplus > unfinished else self._next
        states = all_random_states(state or random_state(trainer.strategy.root_device))
        checkpoint["random_states"] = {"seed": self._seed, "step": trainer.global_step, "states": states}
        _close_gaps(checkpoint["loops"]["fit_loop"], trainer, surplus, self._validating, self._validated)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        device = trainer.strategy.root_device
        if trainer.state.fn != "fit":
            return
        stored = checkpoint.get("random_states")
        if stored is None:
            rank_zero_warn("the checkpoint has no random state (an older version wrote it): the run draws other random numbers")
            return
        states = stored["states"]
        if len(states) == trainer.world_size and (states[0]["cuda"] is None) == (device.type != "cuda"):
            self._next = states[trainer.global_rank]
            return
        kind = "CPU" if states[0]["cuda"] is None else "GPU"
        rank_zero_warn(
            f"the checkpoint is of {len(states)} process(es) on {kind}, this run has {trainer.world_size} on "
            f"{device.type.upper()}: new random numbers (dropout) are derived from the seed, the step and the rank"
        )
        self._next = new_state(stored["seed"], stored["step"], trainer.global_rank, device)


def between_steps(trainer: L.Trainer) -> bool:
    """Return whether training is between two batches, where a checkpoint can be written."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.ready == batches.processed or batches.ready > batches.started


def _unfinished_batch(trainer: L.Trainer) -> int:
    """Return 1 if the current batch has not been trained on yet, else 0."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.ready - batches.processed


def _batches_since_step(trainer: L.Trainer) -> int:
    """Return the number of batches handed out since the last optimizer step."""
    loop = trainer.fit_loop.epoch_loop
    if _unfinished_batch(trainer):
        return (loop.batch_progress.current.ready - 1) % trainer.accumulate_grad_batches + 1
    return loop.batch_progress.current.ready % trainer.accumulate_grad_batches if loop._should_accumulate() else 0


def _close_gaps(loops: dict[str, Any], trainer: L.Trainer, surplus: int, validating: bool, validated: bool) -> None:
    """Change Lightning's record of its loops so that training resumes at the correct place; see ExactResume."""
    batches, epochs, validation = loops[_LOOP + "batch_progress"], loops["epoch_progress"], loops[_VAL_LOOP + "batch_progress"]
    loaders = [state for state in loops["state_dict"].get("combined_loader", ()) if "batches" in state]  # TrainLoader's
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    in_epoch = epochs["current"]["started"] > epochs["current"]["processed"]
    due = validating or (in_epoch and not validated and fetcher is not None and loop._should_check_val_fx(fetcher))
    if surplus:
        _count(batches, batches["current"]["ready"] - surplus, batches["total"]["ready"] - surplus)
        _count(validation, 0, 0)
        for state in loaders:
            state["batches"] -= surplus
    elif due:  # to Lightning this is a validation that has begun; it continues at batch 0
        _count(batches, batches["current"]["ready"], batches["total"]["ready"])
        _count(validation, 0, 0)
        validation["total"] |= {"ready": 1, "started": 1}
    elif not in_epoch or (not validated and loop._num_ready_batches_reached()):  # resume at the start of the next epoch
        _count(batches, 0, batches["total"]["ready"])
        _count(epochs, epochs["current"]["started"], epochs["total"]["started"])
        _count(validation, 0, 0)
        for state in loaders:
            state |= {"epoch": epochs["current"]["started"], "batches": 0}


def _count(progress: dict[str, Any], current: int, total: int) -> None:
    """Set a progress to `current` and `total` completed items, with no unfinished item."""
    progress["current"] = dict.fromkeys(progress["current"], current)
    progress["total"] = dict.fromkeys(progress["total"], total)
    if "is_last_batch" in progress and not current:
        progress["is_last_batch"] = False
