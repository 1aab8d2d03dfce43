"""ExpertSpectra: by hand, and against dense updates, their transforms and singular values."""

import math
import multiprocessing

import pytest
import torch
from support.models import config, randomize
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fourier_moe import ExpertSpectra, SpectralExperts
from fourier_moe.analysis.spectra import band_edges, effective_number, radial_overlap
from fourier_moe.spectral.frequencies import band_centers, band_weight, named_generator, normalized_radius, signed_frequency

ABLATIONS = [
    {},
    {"coefficients": "real"},
    {"coefficients": "imaginary"},
    {"frequency_bias": False, "num_coefficients": 200},
    {"conjugate_symmetry": False},
    {"conjugate_symmetry": False, "frequency_bias": False, "num_coefficients": 600},  # many partners
    {"conjugate_symmetry": False, "coefficients": "imaginary", "frequency_bias": False, "num_coefficients": 600},
    {"scaling": 16.0, "band_layout": "stack", "bandwidth": 0.2},
    {"densities": [1, 4, 2, 1], "shared_coefficients": 14},
    {"densities": [1, 4, 2, 1], "shared_coefficients": 40, "conjugate_symmetry": False},
]
SHAPES = [(17, 24), (24, 17), (16, 20), (15, 13)]


def experts(M=17, N=24, **changes):
    settings = config(**{"bandwidth": 0.3, **changes})
    return randomize(SpectralExperts(N, M, settings, generator=named_generator(0, "experts"))).double()


def identifier(value):
    return (
        "-".join(f"{key}={v}" for key, v in value.items()) or "default"
        if isinstance(value, dict)
        else "x".join(map(str, value))
    )


def updates(layer):
    return torch.stack([layer.delta_weight(e).detach() for e in range(len(layer.segments))])


def plane(M, N):
    """Signed (u, v) of every entry of a transform (M, N, 2)."""
    u, v = signed_frequency(torch.arange(M), M), signed_frequency(torch.arange(N), N)
    return torch.stack(torch.meshgrid(u, v, indexing="ij"), -1)


def test_permuted_control_has_energies_ranks_and_overlaps_of_its_dense_update():
    layer = experts(permute=True)
    spectra, dense = ExpertSpectra.of(layer), updates(layer)
    torch.testing.assert_close(spectra.energy, dense.square().sum((1, 2)))
    share = torch.linalg.svdvals(dense) / torch.linalg.svdvals(dense).sum(1, keepdim=True)
    torch.testing.assert_close(spectra.effective_rank, torch.special.entr(share).sum(1).exp())
    flat = nn.functional.normalize(dense.flatten(1), dim=1)
    torch.testing.assert_close(spectra.update_overlap(), flat @ flat.T, rtol=1e-6, atol=1e-9)
    plain = updates(experts())
    assert (dense - plain).norm() > 0.1 * plain.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=identifier)
@pytest.mark.parametrize("changes", ABLATIONS, ids=identifier)
def test_measures_are_those_of_the_dense_update_and_its_transform(changes, shape):
    M, N = shape
    layer = experts(M, N, **({**changes, "num_coefficients": 160} if M == 15 and "num_coefficients" in changes else changes))
    spectra, dense = ExpertSpectra.of(layer), updates(layer)
    energy = torch.fft.fft2(dense).abs().square() / (M * N)  # Parseval
    radius = normalized_radius(plane(M, N), M, N)
    torch.testing.assert_close(spectra.energy, dense.square().sum((1, 2)))
    share = energy / energy.sum((1, 2), keepdim=True)
    center = (share * radius).sum((1, 2))
    torch.testing.assert_close(spectra.center, center)
    torch.testing.assert_close(spectra.radius_std, ((share * (radius - center[:, None, None]) ** 2).sum((1, 2))).sqrt())
    torch.testing.assert_close(spectra.effective_coefficients, torch.special.entr(share).sum((1, 2)).exp() / 2)
    centers = band_centers(4, 0.3, "cover")
    inside = torch.stack([band_weight(radius, center, 0.3) >= math.exp(-1) for center in centers])
    inside = torch.cat([inside, inside.new_ones(len(dense) - 4, M, N)])  # a shared expert's band is the plane
    torch.testing.assert_close(spectra.in_band(centers, 0.3), (share * inside).sum((1, 2)))
    occupancy = torch.stack([energy[:, (radius * 10).long().clamp(max=9) == r].sum(1) for r in range(10)], 1)
    torch.testing.assert_close(spectra.radial_occupancy(10), occupancy)
    singular = torch.linalg.svdvals(dense)
    assert torch.equal(spectra.rank, torch.linalg.matrix_rank(dense))
    torch.testing.assert_close(
        spectra.effective_rank, torch.special.entr(singular / singular.sum(1, keepdim=True)).sum(1).exp()
    )
    flat = dense.flatten(1) / dense.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(spectra.update_overlap(), flat @ flat.T)


