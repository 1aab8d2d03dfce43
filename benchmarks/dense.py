"""FourierMoE as in the paper: the dense update of every expert is rebuilt in every forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourier_moe import FourierMoEConfig, FourierMoELinear, layer_of


@dataclass(frozen=True, kw_only=True)
class DenseFourierMoEConfig(FourierMoEConfig):
    """FourierMoEConfig whose layers are DenseFourierMoELinear."""


@layer_of(DenseFourierMoEConfig)
class DenseFourierMoELinear(FourierMoELinear):
    """The same function of the same parameters as FourierMoELinear, from dense update matrices.

    Each expert is applied to its active tokens only, the cheapest use of dense matrices.
    """

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = self.base(x) if y is None else y
        gates_TE = self.route(x).dense(self.experts.num_routed).flatten(0, -2)
        x_TN = self.dropout(x).flatten(0, -2)
        update_TM: Tensor | None = None
        for expert in range(gates_TE.shape[1]):
            active = gates_TE[:, expert].nonzero().squeeze(-1)
            delta_MN = self.experts.delta_weight(expert)
            if not torch.is_autocast_enabled(x.device.type):
                x_TN = x_TN.to(delta_MN.dtype)
            part = nn.functional.linear(x_TN[active], delta_MN)
            part = part * gates_TE[active, expert].unsqueeze(-1).to(part.dtype)
            if update_TM is None:
                update_TM = part.new_zeros(len(x_TN), self.out_features)
            update_TM = update_TM.index_add(0, active, part)
        assert update_TM is not None
        return y + update_TM.view_as(y).to(y.dtype)
