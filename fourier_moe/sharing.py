"""One router for several projections: those that read the same input, or all of a transformer block."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from fourier_moe.inject import adapters
from fourier_moe.linear import FourierMoELinear
from fourier_moe.router import Routing, TopKRouter

# Projections of one parent that read the same tensor. Whatever is not listed reads an input of its own.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


class LeadingRouter(TopKRouter):
    """The first projection's router of a group: routes its own input, and hands the result to the others of the group."""

    def __init__(self, router: TopKRouter, num_followers: int) -> None:
        num_experts, in_features = router.weight.shape
        super().__init__(in_features, num_experts, router.top_k, generator=torch.Generator())
        self.weight, self.normalize_gates = router.weight, router.normalize_gates
        self.num_followers = num_followers
        self._routing: Routing | None = None
        self._waiting = 0

    def forward(self, x: Tensor) -> Routing:
        routing = super().forward(x)
        self._routing, self._waiting = routing, self.num_followers
        return routing

    def hand_on(self, x: Tensor) -> Routing:
        """The routing of this forward pass; forgotten once every follower has had it.

        Raises:
            RuntimeError: if a follower runs before the leader, or on other tokens than the leader's.
        """
        routing = self._routing
        if routing is None or routing.gates.shape[:-1] != x.shape[:-1]:
            tokens = "no tokens" if routing is None else f"tokens of shape {tuple(routing.gates.shape[:-1])}"
            raise RuntimeError(
                f"a projection that shares its router sees tokens of shape {tuple(x.shape[:-1])}, but the group's first has "
                f"routed {tokens} in this forward pass; use router_scope='projection' for this model"
            )
        self._waiting -= 1
        if self._waiting == 0:
            self._routing = None
        return routing


class FollowingRouter(nn.Module):
    """Stands in for a router: no parameters, takes the routing of the group's leader."""

    def __init__(self, leader: LeadingRouter) -> None:
        super().__init__()
        self._leader = (leader,)  # in a tuple: not a child, or the leader's weight would be in the state dict twice

    @property
    def num_experts(self) -> int:
        return self._leader[0].num_experts

    def forward(self, x: Tensor) -> Routing:
        return self._leader[0].hand_on(x)

    def balance_loss(self) -> None:
        """The leader's counts for the group."""
        return


def share_routers(model: nn.Module, scope: str) -> None:
    """Let the first projection of every group route for the whole group; see `router_group`."""
    groups: dict[str, list[FourierMoELinear]] = {}
    for name, adapter in adapters(model).items():
        if isinstance(adapter, FourierMoELinear):
            groups.setdefault(router_group(name, scope), []).append(adapter)
    for leader, *followers in groups.values():
        if followers:
            assert isinstance(leader.router, TopKRouter)
            leader.router = LeadingRouter(leader.router, len(followers))
            for follower in followers:
                follower.router = FollowingRouter(leader.router)


def router_group(name: str, scope: str) -> str:
    """The group that a projection shares its router with, as a key; projections of equal keys share.

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
