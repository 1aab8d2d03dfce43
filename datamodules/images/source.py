"""A source is one data set as it lies somewhere: its splits, its classes, its images."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from datamodules.images.dataset import ImageSplit
from datamodules.images.files import shorten
from datamodules.shared.splits import TEST, TRAIN, VALIDATION
from fourier_moe.errors import UserError

# What folders and parquet files of a split may be called, in lower case: the names that the `datasets` library knows.
SPLIT_NAMES = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev"),
    TEST: ("test", "testing", "eval", "evaluation"),
}


class ImageSource(ABC):
    """One data set with a train and a test split and, perhaps, a validation split.

    Attributes:
        origin: where the images come from, in words.
        class_names: the classes; a label is an index into this list.
        splits: which of "train", "validation" and "test" there are.
        notes: what was found and is not used, in sentences.
        revision: the commit of the hub's data set that they are from; None for other images.
    """

    origin: str
    class_names: list[str]
    splits: frozenset[str]
    notes: Sequence[str] = ()
    revision: str | None = None

    @abstractmethod
    def load(self, split: str) -> ImageSplit:
        """Return the images of one of `splits`."""


def check_classes(classes: Mapping[str, Iterable[str]], origin: str) -> None:
    """Check that whatever is evaluated can be learned, and that every name can be written to a file.

    Args:
        classes: by split, the names of the classes that have images there.
        origin: what the data set is called in the error.

    Raises:
        UserError: A class of the validation or the test split has no train images, or a name is not UTF-8.
    """
    not_text = sorted({name for names in classes.values() for name in names if not _is_text(name)})
    if not_text:
        raise UserError(
            f"{len(not_text)} class name(s) are not UTF-8, which adapter files are written in: {shorten(not_text)} ({origin}); "
            "rename them"
        )
    learned = set(classes[TRAIN])
    for split in (VALIDATION, TEST):
        unknown = sorted(set(classes.get(split, ())) - learned)
        if unknown:
            raise UserError(
                f"{len(unknown)} class(es) of the {split} split have no train images: {shorten(unknown)} ({origin}); "
                f"add train images of them or remove them from {split}"
            )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
