"""The loader of training batches, which can resume within an epoch, and what its worker processes need."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.shared.sampling import TrainShare
from fourier_moe.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
_PREFETCH = 2  # batches that torch lets each worker prepare


class TrainLoader(DataLoader[Any]):
    """Batches of a process's share of a training sampler, resumable within an epoch.

    Lightning keeps `state_dict` in its checkpoints. It counts batches that were handed out, not those that workers have
    prepared. A resumed pass begins at the next batch without loading what came before it. Nothing is read before the first
    batch is asked for: Lightning makes the iterator before it sets the epoch, and workers would prepare another epoch's.

    Made like any DataLoader, with a `TrainShare` as sampler. (With any other, as Lightning's for `overfit_batches`, every
    pass begins at its first batch.)
    """

    _num_given = 0
    _resumes_in: int | None = None  # epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, which begins at the first next()
        if self._resumes_in is None or self._epoch != self._resumes_in:
            self._num_given = 0
        self._resumes_in = None
        if isinstance(self.sampler, TrainShare):
            assert self.batch_size is not None
            self.sampler.first = self._num_given * self.batch_size
        for batch in super().__iter__():
            self._num_given += 1
            yield batch

    def state_dict(self) -> dict[str, int | None]:
        """Return `epoch`, `batches` of it that were handed out, and `batch_size`: examples a batch, of all processes."""
        epoch = self._epoch if self._resumes_in is None else self._resumes_in
        return {"epoch": epoch, "batches": self._num_given, "batch_size": self._step_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume there, if the next pass is through that epoch."""
        self._resumes_in = state["epoch"]
        num_examples = state["batches"] * state["batch_size"]
        at_end = num_examples > (len(self) - 1) * self._step_size
        self._num_given = len(self) if at_end else num_examples // self._step_size
        if state["batch_size"] != self._step_size and num_examples:
            rank_zero_warn(
                f"the checkpoint was written with {state['batch_size']} examples a batch (of all processes), this run has "
                f"{self._step_size}: it resumes after {self._num_given} of its batches, and may read a few examples of this "
                "epoch twice or not at all; the next epochs are whole"
            )

    @property
    def _epoch(self) -> int | None:
        return self.sampler.epoch if isinstance(self.sampler, TrainShare) else None

    @property
    def _step_size(self) -> int:
        assert self.batch_size is not None
        return self.batch_size * (self.sampler.num_replicas if isinstance(self.sampler, TrainShare) else 1)


def leave_signals_to_main_process(worker: int) -> None:
    """Ignore signals in a data-loading worker; for `worker_init_fn`.

    Schedulers, Ctrl-C and a closed terminal signal every process, and the main one still needs its workers' batches. A worker
    ends when its main process does. (torch's looks for that, but not for one that was gone before it first looked.)
    """
    main_process = multiprocessing.parent_process()
    if main_process is not None and main_process.pid != os.getppid():
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def require_shared_memory(num_workers: int, batch_size: int, num_examples: int, example_bytes: int, num_processes: int) -> None:
    """Refuse loading processes whose batches do not fit into shared memory, of which Docker gives 64 MB.

    A worker that finds no room there dies of a bus error.

    Args:
        num_workers: loading processes of a training process.
        num_examples: how many there are in all, which bounds small data sets.
        example_bytes: of one example.
        num_processes: training processes on this machine.

    Raises:
        UserError: what to set.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    batch_bytes = min(batch_size, num_examples) * example_bytes
    needed = min(num_processes * num_workers * _PREFETCH * batch_bytes, num_processes * num_examples * example_bytes)
    if needed > free:
        fitting = free // (num_processes * _PREFETCH * batch_bytes)
        raise UserError(
            f"num_workers={num_workers} hand over batches of {batch_size} through shared memory, up to {needed / 2**30:.2f} "
            f"GiB, and /dev/shm has {free / 2**30:.2f} GiB free; give the container more (docker run --shm-size="
            f"{math.ceil(needed / 2**30)}g), or set --data.num_workers {fitting}"
        )
