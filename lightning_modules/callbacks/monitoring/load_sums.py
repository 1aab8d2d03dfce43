"""LoadSums: router statistics of all layers, summed over processes and over time."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor

from fourier_moe import RouterStatistics, StatisticsReader
from lightning_modules.callbacks.processes import of_all_processes


class LoadSums:
    """Statistics by layer, of all tokens and of each task's tokens; sums can be added.

    Attributes:
        layers: statistics (layers,) of all tokens.
        tasks: the same by task, in alphabetical order; empty if batches name no tasks.
    """

    def __init__(self, layers: RouterStatistics, tasks: Mapping[str, RouterStatistics]) -> None:
        self.layers = layers
        self.tasks = dict(sorted(tasks.items()))

    def __add__(self, other: LoadSums) -> LoadSums:
        tasks = dict(self.tasks)
        for name, part in other.tasks.items():
            tasks[name] = _added(tasks[name], part) if name in tasks else part
        return LoadSums(_added(self.layers, other.layers), tasks)

    @classmethod
    def collect(cls, trainer: L.Trainer, reader: StatisticsReader) -> LoadSums:
        """Return what the routers of all processes recorded since the last call, on the CPU in float64.

        All processes must call it together.
        """
        layers = list(reader.read().values())
        own_names = {name for statistics in layers for name in statistics.by_task}
        names = sorted(set().union(*of_all_processes(trainer, own_names)))  # processes may have seen different tasks
        rows = [torch.stack([statistics.sums for statistics in layers])]
        nothing = RouterStatistics(torch.zeros_like(rows[0][0]))
        rows += [torch.stack([statistics.by_task.get(name, nothing).sums for statistics in layers]) for name in names]
        reduced = trainer.strategy.reduce(torch.stack(rows), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        all_tasks, *by_task = (RouterStatistics(row) for row in reduced.cpu().double())
        return cls(all_tasks, {name: task for name, task in zip(names, by_task, strict=True) if task.sums.any()})


def _added(one: RouterStatistics, other: RouterStatistics) -> RouterStatistics:
    return RouterStatistics(one.sums + other.sums)
