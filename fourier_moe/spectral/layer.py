"""FourierMoELinear: a frozen projection, a token router and spectral experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter, ParameterKind, layer_of
from fourier_moe.errors import UserError
from fourier_moe.models.projection import device_of, with_update
from fourier_moe.routing.record import Routing
from fourier_moe.routing.router import TopKRouter
from fourier_moe.routing.sharing import SharedRouter, share_routers
from fourier_moe.spectral.config import FourierMoEConfig
from fourier_moe.spectral.experts import SpectralExperts
from fourier_moe.spectral.frequencies import named_generator


@layer_of(FourierMoEConfig)
class FourierMoELinear(Adapter):
    """y = base(x) + alpha sum_e g_e(z) dW_e z (paper Eq. 2), (..., N) -> (..., M) in the dtype of the base's output.

    z is x, or x centered and scaled under `normalize_input: moments`.

    Router and experts are float32 whatever the base; the base is only called, its weight never read, so it may be quantized,
    sharded or on the meta device. A single expert (E = 1) serves every token with gate 1: it has no router, and merges.

    Args:
        base: the frozen projection.
        config: the adapter's hyper-parameters.
        name: the projection's name in its model; with config.seed it fixes positions and the router's start.
    """

    named_generator = True

    def __init__(self, base: nn.Module, config: FourierMoEConfig, name: str) -> None:
        super().__init__(base)
        device, generator = device_of(base), named_generator(config.seed or 0, name)
        self.balance_weight = config.balance_weight
        router = TopKRouter(  # drawn in any case: positions are those that a seed gave before E = 1 went without
            self.in_features,
            config.num_experts,
            config.top_k,
            normalize_gates=config.normalize_gates,
            num_features=None if config.router_features == "all" else config.router_features,
            generator=generator,
            device=device,
        )
        self.router: TopKRouter | SharedRouter | None = router if config.num_experts > 1 else None
        self.dropout = nn.Dropout(config.dropout)
        try:
            self.experts = SpectralExperts(self.in_features, self.out_features, config, generator=generator, device=device)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    @classmethod
    def connect(cls, adapters: Mapping[str, Any], config: FourierMoEConfig) -> None:
        if config.router_scope != "projection" and config.num_experts > 1:
            share_routers(adapters, config.router_scope)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Add the update to y, which is base(x) if not given."""
        y = self.base(x) if y is None else y
        z = self.reads(x)
        return y + self.experts(self.dropout(z), self.route(z)).to(y.dtype)

    def route(self, z: Tensor) -> Routing:
        """Which experts serve each token, (..., N) as the adapter reads it."""
        return Routing.to_one(z) if self.router is None else self.router(z)

    def merged(self) -> nn.Module:
        return with_update(self.base, *self.constant_update())

    @torch.no_grad()
    def constant_update(self) -> tuple[Tensor, Tensor | None]:
        """dW (M, N) and, where the input is centered, b (M,), else None: y = base(x) + dW x + b for every token.

        Raises:
            UserError: if tokens are routed.
        """
        if self.router is not None:
            super().merged()  # says so
        update = torch.stack([self.experts.delta_weight(expert) for expert in range(len(self.experts.segments))]).sum(0)
        return (update, None) if self.input_moments is None else self.input_moments.as_affine(update)

    def parameter_groups(self) -> Mapping[ParameterKind, list[nn.Parameter]]:
        return {"experts": [self.experts.coefficients], "router": [] if self.router is None else list(self.router.parameters())}

    def balance_loss(self) -> Tensor | None:
        loss = None if self.router is None else self.router.balance_loss()
        return None if loss is None else self.balance_weight * loss
