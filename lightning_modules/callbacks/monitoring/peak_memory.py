"""Memory of a process, and PeakMemory: the peak of one training, even if the process makes several."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import lightning as L
import torch

if sys.platform != "win32":
    import resource


def status_bytes(*fields: str, pid: int | str = "self") -> int | None:
    """Return the sum of fields of `/proc/PID/status` such as `VmRSS`, in bytes; None on a system without them."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    values = [1024 * int(line.split()[1]) for line in lines if line.partition(":")[0] in fields]
    return sum(values) if len(values) == len(fields) else None


def peak_resident_bytes() -> int | None:
    """Return the peak resident memory of this process since it began, or since `reset_peak`; None on Windows."""
    peak = status_bytes("VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> bool:
    """Set the peak to what is resident now, see proc(5); return whether the system does that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


class PeakMemory(L.Callback):
    """Peak memory from the start of training to its end, validation included, of the process that took most.

    On a GPU it is the memory of tensors. Otherwise it is the process's resident memory, whose peak Linux resets on request; it
    includes the libraries (a few hundred MiB) and what earlier runs of the process have not given back.

    Attributes:
        peak: bytes; None before the end of training, and on a system without a GPU or Linux's /proc.
    """

    peak: int | None = None
    _known = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._known = device.type == "cuda" or reset_peak()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        own = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
        if self._known and own is not None:
            self.peak = int(trainer.strategy.reduce(torch.tensor(float(own), device=device), reduce_op="max"))
