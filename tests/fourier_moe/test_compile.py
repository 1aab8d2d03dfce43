"""torch.compile takes an adapted model whole: no graph break, the same values and gradients."""

import pytest
import torch
from torch import nn

from fourier_moe import FourierMoEConfig, adapters, inject
from fourier_moe.spectral import routed_spectral_product


def adapted(scope: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.Linear(32, 15))
    inject(
        model,
        FourierMoEConfig(
            targets=["0", "2", "3"], num_coefficients=16, num_experts=4, bandwidth=0.5, init_std=1.0, router_scope=scope
        ),
    )
    return model


@pytest.mark.parametrize(("backend", "scope"), [("eager", "projection"), ("aot_eager", "projection"), ("aot_eager", "block")])
def test_adapted_model_compiles_into_one_graph_with_the_same_gradients(backend, scope):
    model, x = adapted(scope), torch.randn(32, 7).T  # not contiguous
    expected = model(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for layer in adapters(model).values() for g in layer.parameter_groups().values() for p in g]
    model.zero_grad()
    y = torch.compile(model, fullgraph=True, backend=backend)(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    compiled = [p.grad for layer in adapters(model).values() for g in layer.parameter_groups().values() for p in g]
    torch.testing.assert_close(compiled, gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


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
