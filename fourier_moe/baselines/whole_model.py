"""The two ends of fine-tuning without adapters: train every weight, or the head alone."""

from __future__ import annotations

from dataclasses import dataclass

from fourier_moe.config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(AdapterConfig):
    """Train the backbone and the head, in float32; saved in full, so its files have the size of the model.

    In bfloat16 most steps of a usual learning rate are smaller than half the distance to the next number, and lost.
    """

    trains_backbone = True


@dataclass(frozen=True, kw_only=True)
class HeadOnly(AdapterConfig):
    """Train the head on frozen features (linear probing); the floor that any adapter has to beat."""
