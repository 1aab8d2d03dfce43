"""AdaptationCLI: LightningCLI with one model class, any DataModule, and the settings that these share with the run."""

from __future__ import annotations

import logging
import pydoc
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info

from fourier_moe import AdapterConfig
from fourier_moe.errors import UserError
from lightning_modules.adaptation import AdaptationModule, untrained
from lightning_modules.callbacks import EvaluationReport
from lightning_modules.callbacks.monitoring.cpu_time import StepTime, bound_cpu_time
from lightning_modules.callbacks.results.next_commands import next_commands
from lightning_modules.cli.argument_parser import ArgumentParser
from lightning_modules.cli.config_files import ON_DEFAULTS
from lightning_modules.cli.progress_bar import progress_bar
from lightning_modules.interruption import (
    CheckedCheckpointIO,
    checkpoint_directories,
    find_checkpoint,
    last_checkpoint,
    require_nothing_ahead,
    require_own_checkpoint,
    write_error,
)
from lightning_modules.run_directory import attach_run_directory, require_no_run, run_directory
from lightning_modules.tasks import Task
from lightning_modules.tasks.backbones.hugging_face import tokenizer_name
from lightning_modules.tasks.base import task_data
from lightning_modules.training.supported_callbacks import without_use
from lightning_modules.training.trainer_arguments import MAX_SEED, check_trainer_arguments, refused_by_lightning

set_parsing_settings(subclasses_enabled=[AdapterConfig])  # a dataclass, which jsonargparse otherwise takes as final
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # Lightning 2.6 on torch 2.15
warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")  # compare calls it from within Python
_NOT_FOR_USERS = ("Tip: For seamless", "callbacks returned in `LightningModule.configure_callbacks` will override")
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: not any(text in record.getMessage() for text in _NOT_FOR_USERS)
)


