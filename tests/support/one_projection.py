"""One adapted projection, and how it is compared with its equation."""

from dataclasses import replace

import torch
from torch import nn

from fourier_moe import inject

SIZES = [(12, 20), (20, 12), (16, 16)]  # (out, in)


def layer_of(config, M, N, moved=True):
    """An adapted M x N projection, its pretrained weight and bias in float64, and its trained tensors, at random if `moved`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M))
    weight, bias = (p.detach().double().clone() for p in model[0].parameters())
    inject(model, replace(config, targets=["0"], head=[]))
    generator = torch.Generator().manual_seed(7)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained if moved else ():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model[0], weight, bias, [p.detach().double() for p in trained]


def tokens(N):
    return torch.randn(2, 3, N, generator=torch.Generator().manual_seed(2))


def assert_equal(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
