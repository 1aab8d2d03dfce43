"""The directory of a run's files. Sets the private `_version` of TensorBoardLogger and CSVLogger."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from fourier_moe.errors import UserError
from lightning_modules.interruption.checkpoints import require_writable
from lightning_modules.interruption.locks import Lock, release_lock, take_lock

_WITHOUT_LOGGER = "lightning_logs"  # Lightning's name for runs without a logger
_SAVE_DIR, _ROOT_DIR = "--trainer.logger.init_args.save_dir", "--trainer.default_root_dir"


class RunDirectory(L.Callback):
    """The directory of a run; AdaptationModule adds this callback to every run.

    The first logger names it: TensorBoardLogger and CSVLogger by `log_dir`, other loggers by `<save_dir>/<name>/<version>`. A
    number that the logger does not set is claimed by creating the directory, so two runs that start at the same moment get
    different ones. A run holds a lock while it trains, until its process ends: a second run of the same name is refused. The
    command line calls `discard` when a run ends before its first batch; a Trainer of your own leaves the directory.

    Attributes:
        path: the directory, known after `claim`; a guess on all processes but the first, see `run_directory`.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.written: set[Path] = set()  # absolute paths of files of this run that `discard` may remove
        self._created: list[Path] = []  # absolute, a directory before those in it
        self._begun = False
        self._lock: Lock | None = None

    def claim(self, trainer: L.Trainer, numbered: bool = False) -> Path | None:
        """Choose the directory and create it on the first process; fast_dev_run has none. A second call changes nothing.

        Args:
            numbered: give a run without a logger `<default_root_dir>/lightning_logs/version_<k>`, not `default_root_dir`.

        Raises:
            UserError: if it cannot be written.
        """
        if self.path is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.path = _claim(trainer, numbered, self._created if _is_first(trainer) else None)
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(self.path / "checkpoints")
        return self.path

    def lock(self, trainer: L.Trainer) -> None:
        """Lock the directory against other runs until training ends.

        Raises:
            UserError: if another run is using the directory.
        """
        if self._lock is None and self.path is not None and _is_first(trainer):
            try:
                self._lock = take_lock(self.path)
            except BlockingIOError:
                raise UserError(
                    f"{self.path} is in use by another run that has not ended; wait for it, or choose another version or "
                    "name for the logger"
                ) from None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unlock()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._unlock()

    def _begin(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._begun |= not trainer.sanity_checking

    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _begin

    def keep(self) -> None:
        """Make `discard` do nothing, as after the first batch. For batches in processes that the launcher starts."""
        self._begun = True

    def discard(self, files: bool) -> None:
        """Remove the directories that this run created, if it has not finished a batch. Anything of another run stays.

        Args:
            files: remove also this run's own files, where there are no others and the file system has locks.
        """
        for directory in [] if self._begun else reversed(self._created):
            with contextlib.suppress(OSError):  # a BlockingIOError if another run has begun there
                if files and directory.exists():
                    self._remove_files(directory)
                directory.rmdir()  # fails, and so do all above, if another run has a file in it

    def _remove_files(self, directory: Path) -> None:
        lock = take_lock(directory)
        try:
            paths = list(directory.iterdir())
            for path in paths if lock is not None and all(map(self._is_own, paths)) else []:
                path.unlink()
        finally:
            release_lock(lock)

    def _is_own(self, path: Path) -> bool:
        """Return whether this process wrote the file before its first batch; hparams.yaml only tells this by its company."""
        name = path.name
        return path in self.written or name == "hparams.yaml" or ("tfevents" in name and f".{os.getpid()}." in name)

    def _unlock(self) -> None:
        release_lock(self._lock)
        self._lock = None


def attach_run_directory(trainer: L.Trainer) -> RunDirectory:
    """Return the trainer's RunDirectory; add one to its callbacks if there is none."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = next((callback for callback in callbacks if isinstance(callback, RunDirectory)), None)
    if found is None:
        found = RunDirectory()
        callbacks.insert(0, found)
    return found


def run_directory(trainer: L.Trainer) -> Path:
    """Return the directory of the run, the same on every process. All processes must call it together."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    path = next((callback.path for callback in callbacks if isinstance(callback, RunDirectory)), None)
    return Path(trainer.strategy.broadcast(str(path or _unclaimed(trainer))))


def _unclaimed(trainer: L.Trainer) -> Path:
    """Return the directory of a run whose module does not claim one."""
    logger = trainer.logger
    if logger is None or logger.version is None or isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return Path(trainer.log_dir or trainer.default_root_dir)
    return _root(trainer, logger) / _version_name(logger.version)


def require_no_run(directory: Path) -> None:
    """Refuse to start a run in a directory that holds another run's files.

    Raises:
        UserError: naming one of these files.
    """
    found = [directory / name for name in ("adapter", "adapter_last")] + sorted(directory.rglob("*.ckpt"))
    there = [path for path in found if path.exists()]
    if there:
        raise UserError(
            f"{directory} holds another run ({there[0].relative_to(directory)}); resume it with --ckpt_path {directory}, "
            "or choose another version or name for the logger"
        )


def _claim(trainer: L.Trainer, numbered: bool, created: list[Path] | None) -> Path:
    """Create the directory, unless `created` is None; append to `created` what was not there."""
    loggers = trainer.loggers
    if not loggers:
        root = Path(trainer.default_root_dir)
        return _next_version(root / _WITHOUT_LOGGER, _ROOT_DIR, created) if numbered else _made(root, _ROOT_DIR, created)
    numbers: dict[str, int] = {}  # by root directory; loggers of one directory share its number
    for logger in loggers:
        if isinstance(logger, (TensorBoardLogger, CSVLogger)) and logger._version is None and "://" not in logger.root_dir:
            if logger.root_dir not in numbers:
                expanded = os.path.expanduser(os.path.expandvars(logger.root_dir))
                path = _next_version(Path(expanded), _SAVE_DIR, created)
                numbers[logger.root_dir] = int(path.name.removeprefix("version_"))
            logger._version = numbers[logger.root_dir]
    logger = loggers[0]
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return _made(Path(logger.log_dir), _SAVE_DIR, created)
    getattr(logger, "experiment", None)  # starts the run of W&B and MLflow, which gives it its name
    root = _root(trainer, logger)
    if logger.version is None:
        return _next_version(root, _SAVE_DIR, created)
    return _made(root / _version_name(logger.version), _SAVE_DIR, created)


def _is_first(trainer: L.Trainer) -> bool:
    """Return whether this is the first process, also before the strategy has set its ranks, as after a fork."""
    return trainer.is_global_zero and trainer.local_rank == 0


def _root(trainer: L.Trainer, logger: Logger) -> Path:
    """Return where the runs of a logger are on this machine."""
    path = logger.save_dir
    return Path(trainer.default_root_dir if path is None or "://" in path else path) / str(logger.name or "")


def _version_name(version: int | str | None) -> str:
    return version if isinstance(version, str) else f"version_{version}"


def _next_version(root: Path, option: str, created: list[Path] | None) -> Path:
    """Return the first free `version_<k>` after all existing ones, created unless `created` is None."""
    numbers = [path.name.removeprefix("version_") for path in root.glob("version_*")]
    number = max((int(text) for text in numbers if text.isdecimal()), default=-1) + 1
    if created is None:
        return root / f"version_{number}"
    require_writable(root, option)
    while True:
        path = root / f"version_{number}"
        with contextlib.suppress(FileExistsError):
            _create(path, created)
            return path
        number += 1


def _made(path: Path, option: str, created: list[Path] | None) -> Path:
    if created is not None and "://" not in str(path):
        require_writable(path, option)
        with contextlib.suppress(FileExistsError):
            _create(path, created)
    return path


def _create(path: Path, created: list[Path]) -> None:
    """Create a directory and those above it; append to `created` those that no other process created.

    Raises:
        FileExistsError: if it exists.
    """
    try:
        path.mkdir()
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):  # another process has just created it
            _create(path.parent, created)
        path.mkdir()
    created.append(path.absolute())
