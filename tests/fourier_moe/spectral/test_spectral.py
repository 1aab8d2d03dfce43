"""The fast product equals the dense definition and an explicit sum, in values and gradients, and stays small in memory."""

import math

import pytest
import torch
from support import reference as naive
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fourier_moe import Routing
from fourier_moe.spectral import product as spectral
from fourier_moe.spectral import torch_product
from fourier_moe.spectral.dense import dense_delta_weight, dense_spectrum
from fourier_moe.spectral.torch_product import product_backward, product_forward

SHAPES = [
    *((1, 1), (1, 2), (2, 1), (2, 2), (1, 5), (5, 1), (3, 4), (4, 3), (5, 5), (4, 4), (7, 8), (8, 7), (8, 8)),
    *((9, 16), (16, 9), (33, 16), (16, 33), (2, 33), (33, 33), (1, 16), (16, 1)),
]
E, P, T = 3, 9, 5


def routed_spectral_product(x: Tensor, gates: Tensor, *arguments) -> Tensor:
    """The product with gates (T, E) of all experts."""
    return spectral.routed_spectral_product(x, *Routing.to_all(gates)[:2], *arguments)


def hard_frequencies(M: int, N: int, seed: int = 0) -> Tensor:
    """(E, P, 2) with equal u, equal v, equal (u, v) within and between experts, conjugates of each other, DC and Nyquist."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(-(M // 2), M // 2 + 1, (E, P), generator=generator)
    v = torch.randint(-(N // 2), N // 2 + 1, (E, P), generator=generator)
    frequencies = torch.stack([u, v], -1).to(torch.int32)
    half_m, half_n = M // 2, N // 2
    frequencies[0, :6] = torch.tensor(
        [[0, 0], [half_m, half_n], [-half_m, half_n], [0, -half_n], [-half_m, 0], [half_m, -half_n]]
    )
    frequencies[0, 6:9, 0] = -min(1, half_m)  # one row, several columns
    frequencies[1, 0:3, 1] = -min(1, half_n)  # one column, several rows
    frequencies[1, 3] = frequencies[0, 7]  # shared by two experts
    frequencies[1, 4] = frequencies[1, 5]  # twice in one expert
    frequencies[2, 0] = -frequencies[2, 1]  # a position and its conjugate
    return frequencies


def arguments(M: int, N: int, *, tokens: int = T, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, gates, coefficients (all float64, requiring gradients) and frequencies. One gate of each token is 0."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(tokens, N, dtype=torch.float64, generator=generator)
    gates = torch.rand(tokens, E, dtype=torch.float64, generator=generator)
    gates[torch.arange(tokens), torch.randint(E, (tokens,), generator=generator)] = 0
    coefficients = torch.randn(E, P, 2, dtype=torch.float64, generator=generator)
    return (*(t.requires_grad_() for t in (x, gates, coefficients)), hard_frequencies(M, N, seed))


def dense_product(
    x: Tensor, gates: Tensor, coefficients: Tensor, frequencies: Tensor, M: int, alpha: float, hermitian: bool
) -> Tensor:
    updates = [
        dense_delta_weight(coefficients[e], frequencies[e], M, x.shape[1], scaling=alpha, hermitian=hermitian)
        for e in range(len(coefficients))
    ]
    return torch.einsum("te,emn,tn->tm", gates, torch.stack(updates), x)


def compare(fast: Tensor, reference: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    """Values and gradients of both with respect to all inputs, for a random cotangent."""
    naive.assert_relative(fast, reference, tolerance)
    cotangent = torch.randn(fast.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for mine, theirs in zip(
        torch.autograd.grad((fast * cotangent).sum(), inputs, retain_graph=True),
        torch.autograd.grad((reference * cotangent).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        naive.assert_relative(mine, theirs, tolerance)


@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_product_equals_explicit_sum_in_values_and_all_gradients(M, N):
    x, gates, coefficients, frequencies = arguments(M, N, seed=M * 100 + N)
    fast = routed_spectral_product(x, gates, coefficients, frequencies, M, 0.7)
    compare(fast, naive.routed_product(x, gates, coefficients, frequencies, M, 0.7), (x, gates, coefficients))


@pytest.mark.parametrize("hermitian", [True, False])
@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_product_equals_dense_definition_in_values_and_all_gradients(M, N, hermitian):
    x, gates, coefficients, frequencies = arguments(M, N, seed=M + 100 * N)
    alpha = 3.0
    fast = routed_spectral_product(x, gates, coefficients, frequencies, M, (1 + hermitian) * alpha / (M * N))
    dense = dense_product(x, gates, coefficients, frequencies, M, alpha, hermitian)
    compare(fast, dense, (x, gates, coefficients))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("M", "N"), [(7, 8), (8, 7), (33, 16), (1, 16)])
def test_some_experts_per_token_equal_the_dense_definition_in_values_and_all_gradients(M, N, top_k):
    x, gates, coefficients, frequencies = arguments(M, N, tokens=11)
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(E, generator=generator)[:top_k] for _ in range(11)])
    experts[:4] = experts[0]  # some tokens share their experts
    gates = gates.detach()[:, :top_k].clone().requires_grad_()
    fast = spectral.routed_spectral_product(x, gates, experts, coefficients, frequencies, M, 2 * 3.0 / (M * N))
    dense = dense_product(x, Routing(gates, experts, gates).dense(E), coefficients, frequencies, M, 3.0, True)
    compare(fast, dense, (x, gates, coefficients))


@pytest.mark.parametrize(("M", "N"), [(1, 1), (1, 4), (2, 3), (4, 4), (5, 4), (3, 5)])
def test_dense_inverse_equals_the_quadruple_loop(M, N):
    coefficients = torch.randn(P, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(M * N))
    frequencies = hard_frequencies(M, N)[0]
    spectrum = dense_spectrum(coefficients, frequencies, M, N, hermitian=True)
    by_loops = naive.idft2_by_loops(spectrum)
    assert by_loops[..., 1].abs().max() < 1e-12  # a Hermitian spectrum has a real inverse
    update = dense_delta_weight(coefficients, frequencies, M, N, scaling=2.5)
    naive.assert_relative(update, 2.5 * by_loops[..., 0], 1e-11)
    naive.assert_relative(update, naive.cosine_sum(coefficients, frequencies, M, N, 2 * 2.5 / (M * N)), 1e-11)
    free = dense_spectrum(coefficients, frequencies, M, N, hermitian=False)
    naive.assert_relative(
        dense_delta_weight(coefficients, frequencies, M, N, scaling=2.5, hermitian=False),
        2.5 * naive.idft2_by_loops(free)[..., 0],
        1e-11,
    )


def test_spectrum_without_symmetry_holds_single_entries():
    coefficients, frequencies = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1, 2]])
    free = dense_spectrum(coefficients, frequencies, 5, 7, hermitian=False)
    assert free[4, 2] == 1 + 2j
    assert (free != 0).sum() == 1
    symmetric = dense_spectrum(coefficients, frequencies, 5, 7, hermitian=True)
    assert symmetric[4, 2] == 1 + 2j
    assert symmetric[1, 5] == 1 - 2j
    assert (symmetric != 0).sum() == 2


@pytest.mark.parametrize("expert", range(E))
def test_all_tokens_on_one_expert_leaves_the_others_without_gradient(expert):
    x, _, coefficients, frequencies = arguments(8, 9)
    gates = torch.zeros(T, E, dtype=torch.float64)
    gates[:, expert] = 1
    gates.requires_grad_()
    fast = routed_spectral_product(x, gates, coefficients, frequencies, 8, 1.3)
    compare(fast, naive.routed_product(x, gates, coefficients, frequencies, 8, 1.3), (x, gates, coefficients))
    gradient = torch.autograd.grad(fast.square().sum(), coefficients)[0]
    assert gradient[expert].abs().max() > 0
    assert gradient[[e for e in range(E) if e != expert]].abs().max() == 0


@pytest.mark.parametrize("tokens", [0, 1])
def test_empty_batch_and_single_token(tokens):
    x, gates, coefficients, frequencies = arguments(6, 7, tokens=tokens)
    fast = routed_spectral_product(x, gates, coefficients, frequencies, 6, 1.0)
    assert fast.shape == (tokens, 6)
    compare(fast, naive.routed_product(x, gates, coefficients, frequencies, 6, 1.0), (x, gates, coefficients))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_non_contiguous_inputs_and_cotangents(layout):
    M, N = 7, 8
    _, gates, coefficients, frequencies = arguments(M, N)
    generator = torch.Generator().manual_seed(3)
    x = {
        "transposed": torch.randn(N, T, dtype=torch.float64, generator=generator).T,
        "strided": torch.randn(T, 3 * N, dtype=torch.float64, generator=generator)[:, ::3],
        "expanded": torch.randn(1, N, dtype=torch.float64, generator=generator).expand(T, N),
    }[layout].requires_grad_()
    gates = gates.detach().T.contiguous().T.requires_grad_()
    coefficients = coefficients.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    frequencies = frequencies.transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous()
    assert not coefficients.is_contiguous()
    fast = routed_spectral_product(x, gates, coefficients, frequencies, M, 1.0)
    reference = naive.routed_product(x, gates, coefficients, frequencies, M, 1.0)
    compare(fast, reference, (x, gates, coefficients))
    expanded = torch.autograd.grad(fast.sum(), (x, gates, coefficients))  # cotangent with stride 0
    for mine, theirs in zip(expanded, torch.autograd.grad(reference.sum(), (x, gates, coefficients)), strict=True):
        naive.assert_relative(mine, theirs, 1e-10)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_every_subset_of_gradients(wanted):
    *differentiable, frequencies = arguments(5, 6)
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(differentiable)]
    inputs = tuple(leaves[i] for i in wanted)
    fast = routed_spectral_product(*leaves, frequencies, 5, 1.0)
    compare(fast, naive.routed_product(*leaves, frequencies, 5, 1.0), inputs)
    fast = routed_spectral_product(*leaves, frequencies, 5, 1.0)
    fast.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(3)]


def test_arguments_are_not_modified():
    x, gates, coefficients, frequencies = arguments(8, 8)
    before = [t.detach().clone() for t in (x, gates, coefficients, frequencies)]
    cotangent = torch.randn(T, 8, dtype=torch.float64)
    kept = cotangent.clone()
    routed_spectral_product(x, gates, coefficients, frequencies, 8, 1.0).backward(cotangent)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, gates, coefficients, frequencies), strict=True))
    assert torch.equal(cotangent, kept)


@pytest.mark.parametrize(("M", "N"), [(5, 6), (6, 5), (4, 4), (1, 3)])
def test_gradcheck(M, N):
    x, gates, coefficients, frequencies = arguments(M, N, tokens=2)
    torch.autograd.gradcheck(lambda *leaves: routed_spectral_product(*leaves, frequencies, M, 1.7), (x, gates, coefficients))


def test_second_derivatives_are_refused_rather_than_wrong():
    x, gates, coefficients, frequencies = arguments(5, 6)
    y = routed_spectral_product(x, gates, coefficients, frequencies, 5, 1.0)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="routed_spectral_product_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_the_dtype_of_the_coefficients(dtype):
    x, gates, coefficients, frequencies = (t.detach() for t in arguments(16, 33))
    x16, coefficients = x.to(dtype).requires_grad_(), coefficients.float().requires_grad_()
    gates = gates.float().requires_grad_()
    y = routed_spectral_product(x16, gates, coefficients, frequencies, 16, 1.0)
    assert y.dtype == torch.float32
    x32 = x16.detach().float().requires_grad_()
    reference = routed_spectral_product(x32, gates, coefficients, frequencies, 16, 1.0)
    assert torch.equal(y, reference)
    gradients = torch.autograd.grad(y.square().sum(), (x16, gates, coefficients))
    expected = torch.autograd.grad(reference.square().sum(), (x32, gates, coefficients))
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    assert torch.equal(gradients[0], expected[0].to(dtype))
    assert torch.equal(gradients[2], expected[2])


def test_float32_is_accurate_to_rounding():
    x, gates, coefficients, frequencies = (t.detach() for t in arguments(33, 16))
    y = routed_spectral_product(x.float(), gates.float(), coefficients.float(), frequencies, 33, 1.0)
    naive.assert_relative(y, naive.routed_product(x, gates, coefficients, frequencies, 33, 1.0), 2e-6)


def test_autocast_does_not_lower_the_precision_of_the_product():
    x, gates, coefficients, frequencies = (t.detach().float() if t.is_floating_point() else t for t in arguments(16, 9))
    leaves = [t.requires_grad_() for t in (x, gates, coefficients)]
    reference = routed_spectral_product(*leaves, frequencies, 16, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed_spectral_product(*leaves, frequencies, 16, 1.0)
    assert y.dtype == torch.float32
    assert torch.equal(y, reference)
    for mine, theirs in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(reference.sum(), leaves), strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_but_the_arguments_is_saved_for_backward():
    x, gates, coefficients, frequencies = arguments(64, 48)
    routing = Routing.to_all(gates)[:2]
    inputs = (x, *routing, coefficients, frequencies)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = spectral.routed_spectral_product(x, *routing, coefficients, frequencies, 64, 1.0)
    assert len(saved) == 5
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs}
    y.sum().backward()


class _LargestOutput(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_of_the_size_of_the_weight_exists_in_forward_or_backward():
    M = N = 512
    tokens, experts, pairs = 4, 8, 63
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, N, generator=generator, requires_grad=True)
    gates = torch.rand(tokens, experts, generator=generator, requires_grad=True)
    coefficients = torch.randn(experts, pairs, 2, generator=generator, requires_grad=True)
    frequencies = torch.randint(-255, 257, (experts, pairs, 2), generator=generator).to(torch.int32)
    # The operator hides what runs inside it from dispatch modes: look at what it calls.
    tensors = [t.detach() for t in (x, *Routing.to_all(gates)[:2], coefficients, frequencies)]
    with _LargestOutput() as forward:
        y = product_forward(*tensors, M, 1.0)
    with _LargestOutput() as backward:
        product_backward(torch.ones_like(y), *tensors, 1.0, [True, True, True])
    bound = 2 * experts * pairs * tokens  # one complex value per position and token
    assert bound < M * N / 50
    assert forward.operations > 10
    assert backward.operations > 10
    assert forward.largest <= bound
    assert backward.largest <= bound


def test_many_tokens_are_computed_in_parts_with_the_same_result(monkeypatch):
    x, gates, coefficients, frequencies = arguments(16, 9, tokens=23)
    whole = routed_spectral_product(x, gates, coefficients, frequencies, 16, 0.7)
    monkeypatch.setattr(torch_product, "_POSITIONS_PER_CHUNK", 5 * E * P)  # 5 tokens at once
    parts = routed_spectral_product(x, gates, coefficients, frequencies, 16, 0.7)
    compare(parts, whole, (x, gates, coefficients), 1e-13)
    with _LargestOutput() as forward:
        product_forward(x.detach(), *Routing.to_all(gates.detach())[:2], coefficients.detach(), frequencies, 16, 0.7)
    assert forward.largest <= max(5 * E * P * 2, 23 * 16)


@pytest.mark.parametrize(("threads", "tokens_at_once"), [(1, 2), (3, 6), (100, 8)])
def test_parts_grow_with_the_number_of_threads_up_to_a_bound(monkeypatch, threads, tokens_at_once):
    monkeypatch.setattr(torch_product, "_POSITIONS_PER_THREAD", 2 * E * P)
    monkeypatch.setattr(torch_product, "_POSITIONS_PER_CHUNK", 8 * E * P)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    positions = torch_product.Positions.of(hard_frequencies(16, 9), torch.float64)
    parts = torch_product._parts(torch.zeros(23, E, dtype=torch.int64), positions)
    assert parts[0] == slice(0, tokens_at_once)
    assert [token for part in parts for token in range(23)[part]] == list(range(23))


@pytest.mark.parametrize(("M", "N"), [(12, 15), (16, 16), (15, 12)])
def test_rank_is_twice_the_number_of_pairs(M, N):
    coefficients = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequencies = torch.tensor([[1, 2], [2, -3], [4, 5]])
    singular = torch.linalg.svdvals(dense_delta_weight(coefficients, frequencies, M, N, scaling=1.0))
    assert (singular > 1e-10 * singular[0]).sum() == 6  # equal for generic positions

    frequencies = torch.tensor([[1, 2], [1, -3], [1, 5]])  # one row: rank 2, below the bound 6
    singular = torch.linalg.svdvals(dense_delta_weight(coefficients, frequencies, M, N, scaling=1.0))
    assert (singular > 1e-10 * singular[0]).sum() == 2


@pytest.mark.parametrize(("M", "N"), [(8, 9), (16, 5), (7, 7), (8, 8)])
def test_parseval(M, N):
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.tensor([[1, 2], [2, -1], [0, 1], [3, 0]])  # distinct pairs, none self-conjugate
    coefficients = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    update = dense_delta_weight(coefficients, frequencies, M, N, scaling=5.0)
    assert update.norm().item() == pytest.approx(5 * math.sqrt(2 * coefficients.square().sum() / (M * N)), rel=1e-12)
