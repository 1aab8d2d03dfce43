"""torch.compile takes an adapted model whole: no graph break, the same values and gradients."""

import shutil

import pytest
import torch
from support.models import randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

from fourier_moe import FourierMoEConfig, adapters, inject
from fourier_moe.spectral.product import routed_spectral_product

NEEDS_COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")


def adapted(**changes) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.Linear(32, 15))
    settings = {"targets": ["0", "2", "3"], "num_coefficients": 16, "num_experts": 4, "bandwidth": 0.5} | changes
    inject(model, FourierMoEConfig(**settings))
    return randomize(model, 0.5)


def outputs_and_gradients(function, model, x):
    """Outputs, and gradients of the input and of all that is trained."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = function(x)
    y.float().square().sum().backward()
    trained = [p.grad.clone() for layer in adapters(model).values() for g in layer.parameter_groups().values() for p in g]
    assert all(gradient.abs().sum() > 0 for gradient in trained)
    return [y.detach(), x.grad, *trained]


@pytest.mark.parametrize(
    ("backend", "scope"),
    [
        ("eager", "projection"),
        ("aot_eager", "projection"),
        ("aot_eager", "block"),
        pytest.param("inductor", "projection", marks=NEEDS_COMPILER),
    ],
)
def test_adapted_model_compiles_into_one_graph_with_the_same_gradients(backend, scope):
    changes = {"densities": [1, 3, 2, 2], "shared_coefficients": 6} if scope == "block" else {}
    changes |= {"targets": ["3"]} if backend == "inductor" else {}  # each projection takes the C++ compiler ten seconds
    model, x = adapted(router_scope=scope, **changes), torch.randn(32, 7).T  # not contiguous
    expected = outputs_and_gradients(model, model, x)
    compiled = outputs_and_gradients(torch.compile(model, fullgraph=True, backend=backend), model, x)
    torch.testing.assert_close(compiled, expected)


def test_half_precision_model_compiles_under_autocast():
    model, x = adapted(top_k=4), torch.randn(7, 32).bfloat16()  # all experts: no rounding sends a token elsewhere
    for layer in adapters(model).values():
        layer.base.bfloat16()

    def run(function):
        def forward(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(x)

        return outputs_and_gradients(forward, model, x)

    expected, compiled = run(model), run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert compiled[0].dtype == torch.bfloat16
    for mine, theirs in zip(compiled, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() < 2e-2 * theirs.norm()


def test_compiled_model_takes_other_batch_sizes_checkpointing_and_evaluation():
    model = adapted()

    def run(x):
        return checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for length in (7, 12):
        x = torch.randn(length, 32)
        torch.testing.assert_close(outputs_and_gradients(compiled, model, x), outputs_and_gradients(model, model, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (True, False, False)])
def test_operator_passes_torchs_own_checks(needs):
    frequencies = torch.tensor([[[1, 2], [2, -1]], [[0, 1], [-1, 3]]], dtype=torch.int32)
    tensors = [torch.randn(5, 7), torch.rand(5, 1), torch.randn(2, 2, 2)]
    tensors[0] = torch.randn(7, 5).T  # not contiguous
    x, gates, coefficients = (tensor.double().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True))
    arguments = (x, gates, torch.tensor([[0], [1], [1], [0], [1]]), coefficients, frequencies, 6, 0.5)
    assert torch.library.opcheck(torch.ops.fourier_moe.routed_spectral_product, arguments)
    assert routed_spectral_product(*arguments).shape == (5, 6)
    detached = [argument.detach() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    backward = (torch.randn(6, 5).double().T, *detached[:5], 0.5, list(needs))
    assert torch.library.opcheck(torch.ops.fourier_moe.routed_spectral_product_backward, backward)
