"""Log values and figures immediately, at a callback's own intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150  # pixels per inch of a figure


def logged_step(trainer: L.Trainer) -> int:
    """Return the step under which Lightning logs the values of the training step that has just ended."""
    return max(trainer.global_step - 1, 0)


def log_now(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Log to all loggers, and for callbacks that monitor it; pl_module.log knows the trainer's interval only."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=logged_step(trainer))
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def tensorboards(trainer: L.Trainer) -> list[Any]:
    """Return the TensorBoard writers of this run; none outside of the main process."""
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [board.experiment for board in boards] if trainer.is_global_zero else []


def takes_images(trainer: L.Trainer) -> bool:
    """Return whether a logger of this process takes images."""
    return trainer.is_global_zero and any(isinstance(logger, tuple(_SHOW)) for logger in trainer.loggers)


def show_images(trainer: L.Trainer, images: Mapping[str, np.ndarray]) -> None:
    """Log images (height, width, 4) by tag in TensorBoard, W&B and MLflow."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        for kind, show in _SHOW.items():
            for tag, image in images.items() if isinstance(logger, kind) else ():
                show(logger, tag, image, logged_step(trainer))


def _in_tensorboard(logger: Any, tag: str, image: np.ndarray, step: int) -> None:
    logger.experiment.add_image(tag, image, step, dataformats="HWC")


def _in_wandb(logger: Any, tag: str, image: np.ndarray, step: int) -> None:
    import wandb  # is there, since its logger is

    logger.log_metrics({tag: wandb.Image(image)}, step)


def _in_mlflow(logger: Any, tag: str, image: np.ndarray, step: int) -> None:
    logger.experiment.log_image(logger.run_id, image, f"{tag}/step_{step:06}.png")


_SHOW: dict[type[Logger], Callable[..., None]] = {
    TensorBoardLogger: _in_tensorboard,
    WandbLogger: _in_wandb,
    MLFlowLogger: _in_mlflow,
}


def write_images(directory: Path, images: Mapping[str, np.ndarray]) -> None:
    """Write images (height, width, 4) by name as PNG."""
    for name, image in images.items():
        Image.fromarray(image).save(directory / f"{name}.png")


def rendered(figures: Mapping[str, Figure]) -> dict[str, np.ndarray]:
    """Render figures by tag. Layout and drawing take seconds: do it once for all that shows them."""
    return {tag: pixels(figure) for tag, figure in figures.items()}


def pixels(figure: Figure) -> np.ndarray:
    """Render a figure as an image (height, width, 4), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def short_names(names: Sequence[str]) -> list[str]:
    """Return the names without the dotted parts that all of them share; the last part stays."""
    split = [name.split(".") for name in names]
    differs = [len(set(parts)) > 1 for parts in zip(*(parts[:-1] for parts in split), strict=False)]
    if len({len(parts) for parts in split}) > 1:  # parts of the same place only compare as long as nothing differs
        differs = [any(differs[: place + 1]) for place in range(len(differs))]
    return [".".join(part for place, part in enumerate(parts) if differs[place : place + 1] != [False]) for parts in split]
