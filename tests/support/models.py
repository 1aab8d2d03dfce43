"""Tiny models to adapt, and routers of a few experts."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fourier_moe import AdapterConfig, FourierMoEConfig, SpectralExperts, TopKRouter, inject, recording

_Module = TypeVar("_Module", bound=nn.Module)


def config(**changes: Any) -> FourierMoEConfig:
    """4 experts with 4 pairs each on q_proj and v_proj of `Transformer`."""
    arguments: dict[str, Any] = {"targets": ["q_proj", "v_proj"], "num_coefficients": 32, "num_experts": 4, **changes}
    return FourierMoEConfig(**arguments)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(torch.softmax(q @ k.transpose(-2, -1) / x.shape[-1] ** 0.5, -1) @ v)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Transformer(nn.Module):
    """(batch, length, width) -> (batch, classes)."""

    def __init__(self, width: int = 16, layers: int = 2, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(*(Block(width) for _ in range(layers)))
            self.norm = nn.BatchNorm1d(width)  # has buffers
            self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.layers(x).mean(1)))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(settings: AdapterConfig | None = None, **changes: Any) -> Transformer:
    """An adapted model whose trained parameters and head are random."""
    model = Transformer()
    inject(model, settings or config(head=["classifier"], **changes))
    return randomize_trained(model)


def randomize_trained(model: _Module) -> _Module:
    """Give the trained parameters of a model normal values, as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def randomize(module: _Module, std: float = 1.0) -> _Module:
    """Give all spectral experts in a module normal coefficients in place of their zeros."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, SpectralExperts):
                layer.coefficients.normal_(0, std, generator=generator)
    return module


class DenseRouter(TopKRouter):
    """Gives the gates of all experts, 0 for the inactive ones."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).dense(self.num_experts)


def router(top_k: int = 2, num_experts: int = 4, in_features: int = 6, seed: int = 0, **options: Any) -> DenseRouter:
    """For tokens (..., 6) if not told otherwise."""
    return DenseRouter(in_features, num_experts, top_k, generator=torch.Generator().manual_seed(seed), **options)


def transparent_router(top_k: int, num_experts: int) -> DenseRouter:
    """R = identity, so that the input log(p) gives the probabilities p."""
    layer = router(top_k, num_experts, num_experts)
    nn.init.eye_(layer.weight)
    return layer


def balance(layer: TopKRouter, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The load-balancing loss of a router on tokens."""
    with recording(layer, mask):
        layer(x)
        return layer.balance_loss()


class Tower(nn.Module):
    """Torch's fused attention, then a classifier."""

    def __init__(self, classes=3, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, dropout=0.5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, classes)
        self.double()

    def forward(self, x):
        return self.head(self.encoder(x)[:, 0])
