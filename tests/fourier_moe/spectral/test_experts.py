"""SpectralExperts: forward against the dense updates, ablations, norms and ranks."""

import math

import pytest
import torch
from support import reference as naive
from support.models import config, randomize

from fourier_moe import Routing, SpectralExperts
from fourier_moe.spectral.frequencies import named_generator, normalized_radius

ABLATIONS = [
    {},
    {"coefficients": "real"},
    {"coefficients": "imaginary"},
    {"frequency_bias": False},
    {"conjugate_symmetry": False},
    {"conjugate_symmetry": False, "coefficients": "imaginary", "frequency_bias": False},
    {"scaling": 16.0, "band_layout": "stack", "bandwidth": 0.2},
]
UNEQUAL = [  # in segments of 4, 2, 2, 1 and 3 pairs
    {"shared_coefficients": 8},
    {"shared_coefficients": 20, "coefficients": "imaginary"},
    {"densities": [4, 2, 1, 1]},
    {"densities": [1, 3, 2, 2], "bandwidth": [0.3, 0.2, 0.4, 0.2], "shared_coefficients": 14, "conjugate_symmetry": False},
    {"densities": [2, 4, 1, 1], "shared_coefficients": 6, "num_coefficients": 48, "scaling": 16.0, "permute": True},
]


def experts(in_features=24, out_features=17, **changes):
    layer = SpectralExperts(in_features, out_features, config(**changes), generator=named_generator(0, "experts"))
    assert not layer.coefficients.any()  # the adapted model starts as the pretrained one
    return randomize(layer).double()


def identifier(changes):
    return "-".join(f"{key}={value}" for key, value in changes.items()) or "default"


@pytest.mark.parametrize("changes", [*ABLATIONS, {"permute": True}, *UNEQUAL], ids=identifier)
def test_forward_is_the_gated_sum_of_the_dense_updates(changes):
    layer = experts(**changes)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=generator).requires_grad_()
    gates = torch.rand(2, 5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    y = layer(x, Routing.to_all(gates))
    assert y.shape == (2, 5, 17)
    updates = torch.stack([layer.delta_weight(e) for e in range(len(layer.segments))])
    shared = torch.ones(2, 5, len(updates) - 4, dtype=torch.float64)
    dense = torch.einsum("...e,emn,...n->...m", torch.cat([gates, shared], -1), updates, x)
    naive.assert_relative(y, dense, 1e-10)
    leaves = (x, gates, layer.coefficients)
    for mine, theirs in zip(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(dense.square().sum(), leaves), strict=True
    ):
        naive.assert_relative(mine, theirs, 1e-10)


@pytest.mark.parametrize("changes", ABLATIONS, ids=identifier)
def test_update_is_the_explicit_sum(changes):
    layer = experts(**changes)
    pair = 2 if layer.hermitian else 1
    for e in range(4):
        c = torch.zeros(4, 2, dtype=torch.float64)
        columns = {"complex": [0, 1], "real": [0], "imaginary": [1]}[layer.part]
        c[:, columns] = layer.coefficients[e].detach()
        explicit = naive.cosine_sum(c, layer.frequencies[e], 17, 24, pair * layer.scaling / (17 * 24))
        naive.assert_relative(layer.delta_weight(e), explicit, 1e-10)


def test_spectrum_is_hermitian_and_its_inverse_real():
    layer = experts()
    for e in range(4):
        spectrum = layer.spectrum(e).detach()
        index_u, index_v = -torch.arange(17) % 17, -torch.arange(24) % 24
        assert torch.equal(spectrum[index_u][:, index_v], spectrum.conj())
        inverse = torch.fft.ifft2(spectrum)
        assert inverse.imag.abs().max() < 1e-12
        assert inverse.real.abs().max() > 1e-3
        naive.assert_relative(layer.delta_weight(e).detach(), layer.scaling * inverse.real, 1e-12)


@pytest.mark.parametrize("changes", [{}, {"coefficients": "real"}, {"frequency_bias": False}, {"conjugate_symmetry": False}])
def test_rank_is_at_most_twice_the_pairs_and_equal_generically(changes):
    layer = experts(48, 40, **changes)
    for e in range(4):
        singular = torch.linalg.svdvals(layer.delta_weight(e))
        # Positions that share |u| or |v| span less: the exact generic rank follows from the positions.
        rank = int((singular > 1e-10 * singular[0]).sum())
        rows, columns = layer.frequencies[e].abs().T.tolist()
        assert rank <= 8
        if len(set(rows)) == len(set(columns)) == 4 and 0 not in rows + columns:
            assert rank == 8


def test_generic_rank_is_reached():
    layer = experts(48, 40)
    layer.frequencies.copy_(torch.tensor([[[u + e, 2 * u + e + 3] for u in range(1, 5)] for e in range(4)]))
    for e in range(4):
        singular = torch.linalg.svdvals(layer.delta_weight(e))
        assert int((singular > 1e-10 * singular[0]).sum()) == 8


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (33, 17), (64, 64)])
@pytest.mark.parametrize(
    "changes", [{}, {"coefficients": "real"}, {"coefficients": "imaginary"}, {"frequency_bias": False}, *UNEQUAL[:3]]
)
def test_relative_scaling_makes_the_norm_sqrt_m_times_the_root_mean_square(shape, changes):
    M, N = shape
    layer = experts(N, M, **changes)
    for e in range(len(layer.segments)):
        magnitude = layer.of_expert(e)[0].square().sum(-1).mean().sqrt()
        assert layer.delta_weight(e).norm().item() == pytest.approx(math.sqrt(M) * magnitude.item(), rel=1e-10)


