"""Head only (linear probing): the pretrained model is frozen, the head is trained."""

from __future__ import annotations

from dataclasses import dataclass

from fourier_moe.config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class HeadOnly(AdapterConfig):
    """Train the head on frozen features; the floor that any adapter has to beat."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets:
            raise ValueError(f"targets={list(self.targets)} has no effect on HeadOnly, which adapts no projection; remove it")
