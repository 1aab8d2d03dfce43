"""Forced-balance routing: every expert serves the same number of tokens, independent of the router's weights.

Shape legend: T tokens, E experts, K active experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourier_moe import Routing, TopKRouter, adapters


class BalancedRouter(TopKRouter):
    """Token t goes to experts t*K, t*K + 1, ... (mod E) with gates 1/K, at the cost of the router that it replaces.

    Logits, softmax and top-K are computed as usual, and the gates depend on the probabilities of the forced experts, so the
    backward pass through the router costs as much as in training.

    Args:
        router: provides weight and settings.
    """

    def __init__(self, router: TopKRouter) -> None:
        in_features, generator = router.weight.shape[1], torch.Generator()
        super().__init__(in_features, router.num_experts, router.top_k, generator=generator)
        self.weight, self.waves = router.weight, router.waves

    def route(self, x: Tensor) -> Routing:
        probabilities = self.probabilities(x)
        chosen = torch.topk(probabilities, self.top_k, -1).indices
        forced = torch.arange(chosen.numel(), device=x.device).remainder(self.num_experts).view_as(chosen)
        values = probabilities.gather(-1, forced)
        return Routing(values / values.detach() / self.top_k, forced, probabilities)


def balance_routing(model: nn.Module) -> None:
    """Replace every adapter's router with a BalancedRouter; a router shared by several adapters stays shared."""
    balanced: dict[int, BalancedRouter] = {}
    for adapter in adapters(model).values():
        router = getattr(adapter, "router", None)
        if isinstance(router, TopKRouter) and not isinstance(router, BalancedRouter):
            adapter.router = balanced.setdefault(id(router), BalancedRouter(router))
