"""Exactness on the GPU: both paths of the product against the dense definition in float64, and what torch does with them.

Shape legend: T tokens, N in_features, M out_features, E experts, K active experts per token, P positions per expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.record import Record, relative_error, unequal
from benchmarks.machine import environment
from benchmarks.methods import product_paths
from fourier_moe import FourierMoEConfig, FourierMoELinear
from fourier_moe.routing.record import dense_gates
from fourier_moe.spectral.dense import dense_delta_weight
from fourier_moe.spectral.kernels import OPT_IN
from fourier_moe.spectral.product import routed_spectral_product

_LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}
_ROUNDED = 5e-3  # a gradient in bfloat16
_SCALE = 0.3


class Shape(NamedTuple):
    """One projection, its experts and its tokens."""

    T: int
    N: int
    M: int
    E: int
    K: int
    P: int


SMALL = [
    Shape(5, 8, 6, 2, 1, 3),
    Shape(17, 33, 16, 3, 2, 7),  # odd, and an expert without a token
    Shape(40, 64, 70, 4, 3, 40),
    Shape(3, 2, 9, 2, 2, 5),
    Shape(1, 96, 31, 4, 2, 33),  # one token
    Shape(0, 12, 10, 2, 1, 4),  # none
]
LARGE = [
    Shape(1024, 1024, 1024, 8, 2, 63),  # RoBERTa-large
    Shape(1600, 768, 768, 8, 2, 188),  # CLIP ViT-B/32
    Shape(1, 4096, 4096, 8, 4, 512),  # LLaMA-2-7B, a decoding step
    Shape(1000, 4096, 11008, 8, 4, 512),
    Shape(1000, 11008, 4096, 8, 4, 512),
    Shape(257, 1021, 2039, 8, 3, 100),  # primes
]
BEYOND_32_BITS = Shape(262_272, 8192, 8192, 2, 1, 64)  # one half spectrum has more than 2^31 numbers


def measure(device: torch.device, tiny: bool, record: Record) -> None:
    """Fill the record; see benchmarks/README.md."""
    paths = product_paths(device.type)
    for shape in SMALL if tiny else SMALL + LARGE:
        for path, switch in paths.items():
            with environment({OPT_IN: switch}):
                for dtype in (torch.float32, torch.bfloat16, torch.float64):
                    name = f"{path} {str(dtype).removeprefix('torch.')} {tuple(shape)}"
                    if path == "PyTorch" or dtype != torch.float64:
                        with record.attempt(name):
                            _check_product(name, shape, dtype, device, record)
    layer = _layer(device, tiny)
    checks = [_check_autocast, _check_repeated, _check_deterministic, _check_compiled]
    if device.type == "cuda":  # last what may leave CUDA in a bad state
        checks += [_check_large_index, _check_capture]
    for check in checks:
        for path, switch in paths.items():
            with environment({OPT_IN: switch}), record.attempt(f"{path} {check.__name__.removeprefix('_check_')}"):
                check(path, layer, record)


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw x (not contiguous), gates, experts (the second is left out where it can be), coefficients, int32 frequencies."""
    T, N, M, E, K, P = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(N, T, generator=generator).to(dtype).T
    gates = torch.rand(T, K, generator=generator)
    allowed = torch.tensor([e for e in range(E) if e != 1 or E == K])
    experts = allowed[torch.rand(T, len(allowed), generator=generator).argsort(1)[:, :K]]
    coefficients = torch.randn(E, P, 2, generator=generator)
    u = torch.randint(-(M // 2), M // 2 + 1, (E, P), generator=generator)
    v = torch.randint(-(N // 2), N // 2 + 1, (E, P), generator=generator)
    u[0, 0], v[0, 0], u[-1, -1], v[-1, -1] = 0, 0, M // 2, N // 2
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = x, gates.to(wide), experts, coefficients.to(wide), torch.stack([u, v], -1).to(torch.int32)
    x, gates, experts, coefficients, frequencies = (tensor.to(device) for tensor in tensors)
    return x, gates, experts, coefficients, frequencies


def dense_product(
    x_TN: Tensor, gates_TK: Tensor, experts_TK: Tensor, coefficients_EPC: Tensor, frequencies_EPC: Tensor, M: int, scale: float
) -> Tensor:
    """sum_e gates_e dW_e x with every dW_e built as the paper defines it."""
    gates_TE = dense_gates(gates_TK, experts_TK, len(coefficients_EPC))
    N = x_TN.shape[1]
    total = x_TN.new_zeros(len(x_TN), M)
    for e, (c, f) in enumerate(zip(coefficients_EPC, frequencies_EPC, strict=True)):
        delta_MN = dense_delta_weight(c, f, M, N, scaling=scale * M * N / 2)
        total = total + gates_TE[:, e : e + 1] * (x_TN @ delta_MN.T)
    return total


def _check_product(name: str, shape: Shape, dtype: torch.dtype, device: torch.device, record: Record) -> None:
    x, gates, experts, coefficients, frequencies = _inputs(shape, dtype, device)
    cotangent = torch.randn(shape.M, shape.T, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device).T

    def values(product: Callable[..., Tensor], convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [convert(t).detach().requires_grad_() for t in (x, gates, coefficients)]
        y = product(leaves[0], leaves[1], experts, leaves[2], frequencies, shape.M, _SCALE)
        return [y, *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]

    actual = values(routed_spectral_product, lambda t: t)
    expected = values(dense_product, Tensor.double)
    for part, mine, reference in zip(("y", "dx", "dgates", "dcoefficients"), actual, expected, strict=True):
        limit = _ROUNDED if mine.dtype == torch.bfloat16 else _LIMITS[dtype]
        record.check(f"{name} {part}", relative_error(mine, reference), limit)


def _layer(device: torch.device, tiny: bool) -> FourierMoELinear:
    torch.manual_seed(0)
    N, M = (32, 48) if tiny else (1024, 4096)
    config = FourierMoEConfig(targets=["projection"], num_coefficients=64 if tiny else 4096, num_experts=8, top_k=2, seed=0)
    layer = FourierMoELinear(nn.Linear(N, M).requires_grad_(False), config, "projection")
    nn.init.normal_(layer.experts.coefficients, std=(N * M) ** 0.5 / 8)
    return layer.to(device)


def _input(layer: FourierMoELinear) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(7, layer.in_features // 16, layer.in_features, device=layer.experts.coefficients.device)


def _step(layer: FourierMoELinear, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Return the output, and the gradients of its squared sum."""
    assert layer.router is not None
    y = (layer if forward is None else forward)(x.requires_grad_())
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, layer.experts.coefficients, layer.router.weight])]


def _compare(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor], record: Record) -> None:
    for part, mine, reference in zip(("y", "dx", "dcoefficients", "drouter"), actual, expected, strict=True):
        record.check(f"{name} {part}", relative_error(mine, reference), 1e-4)


def _check_autocast(path: str, layer: FourierMoELinear, record: Record) -> None:
    """Compare the update in bfloat16 autocast with the dense one for the same routing."""
    x = _input(layer).bfloat16()
    assert layer.router is not None
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        routing = layer.router(x)
        update, y = layer.experts(x, routing), layer(x)
    experts = layer.experts
    expected = dense_product(
        x.flatten(0, 1).double(),
        routing.gates.flatten(0, 1).double(),
        routing.experts.flatten(0, 1),
        experts.coefficients.detach().double(),
        experts.frequencies,
        layer.out_features,
        2 * experts.scaling / (layer.out_features * layer.in_features),
    ).view_as(update)
    record.check(f"{path} update under bfloat16 autocast", relative_error(update, expected), 1e-5)
    assert isinstance(layer.base, nn.Linear)
    whole = expected + nn.functional.linear(x.double(), layer.base.weight.double(), layer.base.bias.double())
    record.check(f"{path} projection under bfloat16 autocast", relative_error(y, whole), 1e-2, f"in {y.dtype}")


def _check_repeated(path: str, layer: FourierMoELinear, record: Record) -> None:
    x = _input(layer)
    different = sum(unequal(_step(layer, x), _step(layer, x)) for _ in range(3))
    record.check(f"{path} numbers that differ between equal steps", different, math.inf, "for information")


def _check_deterministic(path: str, layer: FourierMoELinear, record: Record) -> None:
    x = _input(layer)
    torch.use_deterministic_algorithms(True)
    try:
        different = sum(unequal(_step(layer, x), _step(layer, x)) for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)
    record.check(f"{path} the same under use_deterministic_algorithms", different)


def _check_compiled(path: str, layer: FourierMoELinear, record: Record) -> None:
    x = _input(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if x.is_cuda else "eager")
    _compare(f"{path} torch.compile", _step(layer, x, compiled), _step(layer, x), record)


def _check_capture(path: str, layer: FourierMoELinear, record: Record) -> None:
    """Capture forward and backward in a CUDA graph, and replay it on another input and on the first one."""
    x = _input(layer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(layer, x)
    original = x.detach().clone()
    for name, content in (("another input", original.flip(-1)), ("the first input", original)):
        with torch.no_grad():
            x.copy_(content)
        graph.replay()
        _compare(f"{path} CUDA graph, {name}", [tensor.clone() for tensor in captured], _step(layer, content.clone()), record)


def _check_large_index(path: str, layer: FourierMoELinear, record: Record) -> None:
    """Compare the last tokens of a very large batch with the same tokens alone."""
    T, N, M, E, _, _ = BEYOND_32_BITS
    device = layer.experts.coefficients.device
    _, _, _, coefficients, frequencies = _inputs(BEYOND_32_BITS._replace(T=1), torch.float32, device)
    x = torch.randn(T, N, device=device)
    gates, experts = torch.rand(T, 1, device=device), torch.randint(E, (T, 1), device=device)
    tail = slice(T - 64, T)
    y = routed_spectral_product(x, gates, experts, coefficients, frequencies, M, _SCALE)[tail].clone()
    alone = routed_spectral_product(x[tail], gates[tail], experts[tail], coefficients, frequencies, M, _SCALE)
    record.check(f"{path} more than 2^31 numbers {tuple(BEYOND_32_BITS)}", relative_error(y, alone), 1e-5)
