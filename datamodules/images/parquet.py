"""Tables of images: parquet files in a directory, or tables that the `datasets` library has already loaded."""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.images.dataset import ImageSplit, TableSplit
from datamodules.images.files import shorten
from datamodules.images.source import SPLIT_NAMES, ImageSource, check_classes
from datamodules.shared.splits import TRAIN
from fourier_moe.errors import UserError


@dataclass(frozen=True)
class _Columns:
    """The two columns that matter, and the class names if the label column carries them."""

    image: str
    label: str
    label_names: list[str] | None


class LoadedTables(ImageSource):
    """Tables in memory or memory-mapped, one a split.

    Args:
        tables: by split; train and test at least.
        origin: where the tables come from, in words.

    Raises:
        UserError: no or several image or label columns, or a class without train rows.
    """

    def __init__(self, tables: Mapping[str, datasets.Dataset], origin: str) -> None:
        self.origin = origin
        self.splits = frozenset(tables)
        self._tables = tables
        self._columns = {
            split: _find_columns(table.features, f"the {split} split of {origin}") for split, table in tables.items()
        }
        values = {split: _label_values(table, self._columns[split].label) for split, table in tables.items()}
        self.class_names, self._labels = _index_classes(values, self._columns, origin)

    def load(self, split: str) -> ImageSplit:
        return TableSplit(self._tables[split], self._columns[split].image, self._labels[split], split)


class ParquetFiles(ImageSource):
    """Parquet files as on the Hugging Face hub, with or without its metadata.

    Construction reads the label columns only; `load` hands a split's files to the `datasets` library, which keeps a
    memory-mapped copy in its cache.

    Args:
        files: the files of each split, in row order; train and test at least.
        origin: where they come from, in words.
        cache_dir: where `datasets` keeps its copy; None for its default.
        revision: the commit of the hub's data set that they are from; None for other files.

    Raises:
        UserError: an unreadable file, no or several image or label columns, or a class without train rows.
    """

    def __init__(
        self, files: Mapping[str, Sequence[Path]], origin: str, cache_dir: Path | None = None, revision: str | None = None
    ) -> None:
        self.origin, self.revision = origin, revision
        self.notes = () if revision else _describe_strays(files)
        self.splits = frozenset(files)
        self._files = files
        self._cache_dir = cache_dir
        self._columns = {split: _find_columns(_read_features(paths[0]), f"'{paths[0]}'") for split, paths in files.items()}
        values = {split: _read_column(paths, self._columns[split].label) for split, paths in files.items()}
        self.class_names, self._labels = _index_classes(values, self._columns, self.origin)

    def load(self, split: str) -> ImageSplit:
        table = datasets.load_dataset(
            "parquet",
            data_files={split: [glob.escape(str(path)) for path in self._files[split]]},  # it takes paths for patterns
            split=split,
            cache_dir=None if self._cache_dir is None else str(self._cache_dir),
        )
        return TableSplit(table, self._columns[split].image, self._labels[split], split)


def find_parquet_files(directory: Path) -> dict[str, list[Path]]:
    """Return the parquet files of each split, in `directory` or, failing that, in its `data` folder.

    A file belongs to the split whose name its own begins with, in upper or lower case.

    Raises:
        UserError: some of the numbered parts of a split (`train-00000-of-00002.parquet`) are missing, a split comes under
            two names (`val.parquet` and `dev.parquet`), or `datasets` could not read the path.
    """
    for folder in (directory, directory / "data"):
        files: dict[str, list[Path]] = {}
        for split, names in SPLIT_NAMES.items():
            by_name: dict[str, list[Path]] = {}
            for path in _list_parquet_files(folder):
                if found := [name for name in names if path.name.lower().startswith(name)]:
                    by_name.setdefault(max(found, key=len), []).append(path)
            if len(by_name) > 1:
                raise UserError(f"'{folder}' has parquet files named {shorten(by_name)} for the {split} split; keep one kind")
            for paths in by_name.values():
                files[split] = paths
        if files:
            for paths in files.values():
                _check_paths(paths)
            return files
    return {}


def _list_parquet_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".parquet" and not path.name.startswith("."))


