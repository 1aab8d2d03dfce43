"""Head only (linear probing): the pretrained model is frozen, the head is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fourier_moe.config import AdapterConfig
from fourier_moe.inject import InjectionReport, count_parameters, head_modules, train_only


@dataclass(frozen=True, kw_only=True)
class HeadOnly(AdapterConfig):
    """Train the head on frozen features; the floor that any adapter has to beat."""

    def inject(self, model: nn.Module) -> InjectionReport:
        train_only(model, head_modules(model, self).values())
        return count_parameters(model, self)
