"""The table of image data sets. A new one is a new row of `BENCHMARKS`."""

import difflib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from datamodules.images.directory import LAYOUTS
from datamodules.images.parquet import LoadedTables, ParquetFiles
from datamodules.images.source import ImageSource
from datamodules.images.synthetic import write_class_folders, write_parquet_files
from datamodules.shared.custom import CUSTOM
from datamodules.shared.hub import HubDataset
from datamodules.shared.splits import TEST, TRAIN, VALIDATION
from fourier_moe.errors import UserError

DIGITS = Path(__file__).parents[2] / "examples/digits_tower/digits.npz"  # in the wheel, too


@dataclass(frozen=True, kw_only=True)
class ImageBenchmark(ABC):
    """One data set: what is known of it without having it, and where to get it when no directory is given.

    Attributes:
        num_classes: number of classes of the complete set; None if that is up to the user.
        splits: what each split is called where the set comes from; "validation" only where the set has its own.
        sizes: number of images of each split of the complete set.
        image_size: typical width and height in pixels; generated images have it.
        file_format: "JPEG" or "PNG"; generated images have it.
        needs_directory: whether there is nowhere else to get it from.
        on_hub: whether it comes from the hub, where it has revisions.
        write_synthetic: writes generated files in the set's own layout: directory, image size, file format, splits.
    """

    num_classes: int | None
    splits: Mapping[str, str] = field(default_factory=lambda: {TRAIN: "train", TEST: "test"})
    sizes: Mapping[str, int] = field(default_factory=dict)
    image_size: tuple[int, int]
    file_format: str
    needs_directory: bool = False
    on_hub: bool = False
    write_synthetic: Callable[[Path, tuple[int, int], str, Iterable[str]], None] = write_parquet_files

    def download(self, name: str, revision: str | None) -> None:
        """Fetch the newest version of what `open` needs. By default does nothing.

        Args:
            name: the set's key in the table.
            revision: branch, tag or commit of the hub's data set; None for its newest commit.
        """
        return

    @abstractmethod
    def open(self, name: str, revision: str | None = None) -> ImageSource:
        """Return the data set without a local directory; arguments as for `download`."""


@dataclass(frozen=True, kw_only=True)
class HubBenchmark(ImageBenchmark):
    """A data set on the Hugging Face hub. Of its splits only those in `splits` are fetched.

    Attributes:
        hub_id: its name there.
        folder: where its parquet files are there.
    """

    hub_id: str
    folder: str = "data"
    on_hub: bool = True

    def download(self, name: str, revision: str | None) -> None:
        dataset = self._dataset(name, revision)
        dataset.look_up()
        source = self._open(name, dataset)
        for split in self.splits:
            source.load(split)

    def open(self, name: str, revision: str | None = None) -> ImageSource:
        return self._open(name, self._dataset(name, revision))

    def _dataset(self, name: str, revision: str | None) -> HubDataset:
        includes = " ".join(f"--include '{self.folder}/{split}*'" for split in self.splits.values())
        return HubDataset(
            name,
            self.hub_id,
            [self.folder],
            revision,
            f"Without access to the hub, fetch `hf download {self.hub_id} --repo-type dataset {includes} --local-dir DIR` "
            f"elsewhere and give --data.directory DIR/{self.folder}, or give class folders {{train,test}}/<class name>/*.jpg",
        )

    def _open(self, name: str, dataset: HubDataset) -> ImageSource:
        files = dataset.files(self.splits.values())
        by_split = {split: files[hub_split] for split, hub_split in self.splits.items()}
        source = ParquetFiles(by_split, dataset.origin, revision=dataset.commit)
        if len(source.class_names) != self.num_classes:
            raise UserError(
                f"dataset '{name}' has {len(source.class_names)} classes on the hub ('{self.hub_id}') where "
                f"{self.num_classes} are expected: the hub's version has changed; give an older commit as --data.revision"
            )
        return source


