"""Positions: one per conjugate pair, distributed by the band weight, and fixed by (seed, name) alone."""

import math
from itertools import pairwise

import pytest
import torch
from support.models import Transformer, config

from fourier_moe import inject
from fourier_moe.spectral import frequencies as module
from fourier_moe.spectral.experts import SpectralExperts
from fourier_moe.spectral.frequencies import (
    band_capacity,
    band_centers,
    band_weight,
    count_positions,
    draw_frequencies,
    named_generator,
    normalized_radius,
    signed_frequency,
)

PATHS = {"enumeration": 2**60, "rejection": 0}
SIZES = range(1, 10)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Runs a test once with every plane enumerated, once with none."""
    monkeypatch.setattr(module, "_ENUMERATION_LIMIT", PATHS[request.param])
    return request.param


def conjugate(position, M, N):
    """(-u, -v) as DFT indices."""
    return (-position[0]) % M, (-position[1]) % N


def brute_force(M, N):
    """All DFT positions that are not self-conjugate, and the set of conjugate pairs among them."""
    positions = [(u, v) for u in range(M) for v in range(N) if conjugate((u, v), M, N) != (u, v)]
    return positions, {frozenset((p, conjugate(p, M, N))) for p in positions}


@pytest.mark.parametrize("M", SIZES)
def test_count_equals_brute_force(M):
    for N in SIZES:
        positions, pairs = brute_force(M, N)
        assert count_positions(M, N, half_plane=False) == len(positions)
        assert count_positions(M, N) == len(pairs)


@pytest.mark.parametrize("M", SIZES)
def test_drawing_all_positions_gives_each_pair_exactly_once(path, M):
    for N in SIZES:
        positions, pairs = brute_force(M, N)
        if not pairs:
            continue
        for half_plane, expected in ((True, len(pairs)), (False, len(positions))):
            drawn = draw_frequencies(
                expected, M, N, named_generator(0, f"{M}{N}"), center=None, bandwidth=0.1, half_plane=half_plane
            )
            assert drawn.dtype == torch.int32
            assert (2 * drawn[:, 0].abs() <= M).all()
            assert (2 * drawn[:, 1].abs() <= N).all()
            indices = [(u % M, v % N) for u, v in drawn.tolist()]
            assert len(set(indices)) == expected
            found = {frozenset((p, conjugate(p, M, N))) for p in indices} if half_plane else set(indices)
            assert found == (pairs if half_plane else set(positions))


@pytest.mark.parametrize(("M", "N"), [(16, 16), (15, 16), (16, 15), (33, 64), (600, 700)])
@pytest.mark.parametrize("half_plane", [True, False])
def test_no_duplicates_no_self_conjugate_and_one_member_of_each_pair(M, N, half_plane):
    for center in (0.1, 0.5, 0.9):
        count = min(20, int(band_capacity(M, N, center, 0.12, half_plane)))  # small planes are drawn as full as may be
        assert count >= 5
        drawn = draw_frequencies(count, M, N, named_generator(1, "x"), center=center, bandwidth=0.12, half_plane=half_plane)
        indices = [(u % M, v % N) for u, v in drawn.tolist()]
        assert len(set(indices)) == count
        assert all(conjugate(p, M, N) != p for p in indices)
        if half_plane:
            assert len({frozenset((p, conjugate(p, M, N))) for p in indices}) == count
        assert drawn.tolist() == sorted(drawn.tolist())


def test_signed_frequency_is_congruent_and_small():
    for size in SIZES:
        signed = signed_frequency(torch.arange(size), size)
        assert torch.equal(signed % size, torch.arange(size))
        assert (2 * signed <= size).all()
        assert (2 * signed > -size).all()


def test_radius_is_0_at_dc_and_1_at_the_corner_and_symmetric():
    points = torch.tensor([[0, 0], [4, 8], [-4, -8], [4, 0], [0, 8], [2, -4]])
    expected = torch.tensor([0, 1, 1, math.sqrt(0.5), math.sqrt(0.5), 0.5], dtype=torch.float64)
    torch.testing.assert_close(normalized_radius(points, 8, 16), expected)


def test_band_weight_is_the_formula_and_finite_everywhere():
    radius = torch.linspace(0, 1, 101, dtype=torch.float64)
    for center in (0.0, 1e-300, 0.06, 0.5, 1.0, 7.0):
        for bandwidth in (1e-6, 0.12, 1e6):
            weight = band_weight(radius, center, bandwidth)
            assert weight.isfinite().all()
            assert ((weight >= 0) & (weight <= 1)).all()
    assert band_weight(radius, 0.0, 0.12)[0] == 1
    assert band_weight(radius, 0.5, 0.12)[0] == 0
    assert band_weight(radius, 0.5, 0.12)[50] == 1
    r, f, B = 0.4, 0.5, 0.12
    expected = math.exp(-(((r * r - f * f) / (r * B)) ** 2))
    assert band_weight(torch.tensor([r], dtype=torch.float64), f, B).item() == pytest.approx(expected, rel=1e-12)


def test_band_centers():
    assert band_centers(4, 0.3, "cover") == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert band_centers(4, 0.1, "stack") == pytest.approx([0.05, 0.15, 0.25, 0.35])
    assert band_centers(3, (0.1, 0.4, 0.2), "stack") == pytest.approx([0.05, 0.3, 0.6])  # side by side
    assert band_centers(2, (0.1, 0.4), "cover") == pytest.approx([0.25, 0.75])


def mean_radii(layout, bandwidth, experts=8, size=128):
    return [
        normalized_radius(
            draw_frequencies(63, size, size, named_generator(0, str(e)), center=center, bandwidth=bandwidth),
            size,
            size,
        )
        for e, center in enumerate(band_centers(experts, bandwidth, layout))
    ]


def test_cover_spreads_the_experts_over_all_radii(path):
    means = [radii.mean().item() for radii in mean_radii("cover", 0.12)]
    assert all(low + 0.05 < high for low, high in pairwise(means))
    # Positions get denser outwards, which pulls the mean of the innermost band up.
    assert means[1:] == pytest.approx([(e + 0.5) / 8 for e in range(1, 8)], abs=0.04)
    assert 0.0625 < means[0] < 0.15


def test_stack_stays_low_for_a_small_bandwidth(path):
    radii = mean_radii("stack", 0.06)
    means = [r.mean().item() for r in radii]
    assert all(low < high for low, high in pairwise(means))
    assert means[1:] == pytest.approx([(e + 0.5) * 0.06 for e in range(1, 8)], abs=0.02)
    assert 0.03 < means[0] < 0.08
    assert torch.cat(radii).quantile(0.99) < 0.55


def drawn_indices(count, M, N, draws, **arguments):
    """Rows of a (draws, count) tensor: flat DFT index of every drawn position."""
    rows = []
    for i in range(draws):
        drawn = draw_frequencies(count, M, N, named_generator(i, "statistics"), **arguments).long()
        rows.append(drawn[:, 0] % M * N + drawn[:, 1] % N)
    return torch.stack(rows)


def known_weights(M, N, center, bandwidth):
    """Weight of every flat DFT index; 0 where the position or its partner's twin is not to be drawn. Plain Python."""
    weights = torch.zeros(M * N, dtype=torch.float64)
    for u in range(M):
        for v in range(N):
            su, sv = (u if 2 * u <= M else u - M), (v if 2 * v <= N else v - N)
            in_half = (su > 0 and 2 * su < M) or (2 * su in (0, M) and sv > 0 and 2 * sv < N)
            radius = math.sqrt(((2 * su / M) ** 2 + (2 * sv / N) ** 2) / 2)
            if in_half:
                weights[u * N + v] = math.exp(-(((radius**2 - center**2) / (radius * bandwidth)) ** 2))
    return weights


