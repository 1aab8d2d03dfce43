"""Several examples in one row, which do not see each other: fewer tokens of padding, and fewer rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from datamodules.instructions.dataset import IGNORED, TrainDataset


class PackedDataset(Dataset[dict[str, Any]]):
    """Rows of whole examples of one task, which stay together in every epoch.

    An item is a dict: `input_ids`, `labels` and `position_ids` int64 (T,), `id` str (the first example's, and how many others),
    `task` str. Positions begin at 0 with each example, which is how transformers tells packed examples apart; nothing predicts
    the first token of an example.

    Args:
        dataset: the examples.
        max_length: of a row, in tokens; no example is longer.

    Attributes:
        lengths: tokens of each row.
        tasks: task of each row.
    """

    def __init__(self, dataset: TrainDataset, max_length: int) -> None:
        members = defaultdict(list)
        for index, task in enumerate(dataset.tasks):
            members[task].append(index)
        self._dataset = dataset
        self._rows: list[list[int]] = []
        self.tasks: list[str | None] = []
        for task, indices in members.items():
            rows = pack([dataset.lengths[index] for index in indices], max_length)
            self._rows += [[indices[place] for place in row] for row in rows]
            self.tasks += [task] * len(rows)
        self.lengths = [sum(dataset.lengths[index] for index in row) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        items = [self._dataset[index] for index in self._rows[row]]
        for item in items:
            item["labels"][0] = IGNORED
        packed: dict[str, Any] = {name: torch.cat([item[name] for item in items]) for name in ("input_ids", "labels")}
        others = f" and {len(items) - 1} more" if len(items) > 1 else ""
        return packed | {
            "position_ids": torch.cat([torch.arange(len(item["input_ids"])) for item in items]),
            "id": f"{items[0]['id']}{others}",
            "task": items[0]["task"],
        }


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide lengths among rows, the longest first, each into the fullest row that has room (best fit decreasing).

    Returns:
        The places in `lengths` of each row.
    """
    rows: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # room and number of each row, ascending
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        found = bisect_left(by_room, (lengths[place], 0))
        if found == len(by_room):
            rows.append([])
            room, row = capacity, len(rows) - 1
        else:
            room, row = by_room.pop(found)
        rows[row].append(place)
        if room > lengths[place]:
            insort(by_room, (room - lengths[place], row))
    return rows
