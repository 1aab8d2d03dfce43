"""Adapted projections on the meta device and under torch.func: grad, vmap, vmap of grad, jvp."""

import pytest
import torch
from support.routed_cases import ONE_EACH, moved_layer, of_each, tokens
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from fourier_moe import FFTMoEConfig, FourierMoEConfig, LoRAConfig, balance_loss, recording
from fourier_moe.adapter import build_layer

SPECTRAL = FourierMoEConfig(targets=["p"], num_coefficients=16, num_experts=4, bandwidth=0.5)
VMAPPED = [config for config in ONE_EACH if not isinstance(config, FFTMoEConfig)]


def layer_and_parameters(config):
    """In float64, all that is trained away from its start."""
    layer, _ = moved_layer(config, 8, 8)
    return layer, {name: parameter.detach() for name, parameter in layer.named_parameters()}


def loss(layer, parameters, x):
    return functional_call(layer, parameters, (x,)).square().sum()


def gradients(layer, parameters, x):
    """The same by torch.autograd."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    found = torch.autograd.grad(loss(layer, leaves, x), list(leaves.values()))
    return dict(zip(parameters, found, strict=True))


def same(first, second):
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("config", [SPECTRAL, LoRAConfig(targets=["p"]), *VMAPPED], ids=lambda c: type(c).__name__)
def test_meta_device_gives_shapes_through_forward_balance_loss_and_backward(config):
    layer = build_layer(torch.nn.Linear(8, 6, device="meta"), config, "p")
    x = torch.zeros(2, 3, 8, device="meta", requires_grad=True)
    with recording(layer):
        y = layer(x)
        loss = y.sum() + balance_loss(layer).to("meta")
    loss.backward()
    assert y.is_meta
    assert y.shape == (2, 3, 6)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("config", [SPECTRAL, *ONE_EACH], ids=lambda c: type(c).__name__)
def test_grad_equals_autograd(config):
    layer, parameters = layer_and_parameters(config)
    x = tokens(5, 3, 8)
    same(grad(lambda p: loss(layer, p, x))(parameters), gradients(layer, parameters, x))


@pytest.mark.parametrize("config", [SPECTRAL, *VMAPPED], ids=lambda c: type(c).__name__)
def test_vmap_equals_a_loop_and_gives_the_gradients_of_each_example(config):
    layer, parameters = layer_and_parameters(config)
    x = tokens(4, 3, 8)
    same(vmap(layer)(x), torch.stack([layer(example) for example in x]))
    same(vmap(layer, in_dims=1, out_dims=2)(x), torch.stack([layer(x[:, i]) for i in range(3)], 2))
    each = vmap(grad(lambda p, example: loss(layer, p, example)), in_dims=(None, 0))(parameters, x)
    expected = [gradients(layer, parameters, example) for example in x]
    same(each, {name: torch.stack([one[name] for one in expected]) for name in parameters})


@pytest.mark.parametrize("config", [SPECTRAL, *ONE_EACH], ids=lambda c: type(c).__name__)
def test_jvp_is_the_directional_derivative_in_input_and_parameters(config):
    layer, parameters = layer_and_parameters(config)
    x, step = tokens(5, 3, 8), tokens(5, 3, 8, seed=1)
    steps = {name: tokens(*tensor.shape, seed=2) for name, tensor in parameters.items()}

    def output(size):
        moved = {name: tensor + size * steps[name] for name, tensor in parameters.items()}
        return functional_call(layer, moved, (x + size * step,))

    value, change = jvp(lambda p, x: functional_call(layer, p, (x,)), (parameters, x), (steps, step))
    same(value, layer(x))
    numeric = (output(1e-6) - output(-1e-6)) / 2e-6
    assert numeric.abs().max() > 0.1
    torch.testing.assert_close(change, numeric, rtol=1e-5, atol=1e-6)


def test_forward_and_reverse_jacobians_agree_and_second_derivatives_are_refused():
    layer, _ = layer_and_parameters(SPECTRAL)
    x = tokens(8)
    same(jacfwd(layer)(x), jacrev(layer)(x))
    for second in (hessian, lambda function: jacrev(jacrev(function))):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"first derivatives only|implement the jvp function"):
            second(lambda x: layer(x).square().sum())(x)


@of_each([config for config in ONE_EACH if isinstance(config, FFTMoEConfig)])
def test_fft_moe_passes_other_errors_on(config, monkeypatch):
    """A GPU reports many of its errors where values are read."""

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    layer, _ = layer_and_parameters(config)
    monkeypatch.setattr(torch.Tensor, "bincount", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(tokens(3, 8))


@of_each([config for config in ONE_EACH if isinstance(config, FFTMoEConfig)])
def test_fft_moe_says_why_it_needs_values(config):
    layer, _ = layer_and_parameters(config)
    for call in (lambda: vmap(layer)(tokens(4, 3, 8)), lambda: layer.to("meta")(torch.zeros(3, 8, device="meta"))):
        with pytest.raises(NotImplementedError, match=r"no values to read on the meta device and under torch.func.vmap"):
            call()
