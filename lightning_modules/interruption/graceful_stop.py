"""GracefulStop: SIGTERM, Ctrl-C and SLURM's preemption end a run after the batch at hand, with a checkpoint."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

NAME = "interrupted.ckpt"


class GracefulStop(L.Callback):
    """Write `checkpoints/interrupted.ckpt`, say how to resume, and exit with 128 + the signal's number.

    AdaptationModule brings it along. The signals are SIGTERM, SIGINT (pressed again, it ends at once) and, in a SLURM job that
    may be requeued, the one that announces the time limit (`--signal=USR1@120`), after which the job is requeued. A handler
    only notes the signal. All processes agree after every training batch, so that one signal to one of them is enough. With a
    single process a validation is left in its midst, too; several, which may have unequally many batches, end it first.

    These handlers stand in for Lightning's, which save from within the handler, in the midst of an optimiser step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._requeue: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._received = signal.SIGTERM if trainer.received_sigterm else None
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal
        for number in [signal.SIGTERM, signal.SIGINT] + ([] if self._requeue is None else [self._requeue]):
            self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._received is not None and trainer.world_size == 1:
            self._stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = number
        again = ", again for an end without one" if number == signal.SIGINT else ""
        if getattr(rank_zero_only, "rank", 0) == 0:  # past sys.stderr, in whose midst the signal may have come
            os.write(2, f"\n{signal.Signals(number).name} received: checkpoint and end after this batch{again}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _stop(self, trainer: L.Trainer) -> None:
        number = self._received or signal.SIGTERM  # which another process got
        reason = f"{signal.Signals(number).name} ended the run at step {trainer.global_step}"
        path = _checkpoint_path(trainer)
        if path is None:
            rank_zero_warn(f"{reason}; no checkpoint was written, since the run has no checkpoint callback")
        else:
            trainer.save_checkpoint(path, weights_only=False)  # unsaid, Lightning logs its default
            rank_zero_info(f"\n{reason}. Checkpoint: {path}\nResume: {resume_command(trainer, path)}")
        if number == self._requeue and trainer.is_global_zero:
            _requeue_job()
        raise SystemExit(128 + number)


def resume_command(trainer: L.Trainer, path: Path) -> str:
    """The line that goes on from a checkpoint, in the directory of the run."""
    config = path.parent.parent / "config.yaml"
    if not config.is_file():
        return f"the same command with --ckpt_path {shlex.quote(str(path))}"
    launcher = "torchrun YOUR_OPTIONS" if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    version = ""
    if len(trainer.loggers) == 1 and isinstance(trainer.loggers[0], (TensorBoardLogger, CSVLogger)):
        version = f"--trainer.logger.init_args.version {shlex.quote(path.parent.parent.name)} "
    return f"{launcher} train.py fit --config {shlex.quote(str(config))} {version}--ckpt_path {shlex.quote(str(path))}"


def _checkpoint_path(trainer: L.Trainer) -> Path | None:
    """Beside the other checkpoints; None if the run writes none."""
    if trainer.fast_dev_run or not any(isinstance(callback, Checkpoint) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return None
    directories = [
        callback.dirpath
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath
    ]
    return Path(directories[0] if directories else trainer.default_root_dir) / NAME


def _requeue_job() -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        rank_zero_info(f"job {job} is requeued")
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"job {job} could not be requeued ({error}); submit it again")
