"""PeakMemory: what one training took, also where a process makes many."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory(L.Callback):
    """Peak memory from the start of training to its end, validation included, of the process that took most.

    On a GPU what tensors took. Else the process's resident memory, whose high-water mark Linux sets back on request; it holds
    the libraries (a few hundred MiB) and what earlier runs of the process have not given back.

    Attributes:
        peak: bytes; None before the end of training, and where there is neither a GPU nor Linux's /proc.
    """

    peak: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")  # proc(5): sets VmHWM to what is resident now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            own = torch.cuda.max_memory_allocated(device)
        elif _CLEAR.exists():
            own = _high_water_mark()
        else:
            return
        peak = trainer.strategy.reduce(torch.tensor(float(own), device=device), reduce_op="max")
        self.peak = int(peak)


def _high_water_mark() -> int:
    """Bytes."""
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])
