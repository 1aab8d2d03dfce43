"""Record: what a router's forward passes leave to the balance loss and to statistics, once for each router.

Forward passes are kept for the thread or task that opened a `recording`, and for no other. Sums are kept for all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourier_moe.errors import UserError
from fourier_moe.routing.statistics import TokenWeights

# Guards what recordings of several threads share: how many are open for a router, and its sums. Reentrant, because the garbage
# collector may close a StatisticsReader at any line.
SHARED = threading.RLock()


class NoTokensError(UserError, RuntimeError):
    """A router's balance loss was asked for, and no forward pass used its projection inside a `recording`."""


class Routing(NamedTuple):
    """Which experts serve each token, and with what gate.

    Attributes:
        gates: (..., K).
        experts: int64 (..., K).
        probabilities: p_e of all experts (..., E), which the balance loss and the statistics take the mean of. An expert whose
            value is below 0 serves no token, even if it is among `experts`.
    """

    gates: Tensor
    experts: Tensor
    probabilities: Tensor

    @classmethod
    def to_all(cls, gates: Tensor, probabilities: Tensor | None = None) -> Routing:
        """Every expert may serve every token: K = E, gates (..., E) in the order of the experts, which are p_e if not given."""
        experts = torch.arange(gates.shape[-1], device=gates.device).expand(gates.shape)
        return cls(gates, experts, gates if probabilities is None else probabilities)

    @classmethod
    def to_one(cls, x: Tensor) -> Routing:
        """The only expert serves every token of an input (..., N) with a gate of 1, the softmax of a single logit."""
        gates = x.new_ones(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32))
        return cls(gates, torch.zeros_like(gates, dtype=torch.int64), gates)

    def dense(self, num_experts: int) -> Tensor:
        """Return the gates (..., E) of all experts, 0 for the inactive ones."""
        return dense_gates(self.gates, self.experts, num_experts)


