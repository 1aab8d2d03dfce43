"""The commands that follow a training run."""

from __future__ import annotations

import shlex

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_modules.callbacks.results.predictions import PredictionsWriter
from lightning_modules.interruption import start_command
from lightning_modules.run_directory import run_directory
from lightning_modules.tasks import CausalLanguageModel


def next_commands(trainer: L.Trainer) -> list[str]:
    """Return the commands that test, use and export the adapter of a finished fit, and TensorBoard's; none without files.

    All processes must call it together.
    """
    directory = run_directory(trainer)
    adapter = next((directory / name for name in ("adapter", "adapter_last") if (directory / name).is_dir()), None)
    config = directory / "config.yaml"
    if trainer.fast_dev_run or adapter is None or not config.is_file():  # type: ignore[attr-defined]
        return []
    use = ["--config", str(config), "--model.adapter_path", str(adapter)]
    predicts = any(isinstance(callback, PredictionsWriter) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    writes = isinstance(getattr(trainer.lightning_module, "task", None), CausalLanguageModel)
    talk = [["chat", "--adapter", str(directory)]] if writes else []
    words = [["test", *use], *([["predict", *use]] if predicts else []), *talk, ["export", *use, "--format", "lora"]]
    commands = [f"{start_command()} {shlex.join(each)}" for each in words]
    boards = [logger.save_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [*commands, *(shlex.join(["tensorboard", "--logdir", str(board)]) for board in boards)]
