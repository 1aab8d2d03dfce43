"""TokenRanks: the rank of the update that a token gets (Corollary H.3), by layer and task.

Shape legend: L layers (adapted projections), E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from fourier_moe import FourierMoELinear, StatisticsReader
from lightning_modules.callbacks.monitoring.load_sums import LoadSums
from lightning_modules.callbacks.monitoring.logged import short_names
from lightning_modules.callbacks.monitoring.model_spectra import ModelSpectra
from lightning_modules.tables import write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NUMBERS = 30  # layers up to which every cell shows its number
MAX_LABELS = 64  # layers up to which every row has its name
ALL = "all"  # tokens of all tasks


@dataclass(frozen=True)
class TokenRanks:
    """Sum of the ranks of the updates that serve a token, the shared expert's included: mean over the tokens.

    An upper bound, since a weighted sum of matrices has at most the sum of their ranks; the experts' ranks are exact.

    Attributes:
        layers: names of the projections.
        by_task: means (L,) over each task's tokens, and first, as `all`, over all tokens; empty if no tokens were counted.
    """

    layers: Sequence[str]
    by_task: Mapping[str, Tensor]

    @classmethod
    def of(cls, spectra: ModelSpectra, loads: Mapping[str, Tensor]) -> TokenRanks:
        """Take the ranks of the experts at the moment, and the share of the tokens that each serves (L, E)."""
        ranks_LE = spectra.rank
        always = ranks_LE.new_ones(len(ranks_LE), len(spectra.names) - spectra.config.num_experts)
        served = {task: torch.cat([load_LE, always], 1) for task, load_LE in loads.items()}
        return cls(list(spectra.layers), {task: (ranks_LE * share_LE).sum(-1) for task, share_LE in served.items()})

    def metrics(self) -> dict[str, float]:
        """Return the means over the layers by tag."""
        return {f"spectrum/token_rank/{task}": float(ranks_L.mean()) for task, ranks_L in self.by_task.items()}

    def write(self, path: Path) -> None:
        """Write a row per layer, with a column for each task."""
        columns = [ranks_L.tolist() for ranks_L in self.by_task.values()]
        write_table(path, ["layer", *self.by_task], zip(self.layers, *columns, strict=True), digits=6)

    def figure(self, title: str) -> Figure:
        """Draw a map of the ranks, layers by tasks."""
        from matplotlib.figure import Figure  # here: it takes as long to import as a small run

        values = torch.stack([*self.by_task.values()], 1).numpy()
        num_layers, num_tasks = values.shape
        figure = Figure(figsize=(4.5 + 0.7 * num_tasks, min(max(0.25 * num_layers, 2) + 1.5, 20)), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest")
        figure.colorbar(image, label="sum of the active experts' ranks")
        axes.set_xticks(range(num_tasks), labels=list(self.by_task), rotation=45, ha="right", fontsize=8)
        every = -(-num_layers // MAX_LABELS)
        axes.set_yticks(range(0, num_layers, every), labels=short_names(self.layers)[::every], fontsize=8)
        axes.set_title(f"rank of a token's update, at most\n{title}", loc="left")
        if num_layers <= MAX_NUMBERS:
            middle = (values.min() + values.max()) / 2
            for (row, column), value in np.ndenumerate(values):
                color = "white" if value <= middle else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
        return figure


class LoadReader:
    """Reads which share of the tokens each expert of each FourierMoE projection serves.

    Args:
        model: the adapted model, whose routers count from now on.
        layers: its FourierMoE projections by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, FourierMoELinear]) -> None:
        self._reader = StatisticsReader(model)
        counted = list(self._reader.routers.values())
        routers: list[Any] = [layer.router for layer in layers.values()]
        self._rows = [counted.index(getattr(router, "leader", router)) for router in routers]  # some share a router

    def read(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Return the loads (L, E), of all tokens as `all` and of each task's tokens, since the last call; empty without any.

        A task's name that is a column of the table, `all` or `layer`, gets `task_` in front.
        All processes must call it together.
        """
        sums = LoadSums.collect(trainer, self._reader)
        if not sums.layers.tokens.any():
            return {}
        tasks = {f"task_{name}" if name in (ALL, "layer") else name: part for name, part in sums.tasks.items()}
        return {name: part.load[self._rows] for name, part in {ALL: sums.layers, **tasks}.items()}

    def close(self) -> None:
        """Count no more."""
        self._reader.close()
