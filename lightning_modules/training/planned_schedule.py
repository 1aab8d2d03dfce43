"""PlannedSchedule: learning rates over all optimizer steps of a run, also if their number changes."""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fourier_moe.errors import UserError
from lightning_modules.optimization import Optimization


class PlannedSchedule:
    """Keep the schedule of a run up to date with the number of its optimizer steps, unless the user chose a scheduler's class.

    Args:
        optimization: the kind of schedule.
        optimizer: the optimizer whose rates it sets.
        trainer: knows the number of steps.

    Attributes:
        num_steps: number of optimizer steps that the schedule covers; 0 for a chosen class.
        scheduler: the scheduler that Lightning advances.

    Raises:
        UserError: if the number of steps is unknown.
    """

    def __init__(self, optimization: Optimization, optimizer: Optimizer, trainer: L.Trainer) -> None:
        self._optimization = optimization
        self.num_steps = planned_steps(trainer) if optimization.covers_run else 0
        self.scheduler = optimization.build_scheduler(optimizer, self.num_steps)

    def on_train_start(self, trainer: L.Trainer) -> None:
        """Plan again, now that a checkpoint is loaded, and warn if the rates differ from those in the checkpoint.

        They differ if a finished run is extended: the rates in its checkpoint are 0.

        Raises:
            UserError: if the schedule waits for validations, and there are none.
        """
        if isinstance(self.scheduler, ReduceLROnPlateau) and not trainer.should_stop and not _validates(trainer):
            raise UserError(
                "optimization.schedule: ReduceLROnPlateau advances after validations, and this run has none; choose another "
                "schedule, or validate (trainer.limit_val_batches, trainer.check_val_every_n_epoch)"
            )
        if not self.num_steps:
            return
        before = self._share_of_peak()
        self._plan(trainer)
        after = self._share_of_peak()
        if abs(after - before) > 1e-6:
            rank_zero_warn(
                f"learning rates continue at {after:.3g} of their peaks, not at {before:.3g} as in the checkpoint: this run's "
                f"schedule covers {self.num_steps} optimizer steps, of which {self.scheduler.last_epoch} are done"
            )

    def on_train_epoch_start(self, trainer: L.Trainer) -> None:
        """Plan again if the epoch has another number of batches than planned."""
        planned = self.num_steps
        if planned and planned_steps(trainer) != planned:
            self._plan(trainer)
            rank_zero_warn(
                f"epoch {trainer.current_epoch} has another number of batches than the schedule was planned for: it now covers "
                f"{self.num_steps} optimizer steps, before {planned}; trainer.max_steps fixes the number"
            )

    def _plan(self, trainer: L.Trainer) -> None:
        self.num_steps = planned_steps(trainer)
        self._optimization.reschedule(self.scheduler, self.num_steps)

    def _share_of_peak(self) -> float:
        groups = [group for group in self.scheduler.optimizer.param_groups if group["initial_lr"]]
        return groups[0]["lr"] / groups[0]["initial_lr"] if groups else 0.0


def planned_steps(trainer: L.Trainer) -> int:
    """Count the optimizer steps of a run: those done, and those of all batches to come.

    Unlike `Trainer.estimated_stepping_batches`, this takes into account a GradientAccumulationScheduler and the steps of a
    resumed run, whose batches may have been others.

    Args:
        trainer: a trainer before training, at its start or between two epochs.

    Raises:
        UserError: if the number is unknown (a training set without length, no max_epochs) and max_steps is not set.
    """
    try:
        steps = trainer.estimated_stepping_batches  # loads the training set if it is not loaded yet
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
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
    """Return the number of batches per optimizer step in an epoch, counted from 0."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def _validates(trainer: L.Trainer) -> bool:
    epochs, every = trainer.max_epochs, trainer.check_val_every_n_epoch
    too_late = epochs not in (None, -1) and every is not None and every > epochs
    empty = trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)
    return trainer.enable_validation and not too_late and not empty


def _batches_done(trainer: L.Trainer) -> int:
    """Return the batches done of the epoch that a run resumes in; otherwise 0, since the loop has those of the last epoch."""
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.current
    within = loop.restarted_mid_epoch and epochs.completed < epochs.ready
    return loop.epoch_loop.batch_progress.current.ready if within else 0