@pytest.mark.parametrize("changes", ABLATIONS, ids=identifier)
def test_singular_values_are_exact_one_by_one(changes):
    layer = experts(**changes)
    for e, dense in enumerate(updates(layer)):
        mine, theirs = ExpertSpectra.of(layer).singular_values(e).sort(descending=True)[0], torch.linalg.svdvals(dense)
        size = max(len(mine), len(theirs))
        mine, theirs = (torch.nn.functional.pad(values, (0, size - len(values))) for values in (mine, theirs))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10 * float(theirs[0]))


def spectra_of(frequencies, coefficients, M=32, N=64, scale=1.0):
    """By hand: frequencies and coefficients of each expert."""
    c = torch.tensor(coefficients, dtype=torch.complex128)
    return ExpertSpectra(torch.tensor(frequencies), c, M, N, scale)


def test_measures_by_hand():
    """Expert 0: energies 9 and 1 at radii 1/2 and 1/4; expert 1: one wave; expert 2: two of equal energy."""
    rho = 1 / math.sqrt(2)  # of (u, 0) with u = M/2
    spectra = spectra_of([[[8, 0], [4, 1]], [[0, 16], [1, 1]], [[4, 0], [0, 16]]], [[3j, 1], [2, 0], [1, -1]], scale=0.1)
    wave = 0.01 * 32 * 64 / 2
    assert spectra.energy.tolist() == pytest.approx([10 * wave, 4 * wave, 2 * wave])
    r = [rho / 2, math.sqrt(((8 / 32) ** 2 + (2 / 64) ** 2) / 2)]
    center = 0.9 * r[0] + 0.1 * r[1]
    assert spectra.center.tolist() == pytest.approx([center, rho / 2, 0.375 * rho])
    assert spectra.radius_std.tolist() == pytest.approx([0.3 * (r[0] - r[1]), 0, 0.125 * rho], abs=1e-9)
    first = math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert spectra.effective_coefficients.tolist() == pytest.approx([first, 1, 2])
    # Rank 1 where u or v is 0, otherwise 2. A constant has the norm of a cosine times the square root of 2.
    ranks = [float(effective_number(torch.tensor([3 * 2**0.5, 1, 1]))), 1, 2]
    assert spectra.effective_rank.tolist() == pytest.approx(ranks)
    cosine = -2 * 1 / (2 * math.sqrt(2))
    assert spectra.update_overlap()[1].tolist() == pytest.approx([0, 1, cosine])
    assert spectra.in_band([rho / 2] * 3, 0.05).tolist() == pytest.approx([0.9, 1, 0.5])
    occupancy = spectra.radial_occupancy(4)
    assert occupancy[0].tolist() == pytest.approx([wave, 9 * wave, 0, 0])
    assert occupancy[2].tolist() == pytest.approx([wave, wave, 0, 0])


