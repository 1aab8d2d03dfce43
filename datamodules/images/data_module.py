"""The image classification benchmarks as one LightningDataModule."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.images.benchmarks import find_benchmark
from datamodules.images.dataset import FileSplit, ImageDataset, ImageSplit
from datamodules.images.decoding import IMAGE_EXTENSIONS
from datamodules.images.directory import open_directory
from datamodules.images.files import describe_left_out, find_files
from datamodules.images.source import ImageSource
from datamodules.images.transforms import CLIP_MEAN, CLIP_STD, eval_transform, normalization, train_transform
from datamodules.shared.arguments import require
from datamodules.shared.custom import current_name
from datamodules.shared.data_module import BaseDataModule, incomplete
from datamodules.shared.loading import require_shared_memory
from datamodules.shared.sampling import hold_out
from datamodules.shared.splits import PREDICT, TEST, TRAIN, VALIDATION
from fourier_moe.errors import UserError

_DEFAULTS: dict[str, Any] = {"image_size": 224, "mean": CLIP_MEAN, "std": CLIP_STD}  # without a model
_SPLITS_OF_STAGE = {
    "fit": (TRAIN, VALIDATION),
    "validate": (VALIDATION,),
    "test": (TEST,),
    "predict": (PREDICT,),
}


class ImageDataModule(BaseDataModule):
    """Images and class labels from the Hugging Face hub, from a local directory, or generated.

    A batch is a dict: `image` float32 (B, 3, image_size, image_size), normalized; `label` int64 (B,), absent for
    images of `predict_directory`; `id` list of B strings, the path relative to the directory or `test/123` for
    row 123 of a table. The loaders give the images as uint8; a trainer normalizes them once they are on the model's device
    (without a trainer: `normalize`).

    A local directory holds class folders `{train,test[,val]}/<class name>/*.jpg` or the hub's parquet files
    (`train*.parquet`, `test*.parquet`, perhaps `validation*.parquet`, there or in `data/`). Class folders are read at
    any depth. Files and folders that are not used are named in a warning.

    Args:
        dataset: which data set: cars, dtd, eurosat, gtsrb, resisc45, svhn, sun397 (the paper's partition), sun397_19850
            (50 train images a class), digits (bundled), or custom (your own images in `directory`).
        directory: local directory to read instead of the hub. The classes are those found there.
        revision: branch, tag or commit of the hub's data set; None for the newest commit.
        predict_directory: directory of images without labels, in any layout, for predict. Without it, predict goes
            through the test split.
        batch_size: images a batch and process.
        num_workers: loading processes of each loader; 0 loads in the main process.
        image_size: height and width of the images that the model gets, in pixels. None is the model's own, told by
            `follow_model`; without a model 224.
        mean: mean of each color channel, of values from 0 to 1. None is the model's own; without a model CLIP's.
        std: standard deviation of each color channel, as for mean.
        validation_fraction: share of train held out for validation, where there is no validation split.
        seed: decides which images are held out for validation. Their order in training follows the run's own seed
            (seed_everything), so that runs with several seeds share their splits.
        synthetic: generate a tiny data set of 4 classes and read that, for trying things out without data.

    Raises:
        UserError: an argument is invalid, or the directory is missing, incomplete or inconsistent.
    """

    def __init__(
        self,
        dataset: str,
        directory: str | None = None,
        revision: str | None = None,
        predict_directory: str | None = None,
        batch_size: int = 128,
        num_workers: int = 4,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        synthetic: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            directory=directory,
            synthetic=synthetic,
            revision=revision,
        )
        dataset = current_name(dataset, former="folder")
        self._benchmark = find_benchmark(dataset)
        require("image_size", image_size, image_size is None or image_size >= 1, "1 or more")
        require("mean", mean, mean is None or (len(mean) == 3 and all(map(math.isfinite, mean))), "three numbers")
        is_std = std is None or (len(std) == 3 and all(0 < value < math.inf for value in std))
        require("std", std, is_std, "three positive numbers")
        require("validation_fraction", validation_fraction, 0 < validation_fraction < 1, "between 0 and 1, exclusive")
        has_revisions = revision is None or self._benchmark.on_hub
        require("revision", revision, has_revisions, f"null for '{dataset}', which is not on the hub")
        if self._benchmark.needs_directory and directory is None and predict_directory is None and not synthetic:
            self._benchmark.open(dataset)  # says what is needed

        self.dataset = dataset
        self._given = {"image_size": image_size, "mean": mean and tuple(mean), "std": std and tuple(std)}
        self._used: dict[str, Any] = {}
        self.validation_fraction = validation_fraction
        self._predict_directory = None if predict_directory is None else Path(predict_directory).expanduser()
        if self._predict_directory is not None and not self._predict_directory.is_dir():
            raise UserError(f"predict_directory '{predict_directory}' does not exist; expected a directory of images")

        self._class_names: list[str] = []
        self._source: ImageSource | None = None
        self._datasets: dict[str, ImageDataset] = {}
        self.follow_model()
        if self._is_local:
            self._open()

    def follow_model(
        self,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> list[str]:
        """Take over what the model reads where the DataModule's own argument is None. The task calls it before `setup`.

        Returns:
            A line for each argument that differs from the model's, and for what neither says; the line names what is used.
        """
        told = {"image_size": image_size, "mean": mean, "std": std}
        known = {name: told[name] if value is None else value for name, value in self._given.items()}
        used: dict[str, Any] = {name: default if known[name] is None else known[name] for name, default in _DEFAULTS.items()}
        if used != self._used:
            self._used, self.image_size = used, int(used["image_size"])
            self._train_transform = train_transform(self.image_size)
            self._eval_transform = eval_transform(self.image_size)
            self._normalization = normalization(used["mean"], used["std"])
            self._datasets.clear()  # made with the earlier transforms
        return [
            f"data.{name}={used[name]} is used; the model's own is {'unknown' if value is None else value}"
            for name, value in told.items()
            if (known[name] is None if value is None else value != used[name])
        ]

    @property
    def dataset_name(self) -> str:
        return self.dataset

    @property
    def batch_keys(self) -> tuple[str, ...]:
        return "image", "label"

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for `custom` with nothing but a `predict_directory`."""
        return len(self._class_names) or self._benchmark.num_classes

    @property
    def class_names(self) -> list[str]:
        """The name of each class, by label. Empty for a hub data set that `setup` has not loaded yet."""
        return self._class_names

    @property
    def num_train_examples(self) -> int | None:
        """Images of an epoch, by the table before they are loaded; None if neither is known yet."""
        if TRAIN in self._datasets:
            return len(self._datasets[TRAIN])
        if self._is_local:
            return len(self._select(TRAIN)[1])
        if TRAIN not in self._benchmark.sizes:
            return None
        held_out = 0.0 if VALIDATION in self._benchmark.splits else self.validation_fraction
        return round(self._benchmark.sizes[TRAIN] * (1 - held_out))

    @property
    def data_revision(self) -> str | None:
        """The commit of the hub's data set that was read; None for other images."""
        return None if self._source is None else self._source.revision

    @property
    def evaluation_notes(self) -> dict[str, str]:
        """What a reader of the results has to know, by name of the test set, which is called test."""
        note = self._incomplete(TEST)
        return {"test": note} if note else {}

    def prepare_data(self) -> None:
        """Download the data set, if it comes from the hub and this run needs it.

        Raises:
            UserError: the batches of the workers do not fit into shared memory, or the hub cannot be reached.
        """
        predicts_files = self.trainer is not None and self.trainer.predicting and self._predict_directory is not None
        if not self._is_local and not predicts_files:
            if self._benchmark.sizes:
                self._require_shared_memory(max(self._benchmark.sizes.values()))
            self._benchmark.download(self.dataset, self._revision)

    def setup(self, stage: str) -> None:
        """Load what the stage needs, once; the train and validation splits for "fit", one split for the others.

        "fit" checks the images of the test split, too.

        Raises:
            UserError: image files are broken, a class to be evaluated has no train images, there are no images, or the hub
                cannot be reached.
        """
        missing = [split for split in _SPLITS_OF_STAGE[stage] if split not in self._datasets]
        if stage == "fit" and missing:  # a broken test image should not come to light after the training
            images, indices = self._select(TEST)
            images.check(indices)
        for split in missing:
            images, indices = self._select(split)
            images.check(indices)
            transform = self._train_transform if split == TRAIN else self._eval_transform
            self._datasets[split] = ImageDataset(images, indices, transform)
        if missing:
            self._require_shared_memory(max(len(self._datasets[split]) for split in missing))
            rank_zero_info(self._summary(missing))

    def forget(self) -> None:
        self._source = None
        self._datasets.clear()

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the model gets for the loaders' uint8 images (..., 3, H, W): float32, normalized with mean and std."""
        return self._normalization(images)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Normalize the images on the model's device."""
        return {**batch, "image": self.normalize(batch["image"])}

    def datasets(self, part: str) -> dict[str, ImageDataset]:
        """After `setup`: the set of `train`, `validation`, `test` or `predict`, by that name."""
        return {part: self._datasets[part]}

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.train_loader(self._datasets[TRAIN], with_seeds=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._evaluation_loader(VALIDATION)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._evaluation_loader(TEST)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._evaluation_loader(PREDICT)

    def _evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        return self.evaluation_loaders({split: self._datasets[split]})[split]

    def _require_shared_memory(self, num_images: int) -> None:
        num_processes = 1 if self.trainer is None else self.trainer.num_devices
        require_shared_memory(self.num_workers, self.batch_size, num_images, 3 * self.image_size**2, num_processes)

    @property
    def _is_local(self) -> bool:
        return self.synthetic or self._directory is not None

    def _open(self) -> ImageSource:
        """Open the data set wherever it is, once."""
        if self._source is None:
            if self.synthetic:
                self._source = self._generate()
            elif self._directory is not None:
                self._source = open_directory(self._directory)
            else:
                self._source = self._benchmark.open(self.dataset, self._revision)
            self._class_names = self._source.class_names
            _warn(self._source.notes)
        return self._source

    def _generate(self) -> ImageSource:
        root = self.generated_directory()
        (root / "data_set").mkdir()
        benchmark = self._benchmark
        benchmark.write_synthetic(root / "data_set", benchmark.image_size, benchmark.file_format, benchmark.splits)
        return open_directory(root / "data_set", cache_dir=root / "cache")

    def _select(self, split: str) -> tuple[ImageSplit, Sequence[int]]:
        """Return the images that a split is taken from, and which of them it consists of."""
        if split == PREDICT and self._predict_directory is not None:
            files = _list_predict_files(self._predict_directory)
            return files, range(len(files))
        source = self._open()
        if split in (TRAIN, VALIDATION) and VALIDATION not in source.splits:
            images = source.load(TRAIN)
            assert images.labels is not None
            train, validation = hold_out(images.labels, self.validation_fraction, self.seed)
            return images, train if split == TRAIN else validation
        images = source.load(TEST if split == PREDICT else split)
        return images, range(len(images))

    def _incomplete(self, split: str) -> str:
        """Return how many images a loaded split has if the table says another number; empty for a complete one."""
        held_out = self._source is not None and split not in self._source.splits
        official = None if held_out else self._benchmark.sizes.get(split)
        count = len(self._datasets[split].split) if split in self._datasets else None
        return incomplete(count, official, "images")

    def _summary(self, splits: list[str]) -> str:
        parts = [f"{split} {len(self._datasets[split])}" for split in splits]
        if self._source is None or (splits == [PREDICT] and self._predict_directory is not None):
            return f"{self.dataset}: {parts[0]} images without labels, from '{self._predict_directory}'"
        classes = f"{self.num_classes} classes"
        if self._benchmark.num_classes not in (None, self.num_classes):
            classes += f" (the complete set has {self._benchmark.num_classes})"
        if VALIDATION in splits and VALIDATION not in self._source.splits:
            parts[splits.index(VALIDATION)] += f" ({self.validation_fraction:.0%} held out of train)"
        if self.synthetic:
            return f"{self.dataset}: {classes}; {', '.join(parts)}; from generated {self._source.origin}"
        notes = "".join(f"; {split} has {note}" for split in splits if (note := self._incomplete(split)))
        return f"{self.dataset}: {classes}; {', '.join(parts)}{notes}; from {self._source.origin}"


def _list_predict_files(directory: Path) -> FileSplit:
    found = find_files(directory)
    notes = describe_left_out(directory, [found])
    if not found.images:
        kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise UserError("; ".join([f"predict_directory '{directory}' has no images; looked at any depth for {kinds}", *notes]))
    _warn(notes)
    return FileSplit(directory, found.images, labels=None)


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        rank_zero_warn(note)
