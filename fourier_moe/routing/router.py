"""Router and TopKRouter: which experts serve a token, the load-balancing loss, and statistics of the routing.

Shape legend: T tokens, S tasks, N in_features, E experts, K active experts per token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fourier_moe.errors import UserError
from fourier_moe.routing.logits import logits
from fourier_moe.routing.recording import SHARED, NoTokensError, Recorded, Recording, opened, recording_of
from fourier_moe.routing.statistics import RouterStatistics, TokenWeights

AT_ONCE = 16  # routers that are counted together: few operations, and a bounded copy of what they recorded


class Routing(NamedTuple):
    """Which experts serve each token, and with what gate.

    Attributes:
        gates: (..., K).
        experts: int64 (..., K).
    """

    gates: Tensor
    experts: Tensor

    @classmethod
    def to_all(cls, gates: Tensor) -> Routing:
        """Every expert serves every token: K = E, gates (..., E) in the order of the experts."""
        return cls(gates, torch.arange(gates.shape[-1], device=gates.device).expand(gates.shape))

    def dense(self, num_experts: int) -> Tensor:
        """Gates (..., E) of all experts, 0 for the inactive ones."""
        shape = (*self.gates.shape[:-1], num_experts)
        return self.gates.new_zeros(shape).scatter_add(-1, self.experts, self.gates)


class Router(nn.Module, ABC):
    """Base of the routers: one logit per expert from a matrix R without bias, recording, balance loss and statistics.

    A subclass implements `forward`, which calls `_record`, and `active` and `gates`, which read what was recorded.

    Args:
        in_features: N.
        num_experts: E.
        generator: source of the Kaiming-uniform initialisation.
        device: where the weight is made.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        # Device and dtype are named: Trainer.configure_model sets other defaults, which must not change what is drawn.
        weight_EN = torch.empty(num_experts, in_features, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(weight_EN, a=math.sqrt(5), generator=generator)
        self.weight = nn.Parameter(weight_EN.to(device))
        self._num_recordings = 0  # open in any thread
        self._recording = False  # whether there is one: torch.compile guards on it
        self._num_readers = 0  # StatisticsReader counts itself here
        # Not buffers: DDP hands the first process's buffers to all, and a model made on the meta device has none to add to.
        self._total: Tensor | None = None  # (S, 3E + 1), of all recordings since there is a reader
        self._tasks: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @abstractmethod
    def forward(self, x: Tensor) -> Routing:
        """Route the tokens of an input (..., N); gates in float32 (float64 for a float64 weight)."""

    @abstractmethod
    def active(self, probabilities: Tensor, choice: Tensor) -> Tensor:
        """Which experts serve (..., E), 1 or 0, from what `_record` was given."""

    @abstractmethod
    def gates(self, probabilities: Tensor, active: Tensor) -> Tensor:
        """Gates of all experts (..., E), 0 for the inactive ones, from what `_record` and `active` gave."""

    def probabilities(self, x: Tensor) -> Tensor:
        """p = softmax(R x), (..., E), in float32 (float64 for a float64 weight), autocast or not."""
        return torch.softmax(logits(x, self.weight), -1)

    def balance_loss(self) -> Tensor:
        """E * sum_e f_e P_e over the tokens recorded so far (paper Eq. 13-14); K when the load is perfectly even.

        f_e is the share of tokens that e serves (so sum f = K under a top-K), P_e the mean of p_e; the gradient flows through
        P_e. Padding counts in neither. Zero when every token is padding.

        Raises:
            NoTokensError: outside of `recording`, or when no forward in it has used the projection.
            UserError: if a gradient is wanted, and the forward has run without.
        """
        recording = recording_of(self)
        if recording is None or not recording.tokens[self]:
            raise NoTokensError(
                "this router saw no tokens: read balance_loss() inside `with recording(model): ...`, after a forward pass that "
                "uses the adapted projection"
            )
        recording.balance_read = True
        tokens, weights = recording.tokens[self], recording.weights
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if trains and not all(recorded.probabilities.requires_grad for recorded in tokens):
            raise UserError(
                "the balance loss would train no router, because the forward pass ran without gradients: in reentrant "
                "activation checkpointing, where use_reentrant=False is needed, or under torch.no_grad()"
            )
        probabilities_TE = torch.cat([recorded.probabilities.reshape(-1, self.num_experts) for recorded in tokens])
        choice = torch.cat([recorded.choice.reshape(-1, recorded.choice.shape[-1]) for recorded in tokens])
        mask_T1 = torch.cat([weights.mask(recorded.probabilities) for recorded in tokens]).unsqueeze(-1)
        num_tokens = mask_T1.sum().clamp(min=1)
        active_TE = self.active(probabilities_TE.detach(), choice.detach())
        load_E, probability_E = ((part * mask_T1).sum(0) / num_tokens for part in (active_TE, probabilities_TE))
        return self.num_experts * (load_E * probability_E).sum()

    def statistics(self) -> RouterStatistics:
        """Statistics of all tokens recorded since the first open StatisticsReader was made, without padding, of this process.

        Raises:
            RuntimeError: if no reader is open; then nothing is counted.
        """
        if not self._num_readers:
            raise RuntimeError(
                "this router counts no tokens while nobody asks: make `reader = StatisticsReader(model)` before the steps that "
                "are to be counted, and keep it"
            )
        return RouterStatistics.of_tasks(*self._counted())

    def _record(self, probabilities: Tensor, choice: Tensor) -> None:
        """Keep a forward's tokens for the innermost recording of this thread; without one, do nothing.

        Args:
            probabilities: (..., E), see Recorded.
            choice: (..., K).
        """
        if not self._recording or (recording := recording_of(self)) is None:
            return
        mask = recording.token_mask
        if mask is not None and mask.shape != probabilities.shape[:-1]:
            raise UserError(
                f"token_mask has shape {tuple(mask.shape)}, but the adapted projection sees tokens of shape "
                f"{tuple(probabilities.shape[:-1])}; give one true/false per token of the projection's input"
            )
        recording.tokens[self].append(Recorded(probabilities, choice))

    def _replicate_for_data_parallel(self) -> Router:
        if recording_of(self) is not None:
            raise UserError(
                "torch.nn.DataParallel runs copies of the routers in threads of its own, where `recording` sees nothing; use "
                "DistributedDataParallel"
            )
        return super()._replicate_for_data_parallel()  # type: ignore[misc]

    def _alike(self) -> tuple[Any, ...]:
        """Routers for which this is equal have the same `active` and `gates`."""
        return (type(self),)

    def _add(self, sums: Tensor, names: tuple[str, ...]) -> None:
        """Add sums (S, 3E + 1) of the named tasks to the total."""
        with SHARED:
            if self._total is None:
                self._total, self._tasks = sums, names
                return
            if self._tasks == names:
                self._total = self._total + sums
                return
            tasks = tuple(dict.fromkeys([*self._tasks, *names]))  # another thread may have met others
            total = sums.new_zeros(len(tasks), sums.shape[-1])
            total[: len(self._tasks)] = self._total
            total[[tasks.index(name) for name in names]] += sums
            self._total, self._tasks = total, tasks

    def _counted(self) -> tuple[tuple[str, ...], Tensor]:
        """Names (S,) and sums (S, 3E + 1), never changed in place."""
        with SHARED:
            if self._total is None:
                return (), torch.zeros(0, 3 * self.num_experts + 1, **_exact(self.weight.device))
            return self._tasks, self._total

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no readers, so it counts nothing, and belongs to no open recording."""
        unshared = {"_num_readers": 0, "_num_recordings": 0, "_recording": False, "_total": None, "_tasks": ()}
        return {**self.__dict__, **unshared}


class TopKRouter(Router):
    """Softmax router that keeps the K most probable experts of a token (paper Eq. 2).

    p = softmax(R x) in float32; the gate of an expert in the top-K is p_e divided by the sum over the top-K, or p_e itself if
    `normalize_gates` is off or K = 1 (a renormalised single gate is the constant 1 and would give R no gradient).

    Args:
        in_features: N.
        num_experts: E.
        top_k: K.
        normalize_gates: divide the gates of a token by their sum.
        generator: source of the Kaiming-uniform initialisation.
        device: where the weight is made.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        top_k: int,
        *,
        normalize_gates: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_features, num_experts, generator=generator, device=device)
        self.top_k = top_k
        self.normalize_gates = normalize_gates and top_k > 1

    def forward(self, x: Tensor) -> Routing:
        probabilities = self.probabilities(x)
        gates, experts = torch.topk(probabilities, self.top_k, -1)
        self._record(probabilities, experts)
        if self.normalize_gates:
            gates = gates / gates.sum(-1, keepdim=True)
        return Routing(gates, experts)

    def active(self, probabilities: Tensor, choice: Tensor) -> Tensor:
        return torch.zeros_like(probabilities).scatter_(-1, choice, 1)

    def gates(self, probabilities: Tensor, active: Tensor) -> Tensor:
        gates = active * probabilities
        return gates / gates.sum(-1, keepdim=True) if self.normalize_gates else gates

    def _alike(self) -> tuple[Any, ...]:
        return (*super()._alike(), self.normalize_gates)