def test_relative_scaling_without_symmetry_has_the_same_norm_where_no_partner_is_drawn_and_on_average():
    layer = experts(48, 32, conjugate_symmetry=False)
    ratios = []
    for e in range(4):
        indices = {(u % 32, v % 48) for u, v in layer.frequencies[e].tolist()}
        alone = all((-u % 32, -v % 48) not in indices for u, v in indices)
        magnitude = layer.coefficients[e].square().sum(-1).mean().sqrt()
        ratio = (layer.delta_weight(e).norm() / (math.sqrt(32) * magnitude)).item()
        if alone:
            assert ratio == pytest.approx(1, rel=1e-10)
            ratios.append(ratio)
    assert ratios

    crowded = experts(8, 8, conjugate_symmetry=False, frequency_bias=False, num_coefficients=4 * 2 * 50)
    norms = [
        (crowded.delta_weight(e).norm() / (math.sqrt(8) * crowded.coefficients[e].square().sum(-1).mean().sqrt())).item()
        for e in range(4)
    ]
    assert sum(norms) / 4 == pytest.approx(1, abs=0.1)


def test_norm_is_that_of_a_typical_weight():
    layer = experts(64, 48)
    with torch.no_grad():
        layer.coefficients.normal_(0, math.sqrt(0.5), generator=torch.Generator().manual_seed(0))
    typical = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) / math.sqrt(64)
    for e in range(4):
        assert layer.delta_weight(e).norm().item() == pytest.approx(typical.norm().item(), rel=0.6)


def test_scaling_is_used_as_given():
    assert experts(scaling=16).scaling == 16.0
    ratio = experts(scaling=32).delta_weight(1) / experts(scaling=16).delta_weight(1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0))


@pytest.mark.parametrize(("part", "scalars"), [("complex", 32), ("real", 16), ("imaginary", 16)])
def test_ablated_part_has_no_parameters_and_same_positions(part, scalars):
    layer = experts(coefficients=part)
    assert layer.coefficients.numel() == scalars
    assert torch.equal(layer.frequencies, experts().frequencies)
    full = layer.complex_coefficients()
    assert full.shape == (4, 4, 2)
    if part != "complex":
        assert full[..., {"real": 1, "imaginary": 0}[part]].abs().max() == 0
        assert full[..., {"real": 0, "imaginary": 1}[part]].abs().min() > 0


def test_permuted_update_has_the_same_entries_elsewhere_by_whole_rows_and_columns():
    layer, plain = experts(permute=True), experts()
    assert torch.equal(layer.frequencies, plain.frequencies)  # and so is all else that is drawn
    assert torch.equal(layer.coefficients, plain.coefficients)
    rows, columns = layer.output_order.tolist(), layer.input_order.tolist()
    assert (sorted(rows), sorted(columns)) == (list(range(17)), list(range(24)))
    for e in range(4):
        permuted, expected = layer.delta_weight(e), plain.delta_weight(e)
        for p in range(17):
            for k in range(24):
                assert permuted[p, columns[k]] == expected[rows[p], k]
        assert torch.equal(layer.spectrum(e), plain.spectrum(e))
        assert (permuted - expected).abs().max() > 0.1 * expected.abs().max()