def _describe_strays(files: Mapping[str, Sequence[Path]]) -> list[str]:
    """Return a sentence on parquet files beside those of the splits, if there are any."""
    used = {path for paths in files.values() for path in paths}
    (folder,) = {path.parent for path in used}
    strays = [path.name for path in _list_parquet_files(folder) if path not in used]
    if not strays:
        return []
    names = ", ".join(name for names in SPLIT_NAMES.values() for name in names)
    return [f"'{folder}': {len(strays)} parquet file(s) left out: {shorten(strays)}; names begin with {names}"]


def _check_paths(paths: Sequence[Path]) -> None:
    if "::" in str(paths[0]):  # to datasets, a file inside of an archive
        raise UserError(f"the path of '{paths[0]}' holds '::', which the datasets library cannot read; rename its folder")
    parts = [match for path in paths if (match := re.search(r"-(\d+)-of-(\d+)", path.name))]
    if parts:
        missing = set(range(int(parts[0][2]))) - {int(part[1]) for part in parts}
        if missing:
            raise UserError(
                f"part(s) {sorted(missing)} of {int(parts[0][2])} are missing next to '{paths[0]}'; download them as well"
            )


def _label_values(table: datasets.Dataset, column: str) -> list[int]:
    return table.select_columns([column])[:][column]


def _read_features(path: Path) -> datasets.Features:
    try:
        return datasets.Features.from_arrow_schema(pq.read_schema(path))
    except pa.ArrowInvalid as error:
        raise UserError(f"'{path}' is not a complete parquet file ({error}); download it again") from error


def _read_column(paths: Sequence[Path], column: str) -> list[int]:
    values: list[int] = []
    for path in paths:
        try:
            values += pq.read_table(path, columns=[column])[column].to_pylist()
        except (pa.ArrowInvalid, KeyError) as error:
            raise UserError(f"cannot read column '{column}' of '{path}' ({error}); download it again") from error
    return values


def _find_columns(features: datasets.Features, where: str) -> _Columns:
    """Return the image and the label column, found by type because their names differ from data set to data set."""
    images = [name for name, feature in features.items() if _holds_images(feature)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels:
        labels = [name for name, feature in features.items() if _holds_integers(feature)]
    for what, found in (("image", images), ("label", labels)):
        if len(found) != 1:
            expected = "an image column" if what == "image" else "a ClassLabel column, or else a single integer column"
            raise UserError(
                f"{where} has {len(found)} columns that could be the {what} ({shorten(found) or 'none'}) of "
                f"{shorten(features)}; exactly one is expected: {expected}"
            )
    label = features[labels[0]]
    return _Columns(images[0], labels[0], list(label.names) if isinstance(label, datasets.ClassLabel) else None)


def _holds_images(feature: object) -> bool:
    is_struct_of_bytes = isinstance(feature, dict) and feature.get("bytes") == datasets.Value("binary")
    return isinstance(feature, datasets.Image) or is_struct_of_bytes


def _holds_integers(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))


def _index_classes(
    values: Mapping[str, Sequence[int]], columns: Mapping[str, _Columns], origin: str
) -> tuple[list[str], dict[str, list[int]]]:
    """Return the class names and each row's index into them.

    With named labels the classes are train's names, and other splits are matched by name. With bare integers they are
    the values that occur in train, so labels need not start at 0.
    """
    names_by_value: dict[str, dict[int, str]] = {}
    class_names = columns[TRAIN].label_names or [str(value) for value in sorted(set(values[TRAIN]))]
    for split, split_values in values.items():
        names = columns[split].label_names or columns[TRAIN].label_names
        known = dict(enumerate(names)) if names else {value: str(value) for value in set(split_values)}
        strange = sorted(set(split_values) - set(known))
        if strange:
            raise UserError(
                f"label(s) {strange} in the {split} split of {origin} are not among its {len(known)} classes, "
                f"0 to {len(known) - 1}; rows without a label (-1) cannot be used"
            )
        names_by_value[split] = {value: known[value] for value in set(split_values)}
    check_classes({split: names.values() for split, names in names_by_value.items()}, origin)

    index_of = {name: index for index, name in enumerate(class_names)}
    labels = {
        split: [index_of[names_by_value[split][value]] for value in split_values] for split, split_values in values.items()
    }
    return class_names, labels
