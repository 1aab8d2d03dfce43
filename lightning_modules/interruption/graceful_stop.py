"""GracefulStop: write a checkpoint before a signal or a full disk ends a run."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import stat
import subprocess
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_modules.interruption.exact_resume import between_steps
from lightning_modules.interruption.newest_state import NewestState
from lightning_modules.interruption.start_command import start_command
from lightning_modules.interruption.write_errors import quiet_writer_threads, write_error

NAME = "interrupted.ckpt"


class GracefulStop(L.Callback):
    """Write `checkpoints/interrupted.ckpt`, print how to resume, and exit with 128 + the signal's number.

    AdaptationModule adds it to every run. The signals are SIGTERM, SIGHUP (a closed terminal), SIGINT (a second one exits at
    once) and, in a SLURM job that may be requeued, the signal that announces the time limit (`--signal=USR1@120`), after which
    the job is requeued. A signal that the process ignores (`nohup`) stays ignored. A handler only records the signal. All
    processes agree after every training batch, so a signal to one of them is enough. A single process also leaves a validation
    early; several processes, which may have different numbers of batches, finish it first.

    These handlers replace Lightning's, which save within the handler, possibly during an optimizer step. Uses the Trainer's
    private `_accelerator_connector`.

    A full disk raises an error in whichever writer meets it first. The checkpoint is then written beside the others or, if that
    fails, in the directory for temporary files. With several processes it is not, since only one of them sees the error.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._requeue: int | None = None
        self._before: dict[int, Any] = {}
        self._trained = False  # whether this run has trained a batch

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained = False
        quiet_writer_threads()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._received = signal.SIGTERM if trainer.received_sigterm else None
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal
        numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT] + ([] if self._requeue is None else [self._requeue])
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained = True
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
        error = write_error(exception)
        if error is not None and trainer.state.fn == "fit" and self._trained:
            self._save_elsewhere(trainer, error)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = number
        if number == signal.SIGHUP:
            _leave_closed_terminal()
        again = "; press again to exit without one" if number == signal.SIGINT else ""
        if getattr(rank_zero_only, "rank", 0) == 0:  # not sys.stderr, which may be in use
            text = f"\n{signal.Signals(number).name} received: writing a checkpoint and exiting after this batch{again}\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _stop(self, trainer: L.Trainer) -> None:
        number = self._received or signal.SIGTERM  # received by another process
        reason = f"{signal.Signals(number).name} ended the run at step {trainer.global_step}"
        path = _checkpoint_path(trainer)
        if path is None:
            rank_zero_warn(f"{reason}; no checkpoint was written, since the run has no checkpoint callback")
        else:
            trainer.save_checkpoint(path, weights_only=False)  # by default Lightning logs a hint
            rank_zero_info(f"\n{reason}. Checkpoint: {path}\nResume: {resume_command(trainer, path, path.parent.parent)}")
        if number == self._requeue and trainer.is_global_zero:
            _requeue_job()
        raise SystemExit(128 + number)

    def _save_elsewhere(self, trainer: L.Trainer, error: OSError) -> None:
        reason = f"{os.strerror(error.errno or 0)}: the run ended at step {trainer.global_step}"
        path = _checkpoint_path(trainer)
        if path is None:
            return
        newest = f"resume from the newest checkpoint with --ckpt_path {path.parent}"
        if trainer.world_size > 1:
            rank_zero_warn(f"{reason}; with several processes no checkpoint is written after an error of one; {newest}")
            return
        if not between_steps(trainer):
            rank_zero_warn(f"{reason} during a step, when no checkpoint can be written; {newest}")
            return
        for beside_the_others in (True, False):
            try:
                place = path if beside_the_others else Path(tempfile.mkdtemp(prefix="fourier_moe_")) / NAME
                trainer.save_checkpoint(place, weights_only=False)
            except (RuntimeError, ValueError, OSError) as problem:
                rank_zero_warn(str(problem))
                continue
            command = resume_command(trainer, place, path.parent.parent)
            rank_zero_info(f"\n{reason}. Checkpoint: {place}\nFree some space, then resume: {command}")
            return
        rank_zero_warn(f"{reason}, and no checkpoint could be written; {newest}")


def resume_command(trainer: L.Trainer, path: Path, run: Path) -> str:
    """Return the command that resumes from a checkpoint in the directory of the run."""
    config = run / "config.yaml"
    if not config.is_file():
        return f"the same command with --ckpt_path {shlex.quote(str(path))}"
    start = start_command("TORCHELASTIC_RUN_ID" in os.environ)
    version = ""
    if len(trainer.loggers) == 1 and isinstance(trainer.loggers[0], (TensorBoardLogger, CSVLogger)):
        version = f"--trainer.logger.init_args.version {shlex.quote(run.name)} "
    return f"{start} fit --config {shlex.quote(str(config))} {version}--ckpt_path {shlex.quote(str(path))}"


def _checkpoint_path(trainer: L.Trainer) -> Path | None:
    """Return the path of `interrupted.ckpt`, beside the other checkpoints; None if the run writes none."""
    kept = [callback for callback in trainer.checkpoint_callbacks if not isinstance(callback, NewestState)]
    if trainer.fast_dev_run or not kept:  # type: ignore[attr-defined]
        return None
    directories = [callback.dirpath for callback in kept if isinstance(callback, ModelCheckpoint) and callback.dirpath]
    return Path(directories[0] if directories else trainer.default_root_dir) / NAME


def _leave_closed_terminal() -> None:
    """Send the output (progress bar) to /dev/null, since writing to the closed terminal would fail."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed already
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)


def _requeue_job() -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        rank_zero_info(f"job {job} is requeued")
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"job {job} could not be requeued ({error}); submit it again")
