"""PlannedSchedule: learning rates over the optimizer steps that a run takes in all, also where that number changes."""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import AdamW

from fourier_moe.errors import UserError
from lightning_modules.optimization import Optimization


class PlannedSchedule:
    """The schedule of a run, kept as long as the run.

    Args:
        optimization: what the schedule is.
        optimizer: whose rates it sets.
        trainer: how many steps there are to be.

    Attributes:
        num_steps: optimizer steps that the schedule is over.
        scheduler: for Lightning, which lets it advance after every step.

    Raises:
        UserError: if the number of steps is unknown.
    """

    def __init__(self, optimization: Optimization, optimizer: AdamW, trainer: L.Trainer) -> None:
        self._optimization = optimization
        self.num_steps = planned_steps(trainer)
        self.scheduler = optimization.build_scheduler(optimizer, self.num_steps)

    def on_train_start(self, trainer: L.Trainer) -> None:
        """Plan again, now that a checkpoint has said what is done, and say so if the rates go on elsewhere than it had them.

        They do where a finished run is extended: the checkpoint's rates are 0.
        """
        before = self._share_of_peak()
        self._plan(trainer)
        after = self._share_of_peak()
        if abs(after - before) > 1e-6:
            rank_zero_warn(
                f"learning rates go on at {after:.3g} of their peaks, and not at {before:.3g} as in the checkpoint: this run's "
                f"schedule is over {self.num_steps} optimizer steps, of which {self.scheduler.last_epoch} are done"
            )

    def on_train_epoch_start(self, trainer: L.Trainer) -> None:
        """Plan again if the epoch has other batches than those before it."""
        planned = self.num_steps
        if planned_steps(trainer) != planned:
            self._plan(trainer)
            rank_zero_warn(
                f"epoch {trainer.current_epoch} has another number of batches than the schedule was planned for: it is over "
                f"{self.num_steps} optimizer steps now, and was over {planned}; trainer.max_steps fixes the number"
            )

    def _plan(self, trainer: L.Trainer) -> None:
        self.num_steps = planned_steps(trainer)
        self._optimization.reschedule(self.scheduler, self.num_steps)

    def _share_of_peak(self) -> float:
        groups = [group for group in self.scheduler.optimizer.param_groups if group["initial_lr"]]
        return groups[0]["lr"] / groups[0]["initial_lr"] if groups else 0.0


def planned_steps(trainer: L.Trainer) -> int:
    """The optimizer steps done, and those of all batches to come.

    Unlike `Trainer.estimated_stepping_batches` this knows of a GradientAccumulationScheduler, and of a resumed run's steps that
    were of other batches.

    Args:
        trainer: between two epochs, at the start of training or before.

    Raises:
        UserError: if the training set has no length, or there is no end, and max_steps does not say when to stop.
    """
    steps = trainer.estimated_stepping_batches  # loads the training set if nobody has asked for it yet
    if steps in (-1, float("inf")):
        raise UserError("the number of optimizer steps is unknown, and the schedule needs it; set trainer.max_steps")
    num_batches, max_epochs = trainer.num_training_batches, trainer.max_epochs
    if max_epochs in (-1, None) or num_batches == float("inf"):
        return int(steps)  # max_steps
    epoch = trainer.current_epoch
    to_come = sum(math.ceil(num_batches / accumulated_batches(trainer, number)) for number in range(epoch, max_epochs))
    done = math.ceil(_batches_done(trainer) / accumulated_batches(trainer, epoch))
    total = trainer.global_step + to_come - done
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


def accumulated_batches(trainer: L.Trainer, epoch: int) -> int:
    """How many batches make an optimizer step in an epoch, counted from 0."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def _batches_done(trainer: L.Trainer) -> int:
    """Batches of the current epoch that are done where a run goes on within one; elsewhere the loop has the last epoch's."""
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.current
    within = loop.restarted_mid_epoch and epochs.completed < epochs.ready
    return loop.epoch_loop.batch_progress.current.ready if within else 0
