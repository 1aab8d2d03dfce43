"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lightning_modules.experiments.provenance import library_versions, repository_commit

_PACKAGES = ("torch", "triton", "peft", "transformers", "open_clip_torch", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return processor, memory, versions, commit and load, as plain values for JSON."""
    commit = repository_commit() or ""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": library_versions(_PACKAGES),
        "commit": commit.removesuffix("+dirty") or None,
        "uncommitted_changes": commit.endswith("+dirty"),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("FOURIER_MOE_", "OMP_", "MKL_"))},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the body, and for a process that starts inside and keeps them, as the fork server does."""
    previous = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in previous.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
