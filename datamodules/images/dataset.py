"""The images of one split, the torch dataset over them, and the validation images held out of train."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import Dataset

from datamodules.images.decoding import decode_rgb
from datamodules.images.files import check_usable, read_file
from fourier_moe.errors import printable


class ImageSplit(ABC):
    """The images of one split, still encoded.

    Attributes:
        ids: one unique, stable name for each image.
        labels: the class index of each image, or None for images without labels.
    """

    def __init__(self, ids: Sequence[str], labels: Sequence[int] | None) -> None:
        self.ids = ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, str]:
        """Return the encoded image and the name by which an error should call it."""

    def check(self, indices: Sequence[int]) -> None:
        """Raise UserError if any of these images is broken. By default checks nothing."""
        return


class FileSplit(ImageSplit):
    r"""Images in files of their own.

    An id is the path relative to `root`, with forward slashes; control characters and bytes that are not UTF-8 are written
    as escapes (`caf\xe9.jpg`), so that ids can be printed and written to files.
    """

    def __init__(self, root: Path, paths: Sequence[Path], labels: Sequence[int] | None) -> None:
        super().__init__([printable(path.relative_to(root).as_posix()) for path in paths], labels)
        self._paths = paths

    def read(self, index: int) -> tuple[bytes, str]:
        path = self._paths[index]
        return read_file(path), str(path)

    def check(self, indices: Sequence[int]) -> None:
        check_usable(self._paths[index] for index in indices)


class TableSplit(ImageSplit):
    """Images in the rows of a table; an id is `<split>/<row>`, because file names in tables need not be unique.

    Args:
        table: the rows.
        image_column: column of type `datasets.Image`, or of a type that casts to it.
        labels: the class index of each row.
        split: the split's name, for the ids.
    """

    def __init__(self, table: datasets.Dataset, image_column: str, labels: Sequence[int], split: str) -> None:
        super().__init__([f"{split}/{row}" for row in range(len(table))], labels)
        self._column = image_column
        self._table = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    def read(self, index: int) -> tuple[bytes, str]:
        image = self._table[index][self._column]
        content = image["bytes"] if image["bytes"] is not None else read_file(Path(image["path"]))
        return content, self.ids[index]


class ImageDataset(Dataset[dict[str, Any]]):
    """Decoded and transformed images of a split.

    An item is a dict: `image` uint8 (3, H, W), `label` int (absent where the split has no labels), `id` str.

    Args:
        split: where the images come from.
        indices: which of the split's images, in this order.
        transform: from an RGB image to a tensor.
    """

    def __init__(self, split: ImageSplit, indices: Sequence[int], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.split = split
        self.indices = indices
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        """Return the example at a place, or at the first of a pair, whose second seeds what `transform` draws from torch."""
        if isinstance(item, int):
            return self._example(item)
        place, seed = item
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's generator, too
        try:
            return self._example(place)
        finally:
            torch.set_rng_state(state)

    def _example(self, place: int) -> dict[str, Any]:
        index = self.indices[place]
        example: dict[str, Any] = {"image": self.transform(decode_rgb(*self.split.read(index))), "id": self.split.ids[index]}
        if self.split.labels is not None:
            example["label"] = self.split.labels[index]
        return example