def test_a_single_draw_follows_the_band_weight(path):
    M, N, center, bandwidth, draws = 8, 9, 0.4, 0.3, 2500
    weights = known_weights(M, N, center, bandwidth)
    assert (weights > 0).sum() == count_positions(M, N)
    indices = drawn_indices(1, M, N, draws, center=center, bandwidth=bandwidth).flatten()
    observed = torch.bincount(indices, minlength=M * N).double()
    expected = draws * weights / weights.sum()
    assert observed[expected == 0].sum() == 0
    common = expected > 5
    rest = (observed[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum().clamp(min=1)
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum() + rest
    freedom = int(common.sum())
    assert freedom > 15
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_drawing_without_replacement_has_the_inclusion_rates_of_successive_sampling(path):
    M, N, center, bandwidth, draws, count = 8, 9, 0.5, 0.25, 2000, 8
    weights = known_weights(M, N, center, bandwidth)
    indices = drawn_indices(count, M, N, draws, center=center, bandwidth=bandwidth)
    observed = torch.bincount(indices.flatten(), minlength=M * N).double() / draws
    generator = torch.Generator().manual_seed(0)
    reference_draws = 40_000
    reference = torch.multinomial(weights.expand(reference_draws, -1), count, generator=generator)
    expected = torch.bincount(reference.flatten(), minlength=M * N).double() / reference_draws
    common = (expected > 0.005) & (expected < 0.995)
    variance = expected * (1 - expected) * (1 / draws + 1 / reference_draws)
    z_square = ((observed - expected)[common] ** 2 / variance[common]).sum()
    freedom = int(common.sum())
    assert freedom > 15
    assert z_square < freedom + 5 * math.sqrt(2 * freedom)
    assert (observed - expected).abs().max() < 0.06


def test_both_paths_have_the_same_band_statistics(monkeypatch):
    M, N, count, draws = 48, 40, 20, 150
    means, spreads = [], []
    for limit in PATHS.values():
        monkeypatch.setattr(module, "_ENUMERATION_LIMIT", limit)
        indices = drawn_indices(count, M, N, draws, center=0.3, bandwidth=0.12)
        u, v = signed_frequency(indices // N, M), signed_frequency(indices % N, N)
        radius = normalized_radius(torch.stack([u, v], -1), M, N)
        means.append(radius.mean().item())
        spreads.append(radius.std().item())
    error = spreads[0] * math.sqrt(2 / (count * draws))
    assert abs(means[0] - means[1]) < 5 * error
    assert abs(spreads[0] - spreads[1]) < 5 * error


def test_uniform_draws_cover_the_plane_evenly(path):
    M, N, draws = 6, 5, 2000
    indices = drawn_indices(1, M, N, draws, center=None, bandwidth=0.1, half_plane=False).flatten()
    observed = torch.bincount(indices, minlength=M * N).double()
    positions = count_positions(M, N, half_plane=False)
    expected = draws / positions
    assert observed[0] == 0
    chi_square = ((observed[observed > 0] - expected) ** 2 / expected).sum()
    assert (observed > 0).sum() == positions
    assert chi_square < positions + 5 * math.sqrt(2 * positions)


def positions_of(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("frequencies")}


def adapted(**changes):
    model = Transformer(width=24)
    inject(model, config(**changes))
    return model


def test_deterministic_in_seed_and_name_and_different_otherwise():
    first, again, other_seed = positions_of(adapted()), positions_of(adapted()), positions_of(adapted(seed=1))
    assert len(first) == 4
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other_seed[name]) for name in first)
    drawn = list(first.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_seed_of_a_name_never_changes():
    # A change of these numbers changes every newly made adapter; files keep their positions.
    assert named_generator(0, "layers.0.q_proj").initial_seed() == 219256563268558710
    assert named_generator(0, "layers.1.q_proj").initial_seed() != 219256563268558710
    assert named_generator(1, "layers.0.q_proj").initial_seed() != 219256563268558710


def test_independent_of_the_order_of_modules():
    both, one = positions_of(adapted()), positions_of(adapted(targets=["v_proj"]))
    assert len(one) == 2
    assert all(torch.equal(both[name], one[name]) for name in one)


def test_independent_of_the_global_random_state_which_is_not_touched(path):
    model = Transformer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    inject(model, config())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    other = Transformer()
    inject(other, config())
    state, same = model.state_dict(), other.state_dict()
    assert all(torch.equal(state[key], same[key]) for key in state)


@pytest.mark.parametrize("limit", PATHS.values(), ids=PATHS)
def test_default_device_and_dtype_change_nothing(monkeypatch, limit):
    monkeypatch.setattr(module, "_ENUMERATION_LIMIT", limit)
    settings = config()
    plain = SpectralExperts(24, 16, settings, generator=named_generator(0, "a"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            other = SpectralExperts(24, 16, settings, generator=named_generator(0, "a"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain.frequencies, other.frequencies)
    assert plain.coefficients.dtype == other.coefficients.dtype == torch.float32
    assert torch.equal(plain.coefficients, other.coefficients)


def test_too_many_positions_is_an_error_that_says_how_many_there_are():
    with pytest.raises(ValueError, match=r"asks for 13 frequencies per expert, but a 5 x 5 projection has only 12"):
        draw_frequencies(13, 5, 5, named_generator(0, ""), center=0.5, bandwidth=0.12)
    assert len(draw_frequencies(12, 5, 5, named_generator(0, ""), center=None, bandwidth=0.12)) == 12


@pytest.mark.parametrize("half_plane", [True, False])
@pytest.mark.parametrize(("M", "N"), [(1, 5), (2, 2), (5, 5), (4, 7), (7, 4), (6, 8), (9, 1), (16, 15)])
def test_capacity_is_the_sum_of_the_weights_of_the_positions_that_may_be_drawn(M, N, half_plane):
    total = count_positions(M, N, half_plane=half_plane)
    options = {"bandwidth": 0.12, "half_plane": half_plane}
    if total:
        everything = draw_frequencies(total, M, N, named_generator(0, ""), center=None, **options)
        radius = normalized_radius(everything, M, N)
    for center in (0.0625, 0.5, 0.9375, 1.3):
        for bandwidth in (0.01, 0.12, 1.0, 1e9):
            expected = float(band_weight(radius, center, bandwidth).sum()) if total else 0.0
            assert band_capacity(M, N, center, bandwidth, half_plane) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", [(300, 30), (30, 300), (65, 64), (1, 5), (5, 1)])
@pytest.mark.parametrize("bandwidth", [0.004, 0.12, 2.0])
def test_capacity_counts_all_that_matters_and_stops_when_it_has_enough(shape, bandwidth, monkeypatch):
    monkeypatch.setattr(module, "_POSITIONS_PER_CHUNK", 2**10)  # many chunks of rows
    everything = draw_frequencies(count_positions(*shape), *shape, named_generator(0, ""), center=None, bandwidth=0.1)
    for center in (0.0, 0.01, 0.5, 0.95, 1.1):
        expected = float(band_weight(normalized_radius(everything, *shape), center, bandwidth).sum())
        whole = band_capacity(*shape, center, bandwidth)
        assert whole == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert band_capacity(*shape, center, bandwidth, enough=whole + 1) == whole
        assert whole / 2 <= band_capacity(*shape, center, bandwidth, enough=whole / 2) <= whole


@pytest.mark.parametrize(("center", "bandwidth"), [(0.0625, 0.12), (0.9375, 0.12), (0.5, 1e-6), (1.3, 0.12), (30.0, 0.01)])
def test_capacity_of_a_huge_plane_evaluates_few_of_its_positions(center, bandwidth, monkeypatch):
    evaluated = []
    monkeypatch.setattr(module, "band_weight", lambda *a: evaluated.append(a[0].numel()) or band_weight(*a))
    capacity = band_capacity(32768, 32768, center, bandwidth, enough=100)
    assert sum(evaluated) < 2**22  # of 2^30
    assert capacity < 1e-6 if center > 1 else capacity >= 100


@pytest.mark.parametrize("bandwidth", [0.12, 100.0])
def test_a_single_expert_may_take_every_position(path, bandwidth):
    """There are no other bands whose positions it could take."""
    settings = config(num_experts=1, top_k=1, num_coefficients=2 * 510, bandwidth=bandwidth)
    experts = SpectralExperts(32, 32, settings, generator=named_generator(0, "a"))
    assert len(set(map(tuple, experts.frequencies[0].tolist()))) == 510 == count_positions(32, 32)


def test_weights_below_the_smallest_number_still_say_which_positions_are_nearer():
    center, bandwidth = 0.5, 0.005
    positions = draw_frequencies(510, 32, 32, named_generator(0, ""), center=None, bandwidth=bandwidth)
    radius = normalized_radius(positions, 32, 32)
    assert (band_weight(radius, center, bandwidth) == 0).sum() > 400
    drawn = draw_frequencies(400, 32, 32, named_generator(0, ""), center=center, bandwidth=bandwidth, alone=True)

    def distances(radius):
        return ((radius.square() - center**2) / radius).abs().sort().values

    torch.testing.assert_close(distances(normalized_radius(drawn, 32, 32)), distances(radius)[:400])


def test_draw_may_fill_a_band_to_its_capacity_and_no_further(path):
    capacity = int(band_capacity(16, 16, 0.5, 0.12))
    assert capacity > 5
    assert len(draw_frequencies(capacity, 16, 16, named_generator(0, ""), center=0.5, bandwidth=0.12)) == capacity
    with pytest.raises(ValueError, match=rf"asks for {capacity + 1} .* center 0.5 and bandwidth=0.12 holds only {capacity} in"):
        draw_frequencies(capacity + 1, 16, 16, named_generator(0, ""), center=0.5, bandwidth=0.12)


def test_empty_band_is_an_error_that_names_the_remedies(path):
    with pytest.raises(ValueError, match=r"band of center 30 and bandwidth=0.01 holds only 0 .* widen bandwidth"):
        draw_frequencies(2, 16, 16, named_generator(0, ""), center=30.0, bandwidth=0.01)


def test_band_that_is_too_thin_tells_how_many_it_holds():
    with pytest.raises(ValueError, match=r"holds only \d+ in a 16 x 16 projection"):
        draw_frequencies(120, 16, 16, named_generator(0, ""), center=0.5, bandwidth=0.005)