def routers(model: nn.Module) -> dict[str, Router]:
    """All routers of a model by the name of the adapted projection they belong to, the first of those that share one."""
    return {name.removesuffix(".router"): module for name, module in model.named_modules() if isinstance(module, Router)}


@contextmanager
def recording(model: nn.Module, token_mask: Tensor | None = None, tasks: Sequence[str] | None = None) -> Iterator[None]:
    """While open, every router of `model` records its tokens for `balance_loss`; on exit, StatisticsReaders count them.

    Without a reader nothing is counted, and nothing is kept beyond the exit. Open it around the forward pass only: activation
    checkpointing runs the forward a second time during backward, which must not be counted again. Read `balance_loss` before it
    closes. Tokens of a step that fails are not counted.

    It belongs to the thread or asyncio task that opened it, so that any number may be open on one model at the same time. A new
    thread has none: open one there, or start it with `contextvars.copy_context().run`. Where one is opened inside another, the
    inner one alone gets the tokens of its routers.

    Args:
        token_mask: true for real tokens, false for padding, in the leading shape of every adapted projection's input, for
            example (batch, length). None counts all.
        tasks: name of the task that each example belongs to, along the first dimension of the projections' inputs; None tells
            no tasks apart.

    Raises:
        UserError: if token_mask or tasks does not fit the projections' inputs.
    """
    found = list(routers(model).values())
    with SHARED:
        read = [router for router in found if router._num_readers]
        known = dict.fromkeys(name for router in read for name in router._tasks)
    recording = Recording(found, token_mask, TokenWeights(token_mask, tasks if read else None, list(known)))
    with opened(recording):
        yield
        _count(read, recording)
        if recording.reminder is not None and not recording.balance_read:
            recording.reminder.miss()


