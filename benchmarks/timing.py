"""Interleaved timing: machines drift, so every round times every task once, and ratios are computed within a round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def time_interleaved(
    tasks: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    on_round: Callable[[int, dict[str, float]], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return seconds of every task in every round.

    The order is rotated by one from round to round and reversed in every other round, so that no task always runs first
    or after the same one. Garbage is collected between rounds, not during them. The GPU is synchronized.

    Args:
        tasks: what to time, by name; already warm.
        rounds: samples per task.
        on_round: called after each round with its number and seconds.
        clock: in seconds; `time.process_time` counts the work of this process only.
    """
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    collecting = gc.isenabled()
    for number in range(rounds):
        shift = number % len(names)
        order = names[shift:] + names[:shift]
        gc.collect()
        gc.disable()
        try:
            for name in order[::-1] if number % 2 else order:
                samples[name].append(_seconds(tasks[name], clock))
        finally:
            if collecting:
                gc.enable()
        if on_round:
            on_round(number, {name: values[-1] for name, values in samples.items()})
    return samples


def _seconds(task: Callable[[], Any], clock: Callable[[], float]) -> float:
    _synchronize()
    start = clock()
    task()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def summarize(samples: Sequence[float]) -> dict[str, float]:
    """Return minimum, quartiles and median."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {"min": min(samples), "lower_quartile": lower, "median": median, "upper_quartile": upper}


def paired_ratio(samples: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Summarize samples[i] / reference[i], the ratios within each round."""
    return summarize([a / b for a, b in zip(samples, reference, strict=True)])
