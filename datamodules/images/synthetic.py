"""Tiny generated data sets in the files of the real ones, for runs without data. An image's class is its color."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from datamodules.shared.splits import TEST, TRAIN, VALIDATION

COLORS = {"blue": (40, 70, 200), "green": (50, 160, 60), "red": (200, 50, 50), "yellow": (220, 200, 50)}
IMAGES_PER_CLASS = {TRAIN: 8, VALIDATION: 4, TEST: 4}

_SUFFIXES = {"JPEG": "jpg", "PNG": "png"}


def write_parquet_files(directory: Path, size: tuple[int, int], file_format: str, splits: Iterable[str]) -> None:
    """Write parquet files as the hub has them: an image column, a ClassLabel column, and their metadata.

    Args:
        directory: gets a `data` folder with one file a split.
        size: width and height in pixels.
        file_format: "JPEG" or "PNG".
        splits: which splits to write.
    """
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLORS))})
    (directory / "data").mkdir()
    for split in splits:
        rows: dict[str, list[Any]] = {"image": [], "label": []}
        for label, name in enumerate(COLORS):
            for number, content in enumerate(_generate(split, name, size, file_format)):
                rows["image"].append({"bytes": content, "path": f"{name}_{number}.{_SUFFIXES[file_format]}"})
                rows["label"].append(label)
        table = datasets.Dataset.from_dict(rows, features=features)
        pq.write_table(table.with_format("arrow")[:], directory / "data" / f"{split}-00000-of-00001.parquet")


def write_class_folders(directory: Path, size: tuple[int, int], file_format: str, splits: Iterable[str]) -> None:
    """Write `<split>/<class name>/<number>.<suffix>`; arguments as for `write_parquet_files`."""
    for split in splits:
        for name in COLORS:
            folder = directory / split / name
            folder.mkdir(parents=True)
            for number, content in enumerate(_generate(split, name, size, file_format)):
                (folder / f"{number}.{_SUFFIXES[file_format]}").write_bytes(content)


def _generate(split: str, name: str, size: tuple[int, int], file_format: str) -> list[bytes]:
    """Return encoded images of one class: its color with noise, the same bytes in every process."""
    seed = (list(IMAGES_PER_CLASS).index(split), list(COLORS).index(name))
    random = np.random.default_rng(seed)
    contents = []
    for _ in range(IMAGES_PER_CLASS[split]):
        noise = random.normal(scale=25, size=(size[1], size[0], 3))
        pixels = (np.array(COLORS[name]) + noise).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=file_format)
        contents.append(buffer.getvalue())
    return contents
