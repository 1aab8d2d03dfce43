"""Spectral sensitivity against brute force, its expectations for white noise, and its control."""

import math

import pytest
import torch
from support.models import Transformer, config, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

from fourier_moe import adapters, inject
from fourier_moe.analysis.sensitivity import (
    RadialSpectrum,
    Sensitivity,
    dense_gradients,
    measure,
    radial_spectrum,
    white_share,
)

SHAPES = [(5, 7), (6, 7), (8, 6), (9, 4), (3, 2), (1, 5)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- gradients


def adapted(**changes):
    model = Transformer(width=15).eval()
    inject(model, config(num_coefficients=16, head=["classifier"], **changes))
    return model.double()


def padded_loss(model, batch):
    x, mask, label = batch
    logits = model.classifier(model.norm(((model.layers(x)) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)))
    return nn.functional.cross_entropy(logits, label)


def batches(count=3):
    for seed in range(count):
        size = seed + 2
        mask = (torch.arange(5) < torch.arange(size)[:, None] % 5 + 1).double()
        yield noise(size, 5, 15, seed=seed), mask, torch.arange(size) % 3


def test_dense_gradient_is_that_of_autograd_for_every_projection():
    model = randomize(adapted(), 0.5)  # not at the pretrained model: the update's gradient includes what the experts changed
    weights = [1.0, 2.5, 0.5]
    measured = dense_gradients(adapters(model), lambda batch: padded_loss(model, batch), zip(batches(), weights, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    for adapter in adapters(model).values():
        adapter.base.weight.requires_grad_(True)
    sum(w * padded_loss(model, batch) for w, batch in zip(weights, batches(), strict=True)).backward()
    assert list(measured) == list(adapters(model))
    assert len(measured) == 4
    for name, adapter in adapters(model).items():
        assert measured[name].dtype == torch.float64
        torch.testing.assert_close(measured[name], adapter.base.weight.grad)
        assert measured[name].abs().max() > 1e-6


def test_tokens_without_loss_add_nothing():
    model = adapted(targets=["out_proj"])
    x, mask, label = next(batches(1))
    other = x + 100 * (1 - mask[..., None])
    assert not torch.equal(x, other)

    def per_token(batch):
        return (model.layers[-1].attention.out_proj(batch[0]).square().sum(-1) * batch[1]).sum()

    projections = {"out_proj": model.layers[-1].attention.out_proj}
    first, second = (dense_gradients(projections, per_token, [((y, mask, label), 1.0)]) for y in (x, other))
    torch.testing.assert_close(first["out_proj"], second["out_proj"], rtol=0, atol=0)


def test_projection_called_twice_and_under_checkpointing_counts_each_call_once():
    model = adapted()
    projection = model.layers[0].attention.q_proj
    x = noise(4, 15)

    def loss(use_checkpoint):
        inner = lambda y: projection(torch.tanh(projection(y)))  # noqa: E731
        return (checkpoint(inner, x, use_reentrant=False) if use_checkpoint else inner(x)).square().sum()

    measured = [dense_gradients({"q": projection}, loss, [(flag, 1.0)])["q"] for flag in (False, True)]
    projection.base.weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(loss(False), projection.base.weight)
    for value in measured:
        torch.testing.assert_close(value, expected)


def test_projection_without_gradient_is_an_error():
    model = adapted()
    projections = adapters(model)
    first = next(iter(projections))
    with pytest.raises(ValueError, match=r"targets layers\.0\.attention\.v_proj, .* get no gradient from the loss"):
        dense_gradients(projections, lambda batch: projections[first](batch).sum(), [(noise(2, 15), 1.0)])
    assert not any(module._forward_hooks for module in projections.values())


def test_hooks_are_gone_after_a_failing_loss():
    model = adapted()

    def fail(batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        dense_gradients(adapters(model), fail, [(None, 1.0)])
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- spectra


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strongest", [1, 3, 10_000])
def test_spectrum_is_that_of_the_whole_transform_without_self_conjugate_positions(shape, strongest):
    matrix, num_bins = noise(*shape), 4
    transform = torch.fft.fft2(matrix).abs().square()
    entries = []
    for row, column in ((p, q) for p in range(shape[0]) for q in range(shape[1])):
        u, v = (i if i <= size / 2 else i - size for i, size in zip((row, column), shape, strict=True))
        if not (2 * u % shape[0] == 0 and 2 * v % shape[1] == 0):
            radius = math.sqrt(((2 * u / shape[0]) ** 2 + (2 * v / shape[1]) ** 2) / 2)
            entries.append((float(transform[row, column]), radius))
    total = sum(energy for energy, _ in entries)
    spectrum = radial_spectrum(matrix, strongest=strongest, num_bins=num_bins)
    for index in range(num_bins):
        inside = [energy for energy, radius in entries if min(int(radius * num_bins), num_bins - 1) == index]
        assert float(spectrum.energy[index]) == pytest.approx(sum(inside) / total)
        assert float(spectrum.positions[index]) == pytest.approx(len(inside) / len(entries))
    energies = sorted((energy for energy, _ in entries), reverse=True)
    assert spectrum.mean_radius == pytest.approx(sum(e * r for e, r in entries) / total)
    assert spectrum.white_radius == pytest.approx(sum(r for _, r in entries) / len(entries))
    assert spectrum.strongest_share == pytest.approx(sum(energies[:strongest]) / total)
    assert spectrum.white_share == pytest.approx(white_share(min(strongest, len(entries)) / len(entries)))


def test_white_noise_is_flat_holds_the_expected_share_and_equals_its_permutations():
    sensitivity = measure(noise(200, 301), strongest=1600)
    spectrum = sensitivity.spectrum
    assert spectrum.density[5:28] == pytest.approx(torch.ones(23), abs=0.1)
    assert spectrum.mean_radius == pytest.approx(spectrum.white_radius, abs=0.003)
    assert white_share(0.027) == pytest.approx(0.1245, abs=1e-3)
    assert (white_share(0.0), white_share(1.0)) == (0.0, 1.0)
    assert spectrum.strongest_share == pytest.approx(spectrum.white_share, rel=0.01)
    assert spectrum.unevenness < 0.05
    assert len({control.mean_radius for control in sensitivity.controls}) == 20
    assert max(abs(sensitivity.deviation(name)) for name in ("mean_radius", "unevenness", "strongest_share")) < 4


def test_planted_low_frequencies_are_found_and_do_not_survive_permutation():
    rows, columns = torch.arange(60).double()[:, None] / 60, torch.arange(45).double()[None] / 45
    wave = torch.cos(2 * math.pi * (3 * rows + 2 * columns))
    sensitivity = measure(noise(60, 45) + wave, strongest=2, num_bins=16)
    radius = math.sqrt(((6 / 60) ** 2 + (4 / 45) ** 2) / 2)
    assert int(sensitivity.spectrum.density.nan_to_num().argmax()) == int(16 * radius)
    assert sensitivity.spectrum.strongest_share > 0.3  # wave: energy 1/2 per entry, noise: 1
    assert sensitivity.deviation("mean_radius") < -10
    assert sensitivity.deviation("unevenness") > 10
    assert sensitivity.control("mean_radius")[0] == pytest.approx(sensitivity.spectrum.white_radius, abs=0.02)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    shuffled = measure((noise(60, 45) + wave)[order], strongest=2, num_bins=16)
    assert shuffled.spectrum.mean_radius > sensitivity.spectrum.mean_radius + 0.05
    columns_too = torch.randperm(45, generator=torch.Generator().manual_seed(6))
    both = measure((noise(60, 45) + wave)[order][:, columns_too], strongest=2, num_bins=16)
    assert abs(both.deviation("mean_radius")) < 4


def test_structure_of_many_layers_is_compared_with_the_mean_of_their_permutations():
    first, second = measure(noise(20, 30), strongest=8), measure(noise(14, 9, seed=1), strongest=8)
    mean = Sensitivity.mean([first, second])
    assert mean.spectrum.mean_radius == pytest.approx((first.spectrum.mean_radius + second.spectrum.mean_radius) / 2)
    assert torch.equal(mean.spectrum.energy, (first.spectrum.energy + second.spectrum.energy) / 2)
    assert mean.controls[3].strongest_share == pytest.approx(
        (first.controls[3].strongest_share + second.controls[3].strongest_share) / 2
    )


def test_same_control_every_time_and_no_spread_is_no_division_by_zero():
    first, second = (measure(noise(6, 5), strongest=4, permutations=3).controls for _ in range(2))
    assert [one.mean_radius for one in first] == [one.mean_radius for one in second]
    one = radial_spectrum(noise(6, 5), strongest=4)
    assert Sensitivity(one, (one, one)).deviation("mean_radius") == 0
    other = radial_spectrum(noise(6, 5, seed=1), strongest=4)
    assert math.isinf(Sensitivity(other, (one, one)).deviation("mean_radius"))


def test_mean_of_spectra_without_positions_in_a_ring():
    one = radial_spectrum(noise(3, 2), strongest=1, num_bins=8)
    assert one.density.isnan().any()
    assert math.isfinite(one.unevenness)
    assert RadialSpectrum.mean([one, one]).unevenness == pytest.approx(one.unevenness)
