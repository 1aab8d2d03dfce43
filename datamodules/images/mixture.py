"""Several image classification tasks at once, through one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from datamodules.images.data_module import ImageDataModule
from datamodules.mixture import MixtureDataModule, MixtureTask, SeededConcatDataset
from datamodules.shared.splits import TRAIN


class ImageMixtureDataModule(MixtureDataModule):
    """Several image data sets, trained together and tested one by one; see MixtureDataModule.

    Args:
        tasks: the data sets by name, in the order of their classes.
        directory: local directory with a folder of its name for every task that names no directory of its own; None for the
            hub.
        revision: as for ImageDataModule, like all that follow.
        batch_size: images per batch and process, of all tasks.
        num_workers: loading processes of each loader; 0 loads in the main process.
        image_size: height and width of the images that the model gets, in pixels; None is the model's own.
        mean: mean of each color channel, of values from 0 to 1; None is the model's own.
        std: standard deviation of each color channel; None is the model's own.
        validation_fraction: share of each task's train held out for validation, where it has no validation split.
        seed: decides which images are held out.
        synthetic: generate a tiny data set of 4 classes for every task and read that.

    Raises:
        UserError: an argument is invalid, or a directory is missing, incomplete or inconsistent.
    """

    def __init__(
        self,
        tasks: Mapping[str, MixtureTask],
        directory: str | None = None,
        revision: str | None = None,
        batch_size: int = 128,
        num_workers: int = 4,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        synthetic: bool = False,
    ) -> None:
        def task_module(name: str, task: MixtureTask) -> ImageDataModule:
            own = task.directory or (f"{directory}/{name}" if directory else None)
            return ImageDataModule(
                task.dataset or name,
                own,
                revision=None if task.directory else revision,
                batch_size=batch_size,
                num_workers=num_workers,
                image_size=image_size,
                mean=mean,
                std=std,
                validation_fraction=validation_fraction,
                seed=seed,
                synthetic=synthetic,
            )

        super().__init__(tasks, task_module, batch_size=batch_size, num_workers=num_workers, seed=seed, revision=revision)

    def follow_model(self, **told: Any) -> list[str]:
        """As for ImageDataModule; all tasks have the same arguments."""
        return [task.follow_model(**told) for task in self._tasks.values() if isinstance(task, ImageDataModule)].pop()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        sets = self.sets(TRAIN).values()
        return self.train_loader(SeededConcatDataset(sets), weights=self.train_weights(sets), with_seeds=True)
