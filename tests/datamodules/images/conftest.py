"""Tiny data sets on disk."""

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

Rows = list[tuple[bytes, int]]


@pytest.fixture
def encode() -> Callable[..., bytes]:
    def encode(image: Image.Image | None = None, file_format: str = "JPEG", **options: object) -> bytes:
        buffer = io.BytesIO()
        (image or Image.new("RGB", (12, 10), (200, 30, 30))).save(buffer, format=file_format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def make_folders(tmp_path: Path, encode: Callable[..., bytes]) -> Callable[[dict[str, dict[str, int]]], Path]:
    """Class folders from ``{split: {class name: number of images}}``."""

    def make(splits: dict[str, dict[str, int]]) -> Path:
        for split, classes in splits.items():
            for name, count in classes.items():
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    (folder / f"{number}.jpg").write_bytes(encode())
        return tmp_path / "images"

    return make


@pytest.fixture
def write_parquet() -> Callable[..., None]:
    """A parquet file with Hugging Face metadata if class names are given, and without any if not."""

    def write(path: Path, rows: Rows, names: list[str] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [{"bytes": content, "path": None} for content, _ in rows]
        labels = [label for _, label in rows]
        if names is None:
            image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            columns = {"picture": pa.array(images, type=image_type), "kind": pa.array(labels, type=pa.int64())}
            pq.write_table(pa.table(columns), path)
        else:
            features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=names)})
            table = datasets.Dataset.from_dict({"picture": images, "kind": labels}, features=features)
            pq.write_table(table.with_format("arrow")[:], path)

    return write
