"""One expert for all tokens, through its update as a matrix: the same product, chosen where it costs less."""

import pytest
import torch
from support import reference as naive
from torch import Tensor

from fourier_moe.spectral import matrix_product, torch_product
from fourier_moe.spectral.dense import dense_delta_weight
from fourier_moe.spectral.product import _path, routed_spectral_product

SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 5), (5, 1), (3, 4), (4, 3), (5, 5), (8, 7), (8, 8), (9, 16), (33, 16), (2, 33)]
T, P = 6, 12


@pytest.fixture
def by_matrix(monkeypatch):
    """The operator takes this path whatever the sizes."""
    monkeypatch.setattr(matrix_product, "cheaper", lambda *_: True)
    monkeypatch.setattr(torch_product, "product_forward", lambda *_: pytest.fail("the other path"))
    monkeypatch.setattr(torch_product, "product_backward", lambda *_: pytest.fail("the other path"))


def arguments(M: int, N: int, tokens: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, gates, experts, coefficients and frequencies: DC, Nyquist, equal positions, conjugate ones and random ones."""
    generator = torch.Generator().manual_seed(100 * M + N)
    x, gates, coefficients = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((tokens, N), (tokens, 1), (1, P, 2))
    )
    u = torch.randint(-(M // 2), M // 2 + 1, (P,), generator=generator)
    v = torch.randint(-(N // 2), N // 2 + 1, (P,), generator=generator)
    u[:6] = torch.tensor([0, M // 2, -(M // 2), 0, -(M // 2), M // 2])
    v[:6] = torch.tensor([0, N // 2, N // 2, -(N // 2), 0, -(N // 2)])
    u[6], v[6] = u[7], v[7]
    u[8], v[8] = -u[9], -v[9]
    return (
        x,
        gates,
        torch.zeros(tokens, 1, dtype=torch.int64),
        coefficients,
        torch.stack([u, v], -1).to(torch.int32).unsqueeze(0),
    )


@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_equals_the_explicit_sum_in_values_and_all_gradients(by_matrix, M, N):
    x, gates, experts, coefficients, frequencies = arguments(M, N)
    y = routed_spectral_product(x, gates, experts, coefficients, frequencies, M, 0.7)
    expected = naive.routed_product(x, gates, coefficients, frequencies, M, 0.7)
    naive.assert_relative(y, expected, 1e-10)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    leaves = (x, gates, coefficients)
    for mine, theirs in zip(*(torch.autograd.grad((z * cotangent).sum(), leaves) for z in (y, expected)), strict=True):
        naive.assert_relative(mine, theirs, 1e-10)


@pytest.mark.parametrize("hermitian", [True, False])
@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_the_matrix_is_the_dense_definition(M, N, hermitian):
    *_, coefficients, frequencies = arguments(M, N)
    mine = matrix_product.update_matrix(coefficients[0], frequencies[0], M, N, (1 + hermitian) * 3.0 / (M * N))
    dense = dense_delta_weight(coefficients[0], frequencies[0], M, N, scaling=3.0, hermitian=hermitian)
    naive.assert_relative(mine, dense, 1e-10)


@pytest.mark.parametrize(("M", "N"), [(5, 6), (6, 5), (4, 4), (1, 3)])
def test_gradcheck(by_matrix, M, N):
    x, gates, experts, coefficients, frequencies = arguments(M, N, tokens=2)
    torch.autograd.gradcheck(
        lambda x, gates, coefficients: routed_spectral_product(x, gates, experts, coefficients, frequencies, M, 1.7),
        (x, gates, coefficients),
    )


def test_an_expert_named_twice_counts_with_the_sum_of_its_gates(by_matrix):
    x, gates, experts, coefficients, frequencies = arguments(5, 6)
    both = torch.cat([torch.zeros_like(gates), gates.detach()], 1).requires_grad_()
    twice = routed_spectral_product(x, both, experts.expand(-1, 2), coefficients, frequencies, 5, 1.0)
    once = routed_spectral_product(x, gates, experts, coefficients, frequencies, 5, 1.0)
    assert torch.equal(twice, once)
    (expected,) = torch.autograd.grad(once.square().sum(), gates)
    (mine,) = torch.autograd.grad(twice.square().sum(), both)
    assert torch.equal(mine, expected.expand(-1, 2))


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_the_operators_keep_their_contract_with_torch(by_matrix, tokens):
    x, gates, experts, coefficients, frequencies = arguments(5, 6, tokens)
    operators = torch.ops.fourier_moe
    inputs = (x.detach().T.contiguous().T.requires_grad_(), gates, experts, coefficients, frequencies)
    assert torch.library.opcheck(operators.routed_spectral_product, (*inputs, 5, 1.0))
    gradient = torch.randn(5, tokens, dtype=torch.float64).T
    backward = (gradient, *(t.detach() for t in inputs), 1.0, [True, True, True])
    assert torch.library.opcheck(operators.routed_spectral_product_backward, backward)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_that_are_not_needed_are_not_there(by_matrix, wanted):
    x, gates, experts, coefficients, frequencies = arguments(5, 6)
    every = routed_spectral_product(x, gates, experts, coefficients, frequencies, 5, 1.0)
    expected = torch.autograd.grad(every.square().sum(), (x, gates, coefficients))
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, gates, coefficients))]
    routed_spectral_product(*leaves[:2], experts, leaves[2], frequencies, 5, 1.0).square().sum().backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[i])


def test_half_precision_and_autocast_do_not_lower_the_precision(by_matrix):
    x, gates, experts, coefficients, frequencies = (
        t.detach().float() if t.is_floating_point() else t for t in arguments(16, 33)
    )
    x16, coefficients = x.bfloat16().requires_grad_(), coefficients.requires_grad_()
    x32 = x16.detach().float().requires_grad_()
    expected = routed_spectral_product(x32, gates, experts, coefficients, frequencies, 16, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed_spectral_product(x16, gates, experts, coefficients, frequencies, 16, 1.0)
        mine = torch.autograd.grad(y.square().sum(), (x16, coefficients))
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    theirs = torch.autograd.grad(expected.square().sum(), (x32, coefficients))
    assert mine[0].dtype == torch.bfloat16
    assert torch.equal(mine[0], theirs[0].bfloat16())
    assert torch.equal(mine[1], theirs[1])


def test_float32_is_accurate_to_rounding():
    x, gates, experts, coefficients, frequencies = (t.detach() for t in arguments(33, 16))
    y = matrix_product.product_forward(x.float(), gates.float(), experts, coefficients.float(), frequencies, 33, 1.0)
    naive.assert_relative(y, naive.routed_product(x, gates, coefficients, frequencies, 33, 1.0), 2e-6)


@pytest.mark.parametrize(
    ("tokens", "size", "experts", "pairs", "device", "expected"),
    [
        (800, 384, 1, 2048, "cpu", matrix_product),  # measured to be 4 times as fast
        (800, 384, 1, 128, "cpu", torch_product),  # few coefficients
        (20, 384, 1, 2048, "cpu", torch_product),  # few tokens: the matrix is not worth building
        (0, 384, 1, 2048, "cpu", torch_product),
        (256, 4096, 1, 4096, "cpu", torch_product),  # a large weight
        (800, 384, 2, 2048, "cpu", torch_product),  # tokens are routed
        (800, 384, 1, 2048, "meta", torch_product),  # not timed on anything but a CPU
    ],
)
def test_the_path_with_the_lower_cost_is_taken(tokens, size, experts, pairs, device, expected):
    x, coefficients = torch.empty(tokens, size, device=device), torch.empty(experts, pairs, 2, device=device)
    assert _path(x, coefficients, size) is expected
