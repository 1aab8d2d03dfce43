"""GLUE as tables with the hub's columns: parquet files, of a directory or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.glue.benchmarks import GlueTask
from datamodules.glue.source import Examples, GlueSource
from datamodules.shared.hub import HubDataset
from datamodules.shared.splits import TEST
from fourier_moe.errors import UserError

HUB_ID = "nyu-mll/glue"


class ParquetFiles(GlueSource):
    """Parquet files as on the hub, `train-00000-of-00001.parquet` and so on.

    Args:
        task: which task.
        files: the files of each split, in row order.
        folder: where they are, for errors.
    """

    def __init__(self, task: GlueTask, files: Mapping[str, Sequence[Path]], folder: Path) -> None:
        self.origin = f"parquet files in '{folder}'"
        self.splits = frozenset(files)
        self._task, self._files = task, files

    def load(self, split: str) -> Examples:
        tables = []
        for path in self._files[split]:
            try:
                tables.append(pq.read_table(path))
            except pa.ArrowInvalid as error:
                raise UserError(f"'{path}' is not a complete parquet file ({error}); download it again") from error
        first = self._files[split][0]
        return read_table(pa.concat_tables(tables), self._task, split, f"'{first}'")

    def missing(self, split: str) -> str:
        return f"expected {split}-00000-of-00001.parquet there"


class HubFiles(GlueSource):
    """One task's parquet files on the hub, each split fetched when it is first loaded.

    Args:
        name: the task's name here and on the hub.
        task: its row of the table.
        revision: branch, tag or commit; None for the newest commit.
    """

    def __init__(self, name: str, task: GlueTask, revision: str | None = None) -> None:
        self.splits = frozenset(task.all_splits)
        self._task = task
        self._dataset = HubDataset(
            name,
            HUB_ID,
            [name],
            revision,
            f"Without access to the hub, fetch `hf download {HUB_ID} --repo-type dataset --include '{name}/*' --local-dir DIR` "
            f"elsewhere and give --data.directory DIR: the hub's parquet files, or GLUE's {task.folder}/train.tsv and "
            f"{task.folder}/dev*.tsv",
        )

    @property
    def origin(self) -> str:  # type: ignore[override]
        return self._dataset.origin

    @property
    def revision(self) -> str | None:  # type: ignore[override]
        return self._dataset.commit

    def look_up(self) -> None:
        self._dataset.look_up()

    def load(self, split: str) -> Examples:
        files = self._dataset.files([split])
        return ParquetFiles(self._task, files, files[split][0].parent).load(split)

    def missing(self, split: str) -> str:
        return "the hub's version has changed"


def find_parquet_files(folder: Path, task: GlueTask) -> dict[str, list[Path]]:
    """Return the parquet files by split.

    Raises:
        UserError: some of the numbered parts of a split are missing.
    """
    files = {split: sorted(folder.glob(f"{split}-[0-9]*-of-[0-9]*.parquet")) for split in task.all_splits}
    for split, paths in files.items():
        count = int(paths[0].stem.rpartition("-of-")[2]) if paths else 0
        if len(paths) != count:
            raise UserError(f"the {split} split in '{folder}' has {len(paths)} of {count} parquet files; download all of them")
    return {split: paths for split, paths in files.items() if paths}


def read_table(table: pa.Table, task: GlueTask, split: str, where: str) -> Examples:
    """Take sentences and labels out of a table with the hub's columns.

    Args:
        table: the rows of one split.
        task: says what the columns are.
        split: its name, for the ids.
        where: what to call the table in errors.

    Raises:
        UserError: A column is missing, a sentence is missing, a label is unknown, or there are no rows.
    """
    is_test = split.startswith(TEST)
    needed = task.sentences if is_test else (*task.sentences, "label")
    absent = [name for name in needed if name not in table.column_names]
    if absent:
        raise UserError(f"{where} has columns {', '.join(table.column_names)}; {', '.join(needed)} are needed")
    if not len(table):
        raise UserError(f"{where} has no examples; download it again")
    sentences = tuple(table[name].to_pylist() for name in task.sentences)
    for name, column in zip(task.sentences, sentences, strict=True):
        if None in column:
            raise UserError(f"{where}, row {column.index(None)}: no {name}; download it again")
    ids = [f"{split}/{row}" for row in range(len(table))]
    return Examples(ids, sentences, None if is_test else _labels(table, task, where))


def _labels(table: pa.Table, task: GlueTask, where: str) -> list[int]:
    feature = datasets.Features.from_arrow_schema(table.schema)["label"]
    if isinstance(feature, datasets.ClassLabel) and feature.names != list(task.class_names):
        raise UserError(
            f"{where} has classes {', '.join(feature.names)}; expected {', '.join(task.class_names)}, in this order"
        )
    labels = table["label"].to_pylist()
    for row, label in enumerate(labels):
        if label not in range(len(task.class_names)):
            raise UserError(
                f"{where}, row {row}: label {label} is unknown; labels of {task.folder} are 0 to {len(task.class_names) - 1}"
            )
    return labels
