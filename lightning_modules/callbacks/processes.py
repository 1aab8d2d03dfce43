"""Values of all processes."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


def of_all_processes(trainer: L.Trainer, value: Any) -> list[Any]:
    """Return the value of every process, by rank. All processes must call it together."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
