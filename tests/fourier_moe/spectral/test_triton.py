"""The Triton kernels, run by Triton's interpreter on the CPU, equal the PyTorch path."""

import os
import subprocess
import sys

import pytest
from support import REPOSITORY
from support.limits import HANGS_AFTER

pytest.importorskip("triton")

PROGRAM = """
import torch
from fourier_moe.spectral import product as spectral
from fourier_moe.spectral import torch_product
from fourier_moe.spectral.kernels import triton_product
from fourier_moe.spectral.kernels import use_triton

torch.manual_seed(0)
torch.set_num_threads(1)
assert use_triton(torch.zeros(1)) and not use_triton(torch.zeros(1, dtype=torch.float64))
shapes = [(1, 7, 5, 1, 2), (5, 8, 6, 2, 3), (17, 33, 16, 3, 7), (40, 64, 70, 4, 40), (3, 2, 9, 2, 5), (16, 96, 31, 2, 33)]
for T, N, M, E, P in shapes:
    K = max(1, E - 1)
    x, gates, coefficients = torch.randn(T, N), torch.rand(T, K), torch.randn(E, P, 2)
    experts = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    if E > 2:  # an expert without a token
        experts = torch.arange(E)[torch.arange(E) != 1].expand(T, K).contiguous()
    if E == 4:  # what fills up an expert of fewer segments than the largest
        experts[:, 2], gates[:, 2] = experts[:, 1], 0
    u = torch.randint(-(M // 2), M // 2 + 1, (E, P))
    v = torch.randint(-(N // 2), N // 2 + 1, (E, P))
    u[0, 0], v[0, 0], u[-1, -1], v[-1, -1] = 0, 0, M // 2, N // 2
    frequencies = torch.stack([u, v], -1).to(torch.int32)
    arguments = (x, gates, experts, coefficients, frequencies)
    y = torch_product.product_forward(*arguments, M, 0.3)
    torch.testing.assert_close(triton_product.product_forward(*arguments, M, 0.3), y, rtol=1e-5, atol=1e-5)
    grad = torch.randn(T, M)
    for needs in [[True] * 3] + ([[False, True, False], [True, False, False], [False, False, True]] if T < 10 else []):
        expected = torch_product.product_backward(grad, *arguments, 0.3, needs)
        actual = triton_product.product_backward(grad, *arguments, 0.3, needs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # The public operator takes this path, also after other positions were loaded into the same tensor.
    leaves = [t.clone().requires_grad_() for t in (x, gates, coefficients)]
    for _ in range(2):
        y = spectral.routed_spectral_product(*leaves[:2], experts, leaves[2], frequencies, M, 0.3)
        torch.testing.assert_close(y, torch_product.product_forward(*arguments, M, 0.3), rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        frequencies.copy_(frequencies.flip(0))
    assert len(triton_product._LISTS) == 1 and frequencies in triton_product._LISTS
    half = spectral.routed_spectral_product(x.bfloat16(), *arguments[1:], M, 0.3)
    assert half.dtype == torch.float32
# No tokens at all: nothing to start a kernel on.
leaves = [torch.zeros(0, N), torch.zeros(0, K), torch.randn(E, P, 2)]
leaves = [leaf.requires_grad_() for leaf in leaves]
y = spectral.routed_spectral_product(*leaves[:2], torch.zeros(0, K, dtype=torch.int64), leaves[2], frequencies, M, 0.3)
assert y.shape == (0, M)
y.sum().backward()
assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)
print("kernels equal")
"""


@pytest.mark.slow
def test_kernels_equal_the_pytorch_path_in_values_and_gradients():
    environment = os.environ | {"TRITON_INTERPRET": "1", "FOURIER_MOE_TRITON": "1", "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=HANGS_AFTER)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "kernels equal" in run.stdout


def test_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    """Triton's compiler needs no GPU, and finds what its interpreter does not: wrong types, and numbers that are 1."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fourier_moe.spectral.kernels import triton_spectral

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    integers = ("positions_ptr", "source_ptr", "column_ptr", "row_ptr")
    blocks = {"WIDTH": 4, "TOKENS": 16, "ROWS": 32, "POSITIONS": 32}
    for kernel in (triton_spectral._accumulate_kernel, triton_spectral._gradient_kernel):
        numbers = [name for name in kernel.arg_names if name not in blocks and not name.endswith("_ptr")]
        for ones in ((), numbers):  # Triton compiles a number that is 1 into the kernel
            constants = blocks | dict.fromkeys(ones, 1)
            types = {
                name: "*i32" if name in integers else "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names
            }
            signature = {name: "constexpr" if name in constants else type for name, type in types.items()}
            values = {(place,): constants[name] for place, name in enumerate(kernel.arg_names) if name in constants}
            assert compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_kernels_are_used_only_when_asked_for(monkeypatch):
    import torch

    from fourier_moe.spectral.kernels import use_triton

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("FOURIER_MOE_TRITON", raising=False)
    assert not use_triton(torch.zeros(1))
    monkeypatch.setenv("FOURIER_MOE_TRITON", "1")
    assert use_triton(torch.zeros(1))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not use_triton(torch.zeros(1))  # no GPU tensor
