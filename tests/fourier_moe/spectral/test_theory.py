"""The paper's propositions, measured on the layer itself in float64: what they say, and what they do not."""

import math

import pytest
import torch
from torch import Tensor

from fourier_moe import ExpertSpectra, FourierMoEConfig, SpectralExperts

SHAPES = [(12, 16), (9, 7), (8, 8), (5, 12)]
PAIRS = 5


def experts(shape: tuple[int, int], seed: int = 0, num_experts: int = 2, **options: object) -> SpectralExperts:
    """Experts with random coefficients on an M x N projection, in float64."""
    generator = torch.Generator().manual_seed(seed)
    config = FourierMoEConfig(
        targets=["x"],
        num_coefficients=2 * PAIRS * num_experts,
        num_experts=num_experts,
        bandwidth=2.0,
        top_k=1,
        scaling=3.0,
        **options,
    )
    made = SpectralExperts(shape[1], shape[0], config, generator=generator).double()
    made.coefficients.data = torch.randn(made.coefficients.shape, generator=generator, dtype=torch.float64)
    return made


def complex_update(made: SpectralExperts, expert: int = 0) -> Tensor:
    """alpha IDFT2(F_e) (M, N) before its real part is taken."""
    return made.scaling * torch.fft.ifft2(made.spectrum(expert))


def mirrored(update: Tensor) -> Tensor:
    """update[-p, -q], indices modulo the shape."""
    return update.flip(0, 1).roll((1, 1), (0, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_theorem_3_2_an_update_is_real_exactly_if_its_spectrum_is_hermitian(shape):
    for symmetric in (True, False):
        made = experts(shape, conjugate_symmetry=symmetric)
        spectrum = made.spectrum(0)
        hermitian = torch.allclose(spectrum, mirrored(spectrum).conj(), atol=1e-12)
        real = complex_update(made).imag.abs().max() < 1e-12
        assert (hermitian, bool(real)) == (symmetric, symmetric)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_corollary_3_3_the_discarded_energy_is_that_of_the_antihermitian_spectrum(shape, seed):
    made = experts(shape, seed, conjugate_symmetry=False)
    update, spectrum = complex_update(made), made.spectrum(0)
    antihermitian = (spectrum - mirrored(spectrum).conj()) / 2
    discarded = update.imag.square().sum()
    torch.testing.assert_close(discarded, made.scaling**2 * antihermitian.abs().square().sum() / math.prod(shape))  # Eq. 10, 11

    drawn = {tuple(place) for place in (made.frequencies[0].long() % torch.tensor(shape)).tolist()}
    partners = {(-u % shape[0], -v % shape[1]) for u, v in drawn}
    if not drawn & partners:  # then it is one half, whatever the coefficients are
        torch.testing.assert_close(discarded, update.abs().square().sum() / 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_discarded_energy_costs_nothing_a_single_position_is_a_pair_of_half_its_size(shape):
    free = experts(shape, conjugate_symmetry=False)
    paired = experts(shape)
    paired.frequencies, paired.coefficients.data = free.frequencies, free.coefficients.data / 2
    torch.testing.assert_close(paired.delta_weight(0), free.delta_weight(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("part", "sign"), [("real", 1), ("imaginary", -1)])
def test_proposition_3_1_real_coefficients_give_even_updates_and_imaginary_ones_odd_ones(shape, part, sign):
    update = experts(shape, coefficients=part).delta_weight(0)
    assert update.abs().max() > 0.01
    torch.testing.assert_close(mirrored(update), sign * update)

    both = experts(shape).delta_weight(0)
    even, odd = (both + mirrored(both)) / 2, (both - mirrored(both)) / 2
    spectra = ExpertSpectra.of(experts(shape))
    share = spectra.coefficients[0].real.square().sum() / spectra.coefficients[0].abs().square().sum()
    torch.testing.assert_close(even.square().sum() / both.square().sum(), share)
    assert odd.square().sum() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_proposition_h_4_one_coefficient_moves_the_complex_update_everywhere_by_the_same_amount(shape):
    made = experts(shape, conjugate_symmetry=False)
    before = complex_update(made)
    with torch.no_grad():
        made.coefficients[0, 0, 0] += 1.0
    change = (complex_update(made) - before).abs()
    torch.testing.assert_close(change, torch.full_like(change, made.scaling / math.prod(shape)))


def test_proposition_h_4_the_real_update_moves_by_a_cosine_which_is_zero_in_places():
    made = experts((8, 8), num_experts=1)
    made.frequencies[0, 0] = torch.tensor([2, 0])  # cos(pi p / 2): every other row
    before = made.delta_weight(0)
    with torch.no_grad():
        made.coefficients[0, 0, 0] += 1.0
    change = (made.delta_weight(0) - before).detach()
    assert (change.abs() < 1e-12).sum() == 32  # "every weight" holds for the complex kernel only
    assert change.abs().max() == pytest.approx(2 * made.scaling / 64)
    torch.testing.assert_close(change.square().mean().sqrt(), torch.tensor(math.sqrt(2) * made.scaling / 64).double())


@pytest.mark.parametrize("shape", [(16, 24), (15, 11)])
def test_theorem_h_2_and_corollary_h_3_the_rank_of_a_token_s_update_is_at_most_two_per_active_pair(shape):
    made = experts(shape, num_experts=3)
    for active in ([0], [0, 2], [0, 1, 2]):
        update = sum(made.delta_weight(expert) for expert in active)
        assert torch.linalg.matrix_rank(update) <= min(2 * PAIRS * len(active), *shape)
    assert torch.linalg.matrix_rank(made.delta_weight(0)) > 2