def dense_gates(gates: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Return the gates (..., E) of all experts from those of the active ones (..., K), 0 for the others."""
    return gates.new_zeros(*gates.shape[:-1], num_experts).scatter_add(-1, experts, gates)


def active(probabilities: Tensor, experts: Tensor) -> Tensor:
    """Return which experts of a Routing serve a token (..., E), 1 or 0."""
    return torch.zeros_like(probabilities).scatter_(-1, experts, 1).masked_fill_(probabilities < 0, 0)


class Record:
    """What the forward passes of one router leave.

    Attributes:
        open: whether a `recording` of the router is open in any thread. torch.compile guards on it.
        num_readers: number of StatisticsReaders that are open; without one, nothing is counted.
        tasks: names of the tasks (S,) in `total`.
        total: sums (S, 3E + 1) over all recordings since there is a reader, None before the first. Not a buffer: DDP hands the
            first process's buffers to all, and a model that was made on the meta device has none to add to.
    """

    def __init__(self) -> None:
        self.open = False
        self.num_recordings = 0
        self.num_readers = 0
        self.tasks: tuple[str, ...] = ()
        self.total: Tensor | None = None

    def recording(self) -> Recording | None:
        """Return the innermost open recording of this thread or task that the router belongs to."""
        for recording in reversed(_RECORDINGS.get()):
            if recording.open and self in recording.kept:
                return recording
        return None

    def keep(self, routing: Routing) -> None:
        """Keep a forward pass for the innermost recording of this thread; without one, do nothing.

        Nothing is computed here: under activation checkpointing an operation would belong to the region that runs a second
        time, which must be the same with and without recording.
        """
        if (recording := self.recording()) is None:
            return
        mask, shape = recording.token_mask, routing.probabilities.shape[:-1]
        if mask is not None and mask.shape != shape:
            raise UserError(
                f"token_mask has shape {tuple(mask.shape)}, but the adapted projection sees tokens of shape "
                f"{tuple(shape)}; give one true/false per token of the projection's input"
            )
        recording.kept[self].append(routing)

    def balance_loss(self, *, trains: bool) -> Tensor:
        """See `Router.balance_loss`.

        Args:
            trains: whether the router is trained, so that the loss needs a gradient.
        """
        recording = self.recording()
        if recording is None or not recording.kept[self]:
            raise NoTokensError(
                "this router saw no tokens: read balance_loss() inside `with recording(model): ...`, after a forward pass that "
                "uses the adapted projection"
            )
        recording.balance_read = True
        kept = recording.kept[self]
        if trains and torch.is_grad_enabled() and not all(routing.probabilities.requires_grad for routing in kept):
            raise UserError(
                "the balance loss would train no router, because the forward pass ran without gradients: in reentrant "
                "activation checkpointing, where use_reentrant=False is needed, or under torch.no_grad()"
            )
        parts = [routing.probabilities for routing in kept], [routing.experts for routing in kept]
        probabilities_TE, experts_TK = (torch.cat([part.reshape(-1, part.shape[-1]) for part in each]) for each in parts)
        mask_T1 = torch.cat([recording.weights.mask(routing.probabilities) for routing in kept]).unsqueeze(-1)
        num_tokens = mask_T1.sum().clamp(min=1)
        active_TE = active(probabilities_TE.detach(), experts_TK)
        load_E, probability_E = ((part * mask_T1).sum(0) / num_tokens for part in (active_TE, probabilities_TE))
        return load_E.shape[0] * (load_E * probability_E).sum()

    def add(self, sums: Tensor, names: tuple[str, ...]) -> None:
        """Add sums (S, 3E + 1) of the named tasks to the total."""
        with SHARED:
            if self.total is None:
                self.total, self.tasks = sums, names
                return
            if self.tasks == names:
                self.total = self.total + sums
                return
            tasks = tuple(dict.fromkeys([*self.tasks, *names]))  # another thread may have met others
            total = sums.new_zeros(len(tasks), sums.shape[-1])
            total[: len(self.tasks)] = self.total
            total[[tasks.index(name) for name in names]] += sums
            self.total, self.tasks = total, tasks

    def counted(self, weight_EN: Tensor) -> tuple[tuple[str, ...], Tensor]:
        """Return names (S,) and sums (S, 3E + 1), never changed in place; empty ones before anything is counted."""
        with SHARED:
            if self.total is None:
                return (), torch.zeros(0, 3 * len(weight_EN) + 1, **exact(weight_EN.device))
            return self.tasks, self.total

    def add_reader(self) -> None:
        """Count from now on."""
        with SHARED:
            self.num_readers += 1

    def remove_reader(self) -> None:
        """Count no more, and forget the sums, if it was the last one."""
        with SHARED:
            self.num_readers -= 1
            if not self.num_readers:
                self.total, self.tasks = None, ()


class Recording:
    """One open `recording`.

    Attributes:
        kept: the forward passes of each router.
        token_mask: as given to `recording`.
        weights: which tokens count, and for which task.
        balance_read: whether a router's load-balancing loss was asked for.
        on_unread: called at the end if it was not.
        open: False after its body has ended. A task or thread that was started in the body may still see it then.
    """

    def __init__(self, records: Iterable[Record], token_mask: Tensor | None, weights: TokenWeights) -> None:
        self.kept: dict[Record, list[Routing]] = {record: [] for record in records}
        self.token_mask, self.weights = token_mask, weights
        self.balance_read = False
        self.on_unread: Callable[[], None] | None = None
        self.open = True

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make it the innermost one of this thread or task during the body."""
        _RECORDINGS.set((*_RECORDINGS.get(), self))
        self._count_open(1)
        try:
            yield
        finally:
            self.open = False
            _RECORDINGS.set(tuple(other for other in _RECORDINGS.get() if other.open))
            self._count_open(-1)

    def _count_open(self, change: int) -> None:
        with SHARED:
            for record in self.kept:
                record.num_recordings += change
                record.open = record.num_recordings > 0


# Innermost last. A context variable: every thread and every asyncio task has its own value.
_RECORDINGS: ContextVar[tuple[Recording, ...]] = ContextVar("fourier_moe_recordings", default=())


def exact(device: torch.device) -> dict[str, Any]:
    """Return where and how sums over a whole run are kept: in float32 a count would end at 2^24. MPS has no float64."""
    return {"dtype": torch.float64, "device": torch.device("cpu") if device.type == "mps" else device}
