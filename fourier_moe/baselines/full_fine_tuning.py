"""Full fine-tuning: every pretrained weight is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fourier_moe.config import AdapterConfig
from fourier_moe.errors import UserError
from fourier_moe.inject import InjectionReport, count_parameters
from fourier_moe.models.quantization import is_quantized


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(AdapterConfig):
    """Train the backbone and the head, in float32; saved in full, so its files have the size of the model.

    In bfloat16 most steps of a usual learning rate are smaller than half the distance to the next number, and lost.
    """

    def inject(self, model: nn.Module) -> InjectionReport:
        if is_quantized(model):
            raise UserError("full fine-tuning trains the pretrained weights, and these are quantised; load them without")
        model.float().requires_grad_(True)
        return count_parameters(model, self)

    def trains_backbone(self) -> bool:
        return True