class SaveConfig(SaveConfigCallback):
    """Write config.yaml to the run's directory. Commands other than fit keep an existing file."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._path = run_directory(trainer) / self.config_filename  # asks all processes
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" or not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, self._path, skip_none=False, overwrite=True, multifile=self.multifile)
            attach_run_directory(trainer).written.add(self._path.absolute())


class AdaptationCLI(LightningCLI):
    """AdaptationModule with any LightningDataModule; `commands/front_door.py` adds the other commands.

    Every command starts from configs/defaults.yaml. Overrides these private methods of LightningCLI:
    `_prepare_subcommand_parser`, `_set_seed`, `_run_subcommand`, `_prepare_subcommand_kwargs`, `_parse_ckpt_path`;
    calls `_get`. Asks for the private `_MultiProcessingLauncher`.

    Args:
        args: the command line; None takes the process's own.
        run: run the subcommand; False only builds `trainer`, `model` and `datamodule` (then `args` has no subcommand).
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        super().__init__(
            AdaptationModule,
            L.LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            args=args,
            run=run,
            parser_class=ArgumentParser,
            parser_kwargs={} if run else ON_DEFAULTS,
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        return super()._prepare_subcommand_parser(klass, subcommand, **ON_DEFAULTS, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not 0 <= int(seed) <= MAX_SEED:
            raise UserError(f"seed_everything={seed} must be between 0 and {MAX_SEED}")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Give adapter, data and callbacks what they leave open: the run's seed, the model's tokenizer, the task's monitor.

        Refuses a missing checkpoint right away.
        """
        config = self.config[self.subcommand] if self.subcommand else self.config
        adapter = config.model.adapter.get("init_args", {})
        if "seed" in adapter and adapter.seed is None and config.seed_everything is not False:
            adapter.seed = int(config.seed_everything)
        _read_version_numbers(config.trainer.logger)
        _follow_task(config.trainer.callbacks, config.model.task.class_path)
        _agree_on_tokenizer(config.data.get("init_args", {}), config.model.task.get("init_args", {}))
        if config.get("weights_only") is False:
            raise UserError("weights_only=false would run code from a checkpoint; leave it out")
        fits = self.subcommand in (None, "fit")
        check_trainer_arguments(config.trainer, trains=fits)
        path = config.get("ckpt_path")
        if path in ("best", "hpc"):
            raise UserError(f"ckpt_path={path!r} is known only within a run; give a RUN directory, a FILE, or last")
        if path and path != "last":
            config.ckpt_path = find_checkpoint(path, to_resume=fits)
            require_own_checkpoint(config.ckpt_path, config.trainer.max_epochs if fits else None)
        if path and config.model.adapter_path:
            if not fits:
                raise UserError(f"ckpt_path={path!r} and model.adapter_path={config.model.adapter_path!r}: give one of them")
            rank_zero_info(f"trained weights come from ckpt_path={path!r}, not from model.adapter_path")

    def instantiate_classes(self) -> None:
        """Refuse data of another kind than the task's before anything is loaded."""
        super().instantiate_classes()
        self.model.task.check_data(task_data(self.datamodule))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer. Its checkpoint files are checked, unless a plugin replaces the CheckpointIO.

        Callbacks that need a logger or write checkpoints are left out if these are switched off.
        """
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        logs, writes = config.get("logger") is not False, config.get("enable_checkpointing") is not False
        if config.get("enable_progress_bar") is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            callbacks = [*callbacks, progress_bar()]
        with refused_by_lightning(config):
            trainer = super().instantiate_trainer(**kwargs | {"callbacks": without_use(callbacks, logs, writes)})
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckedCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Settle the run's directory and refuse another run's before anything is loaded; find its own newest checkpoint.

        `--ckpt_path last` starts a new run if there is no checkpoint, so that a requeued job can repeat the same command.
        """
        options = self.config_init[self.subcommand]
        if self.model.optimization is None:
            raise UserError("model.optimization is missing; fit needs its learning rates")
        directory = attach_run_directory(self.trainer).claim(self.trainer, numbered=True)
        if directory is None:
            return
        if options.ckpt_path == "last":
            options.ckpt_path = last_checkpoint(self.trainer, to_resume=True)
            if options.ckpt_path:
                require_own_checkpoint(options.ckpt_path, self.trainer.max_epochs)
        if not options.ckpt_path and self.trainer.is_global_zero:
            require_no_run(directory)
        require_nothing_ahead(checkpoint_directories(self.trainer), options.ckpt_path)

    def after_fit(self) -> None:
        """Log the commands that come next, with this run's paths."""
        if commands := next_commands(self.trainer):
            rank_zero_info("\n".join(["Next:", *(f"  {command}" for command in commands)]))

    def before_test(self) -> None:
        """Refuse to evaluate an untrained head before data and weights are fetched, and print one table of results only."""
        options = self.config_init[self.subcommand]
        if options.ckpt_path == "last":
            options.ckpt_path = last_checkpoint(self.trainer)
        trained = self.model.adapter_path or options.ckpt_path or self.model.task.works_untrained
        if not trained:
            raise untrained(str(self.subcommand))
        if "verbose" in options and any(isinstance(callback, EvaluationReport) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            options.verbose = False
        attach_run_directory(self.trainer).claim(self.trainer, numbered=True)

    before_validate = before_test

    def before_predict(self) -> None:
        """Do as before a test. Callbacks write predictions as they come; Lightning would keep all of them in memory."""
        self.before_test()
        self.config_init[self.subcommand].return_predictions = False

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave no directory behind if the run is refused before its first batch, and no empty one after any other error."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            attach_run_directory(self.trainer).discard(files=user_error(error) is not None)
            raise

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Fetch the model first: it is between `before_<subcommand>` and the subcommand, which fetches gigabytes of data."""
        if subcommand == "fit" and self.trainer.strategy.root_device.type == "cpu":
            bound_cpu_time(self.trainer, self.model.task, self.datamodule)
            self.trainer.callbacks.append(StepTime())  # type: ignore[attr-defined]
        self.model.task.fetch()
        if subcommand == "fit":
            self.before_fit()  # again: another run of the same name may have ended during the download
        if self._runs_elsewhere():
            attach_run_directory(self.trainer).keep()
        return super()._prepare_subcommand_kwargs(subcommand)

    def after_validate(self) -> None:
        """Refuse to report success if there was nothing to validate. Batches in other processes are not counted here."""
        if not self._runs_elsewhere() and not sum(self.trainer.num_val_batches):
            raise UserError("nothing was validated: the data has no validation set; hold a part out, or use test")

    def _runs_elsewhere(self) -> bool:
        """Return whether all batches run in processes that the launcher starts, as with ddp_fork and ddp_spawn."""
        return isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would silently prefer hyper-parameters of the checkpoint to the command line."""


def _read_version_numbers(loggers: Any) -> None:
    """Let a `version: 7` of TensorBoardLogger and CSVLogger be a number, the directory version_7, unless a directory 7 exists.

    They take a number or text; jsonargparse tries first what typing lists first, which depends on the order of all imports.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        kind = pydoc.locate(logger.class_path) if isinstance(logger, Namespace) else None
        if isinstance(kind, type) and issubclass(kind, (TensorBoardLogger, CSVLogger)):
            arguments = logger.get("init_args", {})
            version = str(arguments.get("version"))
            if version.isdecimal() and str(int(version)) == version:
                there = Path(arguments.get("save_dir") or "", arguments.get("name") or "", version).expanduser().is_dir()
                arguments["version"] = version if there else int(version)


def _follow_task(callbacks: Any, task: str) -> None:
    """Replace `monitor: task` in callbacks by what this class of task is judged by in validation."""
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        arguments = callback and callback.get("init_args")
        if arguments and arguments.get("monitor") == "task":
            arguments.monitor, arguments.mode = getattr(pydoc.locate(task), "monitor", Task.monitor)


def _agree_on_tokenizer(data: Any, task: Any) -> None:
    """Set the tokenizer that task or data leaves open: to the other's, or else to the model's own."""
    if "tokenizer" not in data or "model" not in task:
        return
    names = {name for name in (data.tokenizer, task.get("tokenizer")) if name}
    if len(names) > 1:
        raise UserError(
            f"data.init_args.tokenizer={data.tokenizer!r} and model.task.init_args.tokenizer={task.tokenizer!r} must be the "
            "same; set one of them, or neither for the model's own"
        )
    data.tokenizer = next(iter(names), tokenizer_name(task.model, bool(task.get("tiny"))))
    if "tokenizer" in task:
        task.tokenizer = data.tokenizer


def user_error(error: BaseException | None) -> BaseException | None:
    """Return the user's mistake in a chain of causes; None for what may be a bug of ours.

    It is a UserError, the error of a full disk, Lightning's MisconfigurationException, or a package that is not installed.
    """
    if isinstance(error, OSError):
        return write_error(error)
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, (MisconfigurationException, ModuleNotFoundError)):
            return UserError(" ".join(str(error).split()))
        error = error.__cause__
    return error
