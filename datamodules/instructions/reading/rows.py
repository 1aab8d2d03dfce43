"""Rows of a user's own data: of a JSON or parquet file, or of a data set on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.shared import json_items
from fourier_moe.errors import UserError

SUFFIXES = (*json_items.SUFFIXES, ".parquet")
HUB = "hub:"

_PATH = re.compile("([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/([^/]+))?")  # a revision may be refs/convert/parquet
_HUB_BATCH = 100  # rows of a stream that are converted together
_REASON_CHARACTERS = 300  # of an error from below


class HubSplit(NamedTuple):
    """A split of a data set on the Hugging Face hub, written `hub:owner/name[@revision][/config][:split]`."""

    dataset: str
    revision: str | None
    config: str | None
    split: str | None

    @property
    def name(self) -> str:
        """What batches, logs and reports call it."""
        name = self.dataset.rpartition("/")[2]
        return f"{name}-{self.config}" if self.config else name

    @classmethod
    def parse(cls, written: str) -> HubSplit:
        """Return the split that a text names.

        Raises:
            UserError: it names none.
        """
        path, _, split = written.removeprefix(HUB).partition(":")
        found = _PATH.fullmatch(path)
        if found is None:
            raise UserError(
                f"'{written}' names no data set on the hub; expected {HUB}owner/name, behind it @revision, /config and :split "
                "where they are needed"
            )
        dataset, revision, config = found.groups()
        return cls(dataset, revision, config, split or None)

    def load(self, **options: Any) -> Any:
        """Return the split as the `datasets` library loads it, with the options of `load_dataset`.

        Raises:
            UserError: it cannot be loaded.
        """
        assert self.split is not None
        try:
            return datasets.load_dataset(self.dataset, self.config, split=self.split, revision=self.revision, **options)
        except Exception as error:  # the hub, the network, files of many formats: each has its own errors
            reason = " ".join(f"{error}".split())[:_REASON_CHARACTERS]
            raise UserError(
                f"'{self}' cannot be loaded ({reason}); without a network give a file of it, as JSON lines or parquet"
            ) from error

    def __str__(self) -> str:
        parts = (("@", self.revision), ("/", self.config), (":", self.split))
        return HUB + self.dataset + "".join(f"{mark}{part}" for mark, part in parts if part)


def read_rows(file: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield every row with its name in errors: `'a.jsonl' line 3`, `'a.parquet' row 3`.

    Args:
        file: the path of a JSON or parquet file, or a HubSplit as text.

    Raises:
        UserError: it cannot be read.
    """
    if str(file).startswith(HUB):
        yield from _named(HubSplit.parse(str(file)).load(), str(file))
        return
    path = Path(file)
    if path.suffix.lower() != ".parquet":
        yield from json_items.read_items(path)
        return
    yield from _named(_parquet_rows(path), f"'{path}'")


class Row(NamedTuple):
    """A row that is parsed where it is used.

    Attributes:
        number: its position in the file, from 0.
        where: its name in errors.
        item: parses and returns it.
    """

    number: int
    where: str
    item: Callable[[], Any]


def stream_rows(file: str) -> Iterator[Row]:
    """Yield the rows of a file or of a split of the hub one by one, without reading what comes after them.

    Raises:
        UserError: it cannot be read, or is a JSON list, which has no end before it is read.
    """
    if file.startswith(HUB):
        items = _named(_hub_stream(HubSplit.parse(file)), file)
    elif file.lower().endswith(".parquet"):
        items = _named(_parquet_rows(Path(file)), f"'{file}'")
    else:
        for number, (where, line) in enumerate(json_items.read_lines(Path(file))):
            yield Row(number, where, partial(json_items.parse_line, line, where))
        return
    for number, (where, item) in enumerate(items):
        yield Row(number, where, partial(_same, item))


def _same(item: Any) -> Any:
    return item


def _named(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[tuple[str, Any]]:
    """Yield rows of Arrow tables with their names, without the fields of nested objects that Arrow filled in.

    The objects of a column all have the same fields there. Those that an object does not have are None: the arguments of
    every other function, in a tool call.
    """
    for number, row in enumerate(rows, start=1):
        yield f"{where} row {number}", {name: _without_none(value) for name, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _hub_stream(split: HubSplit) -> Iterator[dict[str, Any]]:
    """Yield all rows in every process. In a loading process `datasets` gives some of the files only, except as batches."""
    for batch in split.load(streaming=True).iter(_HUB_BATCH):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"'{path}' is not a complete parquet file ({error}); download it again") from error
