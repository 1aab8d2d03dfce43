"""Mixtures to test, small, one of every kind and some options; their gates by the equations."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fourier_moe import (
    AdaMoLEConfig,
    FFTMoEConfig,
    GOATConfig,
    HydraLoRAConfig,
    MoLoRAConfig,
    balance_loss,
    inject,
    recording,
)
from fourier_moe.adapter import build_layer
from support.models import Transformer

COMMON = {"targets": ["q_proj", "v_proj"], "head": ["classifier"], "num_experts": 4}
CONFIGS = [
    MoLoRAConfig(**COMMON, r=8, alpha=3.0, seed=3),
    MoLoRAConfig(**COMMON, r=4, top_k=4),
    MoLoRAConfig(**COMMON, r=4, top_k=3, normalize_gates=False),
    MoLoRAConfig(**COMMON, r=4, top_k=1),
    AdaMoLEConfig(**COMMON, r=8, alpha=3.0, seed=3),
    AdaMoLEConfig(**COMMON, r=4, max_threshold=0.6),
    HydraLoRAConfig(**COMMON, r=3, alpha=5.0, seed=3),
    GOATConfig(**COMMON, r=8, alpha=3.0, rho=4.0, seed=3),
    GOATConfig(**COMMON, r=4, alpha=None, eta=0.5),
    FFTMoEConfig(**COMMON, seed=3),
]
IDS = [
    "molora",
    "molora_dense",
    "molora_raw",
    "molora_1",
    "adamole",
    "adamole_high",
    "hydralora",
    "goat",
    "goat_eta",
    "fft_moe",
]
LORA = [config for config in CONFIGS if not isinstance(config, FFTMoEConfig)]
ONE_EACH = [config for config, name in zip(CONFIGS, IDS, strict=True) if "_" not in name or name == "fft_moe"]
SIZES = [(5, 7), (7, 5), (8, 8), (13, 9)]  # M, N


def of_each(configs):
    return pytest.mark.parametrize("config", configs, ids=[IDS[CONFIGS.index(config)] for config in configs])


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = tokens(8, 5, 16, seed=1).float()
LABELS = torch.arange(8) % 3


def projection(M, N, bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(N, M, bias=bias, dtype=torch.float64)


def fitting(config, M, N):
    """With a rank that a projection of this size allows."""
    return replace(config, r=config.num_experts) if hasattr(config, "r") and min(M, N) // 4 < 2 else config


def moved_layer(config, M, N, bias=True):
    """An adapted projection in float64 whose trained parameters are away from their start; and the pretrained one."""
    base = projection(M, N, bias)
    layer = build_layer(copy.deepcopy(base), fitting(config, M, N), "proj").double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in layer.parameter_groups().values():
            for parameter in group:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer, base


def gates_by_the_equations(config, layer, x):
    """Gates of one token (N,), one expert after the other."""
    E = config.num_experts
    scores = [math.exp(float(layer.router.weight[e] @ x)) for e in range(E)]
    p = [score / sum(scores) for score in scores]
    if isinstance(config, HydraLoRAConfig):
        return p
    if isinstance(config, AdaMoLEConfig):
        high = config.max_threshold or 1 / E
        tau = high / (1 + math.exp(-float(layer.router.threshold_weight[0] @ x + layer.router.threshold_bias)))
        kept = [p_e - tau if p_e >= tau else 0.0 for p_e in p]
        return [value / (sum(kept) or 1) for value in kept]
    chosen = sorted(range(E), key=p.__getitem__)[-config.top_k :]
    total = sum(p[e] for e in chosen) if config.top_k > 1 and getattr(config, "normalize_gates", True) else 1
    return [p[e] / total if e in chosen else 0.0 for e in range(E)]


def losses(model, steps=20):
    model.train()
    model.norm.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(steps):
        with recording(model):
            task = nn.functional.cross_entropy(model(X), LABELS)
            loss = task + balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(task.item())
    return values


def trained(config):
    model = Transformer()
    inject(model, config)
    losses(model, 5)
    return model.eval()
