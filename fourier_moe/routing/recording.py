"""What `recording` keeps of the forward passes in its body: for the thread or task that opened it, and for no other."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fourier_moe.errors import UserError
from fourier_moe.routing.statistics import TokenWeights

if TYPE_CHECKING:
    from fourier_moe.routing.reminders import Reminder
    from fourier_moe.routing.router import Router

# Guards what recordings of several threads share: how many are open for a router, and its sums. Reentrant, because the garbage
# collector may close a StatisticsReader at any line.
SHARED = threading.RLock()


class NoTokensError(UserError, RuntimeError):
    """A router's balance loss was asked for, and no forward pass used its projection inside a `recording`."""


class Recorded(NamedTuple):
    """What the balance loss needs of one forward. Sums are left to `balance_loss`: under activation checkpointing an operation
    here would belong to the recomputed region, which must be the same with and without recording."""

    probabilities: Tensor  # what P_e is the mean of (..., E), carries the gradient
    choice: Tensor  # what the router's `active` reads the active experts from, for example those in the top-K (..., K)


class Recording:
    """One open `recording`.

    Attributes:
        tokens: the recorded forwards of each router.
        token_mask: as given to `recording`.
        weights: which tokens count, and for which task.
        balance_read: whether a router's load-balancing loss was asked for.
        reminder: what to say if it was not and should have been.
        open: False after its body has ended. A task or thread that was started in the body may still see it then.
    """

    def __init__(self, routers: Iterable[Router], token_mask: Tensor | None, weights: TokenWeights) -> None:
        self.tokens: dict[Router, list[Recorded]] = {router: [] for router in routers}
        self.token_mask, self.weights = token_mask, weights
        self.balance_read = False
        self.reminder: Reminder | None = None
        self.open = True


# Innermost last. A context variable: every thread and every asyncio task has its own value.
_RECORDINGS: ContextVar[tuple[Recording, ...]] = ContextVar("fourier_moe_recordings", default=())


def recording_of(router: Router) -> Recording | None:
    """The innermost open recording of this thread or task that a router belongs to."""
    for recording in reversed(_RECORDINGS.get()):
        if recording.open and router in recording.tokens:
            return recording
    return None


@contextmanager
def opened(recording: Recording) -> Iterator[None]:
    """Make it the innermost one of this thread or task during the body."""
    _RECORDINGS.set((*_RECORDINGS.get(), recording))
    _count_open(recording, 1)
    try:
        yield
    finally:
        recording.open = False
        _RECORDINGS.set(tuple(other for other in _RECORDINGS.get() if other.open))
        _count_open(recording, -1)


def _count_open(recording: Recording, change: int) -> None:
    with SHARED:
        for router in recording.tokens:
            router._num_recordings += change
            router._recording = router._num_recordings > 0