def _count(found: Sequence[Router], recording: Recording) -> None:
    """Add what the routers recorded to their statistics, in few operations for many routers."""
    weights = recording.weights
    alike: dict[Any, list[tuple[Router, Recorded]]] = {}
    for router in found:
        for recorded in recording.tokens[router]:
            shapes = (recorded.probabilities.shape, recorded.choice.shape, recorded.probabilities.device)
            alike.setdefault((*shapes, *router._alike()), []).append((router, recorded))
    for group in alike.values():
        for start in range(0, len(group), AT_ONCE):
            part = group[start : start + AT_ONCE]
            probabilities, choice = (
                torch.stack([tensor.detach() for tensor in tensors]).reshape(len(part), -1, tensors[0].shape[-1])
                for tensors in zip(*(recorded for _, recorded in part), strict=True)
            )
            active = part[0][0].active(probabilities, choice)
            gates = part[0][0].gates(probabilities, active)
            statistics = RouterStatistics.of_tokens(active, probabilities, gates, weights.by_task(part[0][1].probabilities))
            for (router, _), sums in zip(part, statistics.sums.to(**_exact(probabilities.device)), strict=True):
                router._add(sums, weights.names)


def _exact(device: torch.device) -> dict[str, Any]:
    """Where and how sums over a whole run are kept: in float32 a count would end at 2^24. MPS has no float64."""
    return {"dtype": torch.float64, "device": torch.device("cpu") if device.type == "mps" else device}
