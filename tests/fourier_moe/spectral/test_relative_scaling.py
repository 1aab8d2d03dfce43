"""Under relative scaling one learning rate serves all widths."""

import math
from itertools import pairwise

import pytest
import torch
from support.models import config, randomize

from fourier_moe import Routing, SpectralExperts
from fourier_moe.spectral.frequencies import named_generator

WIDTHS = (128, 256, 512, 1024)
SHAPES = [*((width, width) for width in WIDTHS), (128, 512), (512, 128)]


def experts(M, N, **changes):
    settings = config(num_experts=2, **changes)
    return SpectralExperts(N, M, settings, generator=named_generator(0, "scaling"))


def norm_after_one_step(M, N, **changes):
    layer = experts(M, N, **changes)
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(16, N, generator=generator), torch.randn(16, M, generator=generator)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    (layer(x, Routing.to_all(torch.full((16, 2), 0.5))) - target).square().sum().backward()
    optimizer.step()
    return [(layer.delta_weight(e).norm() / math.sqrt(M)).item() for e in range(2)]


@pytest.mark.parametrize(("part", "expected"), [("complex", 0.01 * math.sqrt(2)), ("real", 0.01), ("imaginary", 0.01)])
def test_first_adam_step_has_the_same_relative_norm_in_all_shapes_and_counts(part, expected):
    for M, N in SHAPES:
        assert norm_after_one_step(M, N, coefficients=part) == pytest.approx([expected] * 2, rel=1e-4)
    for n in (16, 128, 1024):
        assert norm_after_one_step(256, 256, coefficients=part, num_coefficients=n) == pytest.approx([expected] * 2, rel=1e-4)


def test_first_adam_step_with_a_fixed_factor_depends_on_the_width():
    norms = [norm_after_one_step(width, width, scaling=16.0)[0] for width in WIDTHS]
    for narrow, wide in pairwise(norms):
        assert wide / narrow == pytest.approx(2**-1.5, rel=1e-3)


def relative_loss(width, **changes):
    """Student with the teacher's positions, a fixed number of AdamW steps from zero: final over initial loss."""
    teacher, student = randomize(experts(width, width, **changes), 0.7), experts(width, width, **changes)
    relative = experts(width, width).scaling
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the same function whatever the student's scaling: norm sqrt(M)
        teacher.coefficients.mul_(relative / teacher.scaling)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.03, weight_decay=0)
    losses = []
    for _step in range(41):
        x = torch.randn(32, width, generator=generator)
        gates = torch.rand(32, 2, generator=generator)
        with torch.no_grad():
            target = teacher(x, Routing.to_all(gates))
        loss = (student(x, Routing.to_all(gates)) - target).square().mean() / target.square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(1)
    return sum(losses[-5:]) / 5


def test_one_learning_rate_learns_equally_well_in_all_widths():
    losses = [relative_loss(width) for width in WIDTHS]
    assert max(losses) < 0.15
    assert max(losses) - min(losses) < 0.1


def test_with_a_fixed_factor_wide_layers_hardly_learn():
    fixed = experts(128, 128).scaling
    losses = [relative_loss(width, scaling=fixed) for width in WIDTHS]
    assert losses == sorted(losses)
    assert losses[0] < 0.15
    assert losses[-1] > 0.8
