"""The random state of every process, as tensors and plain values that a checkpoint may hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]


def random_state(device: torch.device) -> RandomState:
    """Return the state of torch (CPU and current GPU), numpy and Python's `random` in this process."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (name, [int(key) for key in keys], *rest),
        "python": random.getstate(),
    }


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restore a state, on a device of the kind that it was taken on."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(state["numpy"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))


def reseed(seed: int, step: int, rank: int) -> None:
    """Set a new state, derived from the run's seed, the step and the process."""
    numbers = np.random.SeedSequence([seed % 2**64, step, rank]).generate_state(4, np.uint64)
    torch.manual_seed(int(numbers[0]))  # also on the GPU
    np.random.seed(numbers[1:2].view(np.uint32))
    random.seed(int(numbers[2]))


def new_state(seed: int, step: int, rank: int, device: torch.device) -> RandomState:
    """Return the state that `reseed` sets, without changing the current one."""
    before = random_state(device)
    reseed(seed, step, rank)
    state = random_state(device)
    set_random_state(before, device)
    return state


def all_random_states(state: RandomState) -> list[RandomState]:
    """Return the states of all processes by rank. All processes must call it together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states
