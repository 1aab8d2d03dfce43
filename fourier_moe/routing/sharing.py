"""One router for several projections: those that read the same input, or those of a transformer block.

What is shared is the router's weight. Every projection routes what it reads itself, so that nothing is remembered between
modules and their order does not matter; the second evaluation of E * N products per token costs next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fourier_moe.routing.record import Routing
from fourier_moe.routing.router import TopKRouter
from fourier_moe.routing.statistics import RouterStatistics

# Projections of one parent that read the same tensor. Whatever is not listed reads an input of its own.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


class SharedRouter(nn.Module):
    """Stands in for a router: no parameters of its own, routes with another projection's."""

    def __init__(self, router: TopKRouter) -> None:
        super().__init__()
        self._leader = (router,)  # in a tuple: not a child, or the weight would be in the state dict twice
        self.train(router.training)

    @property
    def leader(self) -> TopKRouter:
        return self._leader[0]

    @property
    def num_experts(self) -> int:
        return self.leader.num_experts

    @property
    def weight(self) -> Tensor:
        return self.leader.weight

    def matrix(self) -> Tensor:
        return self.leader.matrix()

    def forward(self, x: Tensor) -> Routing:
        return self.leader(x)

    def statistics(self) -> RouterStatistics:
        """Of the tokens of all its projections together."""
        return self.leader.statistics()

    def balance_loss(self) -> None:
        """The router itself counts the tokens of all its projections."""
        return


def share_routers(adapters: Mapping[str, Any], scope: str) -> None:
    """Let all adapters of a group use the router of the group's first.

    Args:
        adapters: by name; each has a `router` and `in_features`.
        scope: see `router_group`.
    """
    groups: dict[tuple[str, int], list[Any]] = {}
    for name, adapter in adapters.items():
        groups.setdefault((router_group(name, scope), adapter.in_features), []).append(adapter)
    for first, *others in groups.values():
        for other in others:
            other.router = SharedRouter(first.router)


def router_group(name: str, scope: str) -> str:
    """Return the group that a projection shares its router with, as a key; projections of equal keys and input width share.

    `projection`: none. `input`: those of the same parent that read the same input (SAME_INPUT). `block`: those of the same
    transformer block, which is what the last number in the dotted name counts.
    """
    parent, _, last = name.rpartition(".")
    if scope == "input":
        return f"{parent}.{next(('+'.join(group) for group in SAME_INPUT if last in group), last)}"
    if scope == "block":
        block = re.match(r"(.*\.)?\d+(?=\.)", name)
        return block.group() if block else ""
    return name