def test_top_k_of_unequal_experts_is_the_sum_of_the_chosen_ones():
    layer = experts(densities=[4, 2, 1, 1], shared_coefficients=6)
    x, gates = torch.randn(5, 24, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    chosen = torch.tensor([[0, 3], [1, 2], [3, 1], [2, 0], [0, 1]])
    updates = torch.stack([layer.delta_weight(e) for e in range(5)])
    expected = torch.einsum("tk,tkmn,tn->tm", gates, updates[chosen], x) + x @ updates[4].T
    naive.assert_relative(layer(x, Routing(gates, chosen, gates)), expected, 1e-10)


def test_a_shared_expert_leaves_the_others_positions_and_has_its_own_in_the_whole_plane():
    layer, plain = experts(64, 48, shared_coefficients=400, permute=True), experts(64, 48, permute=True)
    for e in range(4):
        assert torch.equal(layer.of_expert(e)[1], plain.of_expert(e)[1])
    assert torch.equal(layer.input_order, plain.input_order)
    shared = layer.of_expert(4)[1]
    assert len(set(map(tuple, shared.tolist()))) == 200
    radius = normalized_radius(shared, 48, 64)
    assert radius.min() < 0.2
    assert radius.max() > 0.8
    assert layer.names == ["expert_0", "expert_1", "expert_2", "expert_3", "shared"]


def test_densities_share_out_the_coefficients():
    layer = experts(num_coefficients=64, densities=[1, 4, 2, 1], coefficients="real", shared_coefficients=10, bandwidth=0.3)
    assert [len(layer.of_expert(e)[1]) for e in range(5)] == [4, 16, 8, 4, 5]
    assert layer.coefficients.numel() == 37
    assert "pairs=[4, 16, 8, 4], shared_pairs=5" in repr(layer)


def test_orders_differ_by_name_and_seed_and_only_the_control_has_any():
    drawn = [
        SpectralExperts(24, 24, config(permute=True), generator=named_generator(seed, name))
        for seed, name in [(0, "a"), (0, "b"), (1, "a")]
    ]
    orders = [order.tolist() for layer in drawn for order in (layer.input_order, layer.output_order)]
    assert len(set(map(tuple, orders))) == 6
    assert list(range(24)) not in orders
    assert set(drawn[0].state_dict()) == {"coefficients", "frequencies", "input_order", "output_order"}


def test_frequencies_are_saved_and_coefficients_are_the_only_parameter():
    layer = experts()
    assert set(layer.state_dict()) == {"coefficients", "frequencies"}
    assert [name for name, _ in layer.named_parameters()] == ["coefficients"]
    assert layer.frequencies.dtype == torch.int32  # .double() leaves it alone


def test_half_precision_coefficients_are_computed_in_float32():
    layer = experts().bfloat16()
    x, gates = torch.randn(3, 24).bfloat16(), torch.rand(3, 4)
    y = layer(x, Routing.to_all(gates))
    assert y.dtype == torch.float32
    assert torch.equal(y, experts().bfloat16().float()(x, Routing.to_all(gates)))
    y.sum().backward()
    assert layer.coefficients.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (1, 24), (2, 3, 4, 24)])
def test_any_leading_shape(shape):
    layer = experts()
    y = layer(torch.ones(shape, dtype=torch.float64), Routing.to_all(torch.ones(*shape[:-1], 4, dtype=torch.float64)))
    assert y.shape == (*shape[:-1], 17)


def test_too_many_positions_is_an_error():
    with pytest.raises(ValueError, match="asks for 125 frequencies per expert, but a 4 x 4 projection has only 6"):
        experts(4, 4, num_coefficients=1000)
    with pytest.raises(ValueError, match=r"shared_coefficients asks for 500 frequencies .* lower shared_coefficients or leave"):
        experts(shared_coefficients=1000)
