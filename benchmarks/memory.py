"""Peak memory of a training step of each method, measured alone.

On CPU each method runs in its own process. Reported is the growth of resident memory from before the model is built (all
libraries imported) to the peak during two training steps: weights, adapters, gradients, optimizer state, activations and the
scratch space of FFT and matrix libraries, which a tracker of PyTorch's own allocations would miss. Two measures make
the figure reproducible to about 1 %: the kernel's peak is reset after the model is built, so that construction does not count,
and glibc's allocator returns large blocks at once, so that free memory does not count. The processes are forked from a server
that has imported the libraries and computed nothing.

On CUDA it is torch.cuda.max_memory_allocated in this process, frozen model included; no other method may exist then.
"""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from benchmarks.machine import environment
from benchmarks.models import Classifier
from benchmarks.steps import Setting, Trial, build_base

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
_STEPS = 2  # the first makes the optimizer's state, the second runs with it


def peak_memory(base: Classifier | None, method: str, setting: Setting) -> int | None:
    """Return the peak bytes of `method`, or None if memory runs out. `base` is needed on CUDA only."""
    if setting.device != "cpu":
        assert base is not None
        return _peak_on_cuda(base, method, setting)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    with environment(ALLOCATOR), ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak_on_cpu, method, setting).result()
        except BrokenProcessPool:  # killed by the kernel
            return None


def _peak_on_cpu(method: str, setting: Setting) -> int | None:
    # Here, because it needs the libraries of all data, which a machine with a GPU may lack.
    from lightning_modules.callbacks.monitoring.peak_memory import peak_resident_bytes, reset_peak, status_bytes

    torch.set_num_threads(setting.threads)
    torch.ones(256, 256) @ torch.ones(256, 256)  # threads and their buffers do not count
    gc.collect()
    before = status_bytes("VmRSS") or peak_resident_bytes() or 0
    try:
        trial = Trial(build_base(setting), method, setting)
        reset_peak()  # if the system cannot, the peak includes building the model, which takes less than a step
        for _ in range(_STEPS):
            trial.training_step()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        return None
    return (peak_resident_bytes() or 0) - before


def _peak_on_cuda(base: Classifier, method: str, setting: Setting) -> int | None:
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    try:
        trial = Trial(base, method, setting)
        for _ in range(_STEPS):
            trial.training_step()
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None
    finally:
        trial = None  # type: ignore[assignment]
        release_memory()


def release_memory() -> None:
    """Collect garbage and release a GPU's free blocks."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
