"""StatisticsReader: how callbacks and scripts read what the routers of a model do."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from fourier_moe.routing.record import SHARED, Record
from fourier_moe.routing.router import routers
from fourier_moe.routing.statistics import RouterStatistics


class StatisticsReader:
    """Counts the tokens of a model's routers in every training step from now on, until it is closed or forgotten.

    Any number of readers may be open; each has its own position and takes nothing from the others. Routers count once for all
    of them, and not at all while there is none.

        reader = StatisticsReader(model)
        ...steps...
        busiest = {layer: int(statistics.load.argmax()) for layer, statistics in reader.read().items()}

    Attributes:
        routers: the model's routers by the name of their projection; those that share a router count as one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = routers(model)
        with SHARED:
            self._seen = {name: router.record.counted(router.weight) for name, router in self.routers.items()}
            records = [router.record for router in self.routers.values()]
            for record in records:
                record.add_reader()
        self._closing = weakref.finalize(self, _release, records)

    def read(self) -> dict[str, RouterStatistics]:
        """Return the statistics by projection of the tokens since the last `read`, or since the reader was made.

        Without padding; of this process, on its device.

        Raises:
            RuntimeError: if the reader is closed.
        """
        if not self._closing.alive:
            raise RuntimeError("this StatisticsReader is closed; make another one")
        statistics = {}
        for name, router in self.routers.items():
            (known, seen), (tasks, total) = self._seen[name], router.record.counted(router.weight)
            self._seen[name] = tasks, total
            new = total.clone()
            new[[tasks.index(task) for task in known]] -= seen
            statistics[name] = RouterStatistics.of_tasks(tasks, new)
        return statistics

    @property
    def has_counted(self) -> bool:
        """Whether any router has recorded a forward pass since there is a reader."""
        return any(router.record.total is not None for router in self.routers.values())

    def close(self) -> None:
        """Count no more. The last reader of a model leaves nothing in its memory."""
        self._closing()
        self._seen = {}

    def __enter__(self) -> StatisticsReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _release(records: Iterable[Record]) -> None:
    for record in records:
        record.remove_reader()
