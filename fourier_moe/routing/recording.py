"""recording: the part of a training step in which the routers of a model keep their forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.routing.record import SHARED, Record, Recording, Routing, active, exact
from fourier_moe.routing.router import routers
from fourier_moe.routing.statistics import RouterStatistics, TokenWeights

CHUNK = 16  # routers that are counted together: few operations, and a bounded copy of what they kept


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
    records = [router.record for router in routers(model).values()]
    with SHARED:
        read = [record for record in records if record.num_readers]
        known = list(dict.fromkeys(name for record in read for name in record.tasks))
    current = Recording(records, token_mask, TokenWeights(token_mask, tasks if read else None, known))
    with current.opened():
        yield
        _count(read, current)
        if current.on_unread is not None and not current.balance_read:
            current.on_unread()


def _count(records: Sequence[Record], current: Recording) -> None:
    """Add the kept forward passes to the routers' sums, in few operations for many routers."""
    alike: dict[Any, list[tuple[Record, Routing]]] = {}
    for record in records:
        for routing in current.kept[record]:
            shapes = routing.probabilities.shape, routing.experts.shape, routing.probabilities.device
            alike.setdefault(shapes, []).append((record, routing))
    for group in alike.values():
        for start in range(0, len(group), CHUNK):
            owners, routings = zip(*group[start : start + CHUNK], strict=True)
            together = Routing(*(_stacked(parts) for parts in zip(*routings, strict=True)))
            weights_ST = current.weights.by_task(routings[0].probabilities)
            probabilities_RTE = together.probabilities
            active_RTE, gates_RTE = active(probabilities_RTE, together.experts), together.dense(probabilities_RTE.shape[-1])
            statistics = RouterStatistics.of_tokens(active_RTE, probabilities_RTE, gates_RTE, weights_ST)
            sums_RSX = statistics.sums.to(**exact(probabilities_RTE.device))
            for record, sums_SX in zip(owners, sums_RSX, strict=True):
                record.add(sums_SX, current.weights.names)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Of several routers (R, T, ...)."""
    return torch.stack([part.detach() for part in parts]).reshape(len(parts), -1, parts[0].shape[-1])
