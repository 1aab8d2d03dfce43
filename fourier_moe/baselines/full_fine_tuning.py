"""Full fine-tuning: every pretrained weight is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fourier_moe.config import AdapterConfig
from fourier_moe.inject import InjectionReport, count_parameters


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(AdapterConfig):
    """Train the backbone and the head; saved in full, so its files have the size of the model."""

    def inject(self, model: nn.Module) -> InjectionReport:
        model.requires_grad_(True)
        return count_parameters(model, self)

    def trains_backbone(self) -> bool:
        return True