@dataclass(frozen=True, kw_only=True)
class DigitsBenchmark(ImageBenchmark):
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn has, too: half of each class for train, half for test.

    The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
    1998, CC BY 4.0); values 0 to 16.
    """

    def open(self, name: str, revision: str | None = None) -> ImageSource:
        return LoadedTables(_digits(), "the bundled digits")


@functools.cache  # one process may run many times: compare, sweep
def _digits() -> dict[str, datasets.Dataset]:
    """Return the tables of digits by split."""
    stored = np.load(DIGITS)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    tables = {}
    for split in (TRAIN, TEST):
        pixels = (stored[f"{split}_images"] * (255 / 16)).astype(np.uint8)
        images = [Image.fromarray(image).convert("RGB") for image in pixels]
        rows = {"image": images, "label": stored[f"{split}_labels"].tolist()}
        tables[split] = datasets.Dataset.from_dict(rows, features=features)
    return tables


@dataclass(frozen=True, kw_only=True)
class CustomBenchmark(ImageBenchmark):
    """The user's own images; the classes are whatever the directory holds."""

    needs_directory: bool = True
    write_synthetic: Callable[[Path, tuple[int, int], str, Iterable[str]], None] = write_class_folders

    def open(self, name: str, revision: str | None = None) -> ImageSource:
        raise UserError(f"dataset '{name}' needs directory: a directory with {LAYOUTS}")


BENCHMARKS: dict[str, ImageBenchmark] = {
    "cars": HubBenchmark(
        hub_id="tanganke/stanford_cars",
        num_classes=196,
        sizes={TRAIN: 8144, TEST: 8041},
        image_size=(96, 64),
        file_format="JPEG",
    ),
    "dtd": HubBenchmark(
        hub_id="tanganke/dtd",
        num_classes=47,
        sizes={TRAIN: 3760, TEST: 1880},
        image_size=(80, 72),
        file_format="JPEG",
    ),
    "eurosat": HubBenchmark(
        hub_id="tanganke/eurosat",
        num_classes=10,
        sizes={TRAIN: 21600, TEST: 2700},
        image_size=(64, 64),
        file_format="JPEG",
    ),
    "gtsrb": HubBenchmark(
        hub_id="tanganke/gtsrb",
        num_classes=43,
        sizes={TRAIN: 26640, TEST: 12630},
        image_size=(42, 40),
        file_format="PNG",
    ),
    "resisc45": HubBenchmark(
        hub_id="tanganke/resisc45",
        num_classes=45,
        sizes={TRAIN: 18900, TEST: 6300},
        image_size=(64, 64),
        file_format="JPEG",
    ),
    "svhn": HubBenchmark(
        hub_id="ufldl-stanford/svhn",
        folder="cropped_digits",
        num_classes=10,
        sizes={TRAIN: 73257, TEST: 26032},
        image_size=(32, 32),
        file_format="PNG",
    ),
    "sun397": HubBenchmark(  # the partition with the paper's sizes
        hub_id="dpdl-benchmark/sun397",
        splits={TRAIN: "train", VALIDATION: "validation", TEST: "test"},
        num_classes=397,
        sizes={TRAIN: 76128, VALIDATION: 10875, TEST: 21750},
        image_size=(80, 64),
        file_format="JPEG",
    ),
    "sun397_19850": HubBenchmark(  # the first official partition: 50 images a class and split
        hub_id="tanganke/sun397",
        num_classes=397,
        sizes={TRAIN: 19850, TEST: 19850},
        image_size=(80, 64),
        file_format="JPEG",
    ),
    "digits": DigitsBenchmark(
        num_classes=10,
        sizes={TRAIN: 898, TEST: 899},
        image_size=(8, 8),
        file_format="PNG",
    ),
    CUSTOM: CustomBenchmark(
        num_classes=None,
        image_size=(64, 48),
        file_format="JPEG",
    ),
}


def find_benchmark(name: str) -> ImageBenchmark:
    """Look up a row of the table.

    Raises:
        UserError: there is no such row; names like it are suggested.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS)
        suggestion = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UserError(f"dataset '{name}' is unknown{suggestion}; choose one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
