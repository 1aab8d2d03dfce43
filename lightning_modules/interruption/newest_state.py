"""NewestState: keep the newest state on disk after every validation, whichever checkpoint is the best."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_modules.interruption.csv_rows import cut_csv_files, rows_in_csv_files


class NewestState(Checkpoint):
    """Make `last.ckpt` of ModelCheckpoint the newest state; AdaptationModule adds this callback to every run.

    Lightning writes `last.ckpt` only together with one of the best, so it is the best and not the newest. This callback runs
    after all ModelCheckpoints. If none of them has written a whole checkpoint since the validation began, the first one with
    `save_last` (otherwise the first that does not set it) writes its `last.ckpt`. A run without validation does so after every
    epoch, and every run at its end. `save_last: false` switches it off.

    For every checkpoint, it also flushes the loggers first, and on resumption it removes superseded files, which remain if the
    run was killed before ModelCheckpoint could remove them.

    Uses the private `_save_last_checkpoint` and `_monitor_candidates` of ModelCheckpoint.
    """

    best_model_path = ""  # Lightning reads it from every Checkpoint

    def __init__(self) -> None:
        self._on_disk = False  # whether a checkpoint has the current state
        self._validated = False  # since the last `last.ckpt`
        self._known: dict[str, set[str]] = {}  # files of each ModelCheckpoint that may still exist
        self._superseded: list[str] = []
        self._csv_rows: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._on_disk = self._validated = False
        self._known = {callback.state_key: _tracked(callback) for callback in _model_checkpoints(trainer)}
        self._remove_superseded(trainer)
        cut_csv_files(trainer, self._csv_rows)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._on_disk = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._on_disk = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated = True
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # otherwise on_train_epoch_end follows
            self._write(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loaded = trainer.val_dataloaders is not None  # only then does Lightning know the number of batches
        if self._validated or not trainer.enable_validation or (loaded and not sum(trainer.num_val_batches)):
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the state of files. Lightning calls it for whole checkpoints only, not for weights alone."""
        self._on_disk = True
        for logger in trainer.loggers:
            with contextlib.suppress(OSError):  # the logger's next call raises it
                logger.save()
        checkpoint["csv_rows"] = rows_in_csv_files(trainer)
        checkpoint["superseded_checkpoints"] = []
        for callback in _model_checkpoints(trainer):
            tracked = _tracked(callback)
            known = self._known.get(callback.state_key, set()) | tracked
            self._known[callback.state_key] = {path for path in known if path in tracked or Path(path).exists()}
            checkpoint["superseded_checkpoints"] += sorted(self._known[callback.state_key] - tracked)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._superseded = checkpoint.get("superseded_checkpoints", [])
            self._csv_rows = checkpoint.get("csv_rows", [])

    def _write(self, trainer: L.Trainer) -> None:
        self._validated = False
        callbacks = [callback for callback in _model_checkpoints(trainer) if callback.save_last is not False]
        if self._on_disk or trainer.fast_dev_run or not callbacks:  # type: ignore[attr-defined]
            return
        callback = next((callback for callback in callbacks if callback.save_last), callbacks[0])
        options = callback.save_last, callback.save_weights_only
        callback.save_last, callback.save_weights_only = True, False
        try:
            callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
        finally:
            callback.save_last, callback.save_weights_only = options

    def _remove_superseded(self, trainer: L.Trainer) -> None:
        """Remove files that this run wrote, in directories it still writes to, if the files that replaced them exist."""
        tracked = set().union(*self._known.values())
        if not all(Path(path).exists() for path in tracked if path):
            return
        directories = [Path(callback.dirpath).absolute() for callback in _model_checkpoints(trainer) if callback.dirpath]
        kept = {Path(path).absolute() for path in tracked} | {Path(trainer.ckpt_path or "").absolute()}
        for name in self._superseded:
            path = Path(name).absolute()
            if path not in kept and path.is_file() and any(directory in path.parents for directory in directories):
                trainer.strategy.remove_checkpoint(path)


def _model_checkpoints(trainer: L.Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _tracked(callback: ModelCheckpoint) -> set[str]:
    """Return the files that a ModelCheckpoint keeps or replaces; with `save_top_k=-1` only the one it replaces."""
    replaced = {callback.last_model_path}
    if callback.save_top_k != -1:
        replaced |= {callback.best_model_path, *callback.best_k_models}
    return replaced - {""}