def test_overlap_of_experts_at_opposite_members_of_a_pair():
    layer = experts(16, 16, conjugate_symmetry=False, num_coefficients=8, frequency_bias=False)
    layer.frequencies.copy_(torch.tensor([[3, -5], [-3, 5], [8, -2], [-8, 2]]).unsqueeze(1))
    layer.coefficients.data.copy_(torch.tensor([[1.0, 2.0], [1.0, -2.0], [0.5, 1.0], [-0.5, 1.0]]).unsqueeze(1))
    spectra = ExpertSpectra.of(layer)
    expected = torch.block_diag(torch.ones(2, 2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).double()
    torch.testing.assert_close(spectra.update_overlap(), expected)
    assert spectra.frequencies[:, 0].tolist() == [[3, -5], [3, -5], [8, 2], [8, 2]]


def test_radius_one_is_the_last_bin():
    spectra = spectra_of([[[16, 31]], [[1, 0]]], [[1], [1]], M=32, N=62)
    assert spectra.radius[0].item() == pytest.approx(1)
    assert spectra.radial_occupancy(50)[0].nonzero().flatten().tolist() == [49]


@pytest.mark.parametrize(
    "changes", [{}, {"coefficients": "real"}, {"conjugate_symmetry": False}, {"num_coefficients": 24}], ids=identifier
)
def test_without_energy_an_expert_is_where_its_positions_are_and_uses_nothing(changes):
    layer = experts(**changes)
    layer.coefficients.data.zero_()[1, 0] = 1  # the others are dead
    spectra = ExpertSpectra.of(layer)
    dead = [0, 2, 3]
    torch.testing.assert_close(spectra.center[dead], spectra.radius.mean(1)[dead], rtol=1e-12, atol=0)
    torch.testing.assert_close(spectra.radius_std[dead], spectra.radius.std(1, correction=0)[dead])
    for measure in (spectra.energy, spectra.effective_coefficients, spectra.effective_rank):
        assert measure[dead].tolist() == [0, 0, 0]
        assert measure[1] > 0
    for matrix in (spectra.update_overlap(), radial_overlap(spectra.radial_occupancy(10))):
        assert matrix.nonzero().tolist() == [[1, 1]]


def test_a_wave_of_tiny_energy_is_still_a_wave():
    spectra = spectra_of([[[3, 4], [5, 6]]], [[1e-30, 1e-30]])
    assert spectra.effective_coefficients.item() == pytest.approx(2)
    assert spectra.effective_rank.item() == pytest.approx(4)
    assert spectra.center.item() == pytest.approx(spectra.radius.mean().item())


@pytest.mark.parametrize("center", [0.0, 0.0625, 0.5, 0.9375])
def test_band_ends_where_its_weight_is_one_over_e(center):
    inner, outer = band_edges(center, 0.12)
    assert outer - inner == pytest.approx(0.12)
    weight = band_weight(torch.tensor([inner, outer], dtype=torch.float64), center, 0.12).tolist()
    assert weight == pytest.approx([1 if center == 0 else math.exp(-1), math.exp(-1)])


def test_a_drawn_band_has_most_of_its_positions_inside():
    layer = experts(512, 512, num_coefficients=8 * 800, bandwidth=0.12)  # few of what there is
    layer.coefficients.data.fill_(1.0)
    centers = band_centers(4, 0.12, "cover")
    share = ExpertSpectra.of(layer).in_band(centers, 0.12)
    weights = [band_weight(normalized_radius(plane(512, 512), 512, 512), center, 0.12) for center in centers]
    expected = [float(weight[weight >= math.exp(-1)].sum() / weight.sum()) for weight in weights]
    assert share.tolist() == pytest.approx(expected, abs=0.04)
    assert share[1:].tolist() == pytest.approx([math.erf(1)] * 3, abs=0.05)


def test_effective_number():
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 7.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]])
    assert effective_number(weights).tolist() == pytest.approx([4, 1, 0, 2])


def test_radial_overlap():
    occupancy = torch.tensor([[1.0, 1.0, 0.0], [0.0, 30.0, 10.0], [0.0, 0.0, 5.0]])
    assert radial_overlap(occupancy).tolist() == [[1, 0.5, 0], [0.5, 1, 0.25], [0, 0.25, 1]]


def read_sharded(store):
    """In a process of its own: torch.distributed leaves traces that later forks cannot live with."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    for changes in ({}, {"coefficients": "imaginary"}):
        for placement in (Shard(0), Replicate()):
            layer = experts(**changes)
            expected = ExpertSpectra.of(layer).coefficients
            whole = distribute_tensor(layer.coefficients.data, init_device_mesh("cpu", (1,)), [placement])
            layer.coefficients = torch.nn.Parameter(whole)
            assert torch.equal(ExpertSpectra.of(layer).coefficients, expected)
    torch.distributed.destroy_process_group()


def test_sharded_coefficients(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=read_sharded, args=(tmp_path / "store",))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_what_is_read_stays_as_it_was_read():
    layer = experts()
    spectra = ExpertSpectra.of(layer)
    before = spectra.coefficients.clone()
    layer.coefficients.data.zero_()
    assert torch.equal(spectra.coefficients, before)
    assert not spectra.coefficients.requires_grad
