"""Gates and the load-balancing loss, with padding, several forwards and activation checkpointing."""

import pytest
import torch
from support.models import Transformer, balance, config, randomize, router, tokens, transparent_router
from torch.utils.checkpoint import checkpoint

from fourier_moe import TopKRouter, adapters, inject, recording

E, N = 4, 6


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_gates_sum_to_one_with_exactly_k_active(top_k):
    gates = router(top_k)(tokens(3, 5, N))
    assert gates.shape == (3, 5, E)
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, 5))
    assert ((gates > 0).sum(-1) == top_k).all()
    assert (gates >= 0).all()


def test_gates_are_the_renormalized_softmax_of_the_most_probable_experts():
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    torch.testing.assert_close(transparent_router(2, 4)(p.log()), torch.tensor([[0.625, 0, 0.375, 0]]))
    layer = transparent_router(2, 4)
    layer.normalize_gates = False
    torch.testing.assert_close(layer(p.log()), torch.tensor([[0.5, 0, 0.3, 0]]))
    torch.testing.assert_close(
        router(2, normalize_gates=False)(tokens(5, N)).sum(-1),
        router(2)(tokens(5, N)).ne(0).mul(torch.softmax(tokens(5, N) @ router(2).weight.T, -1)).sum(-1),
    )


def test_k_1_uses_the_raw_probability_and_gives_the_router_a_gradient():
    layer = router(1)
    assert not layer.normalize_gates
    x = tokens(7, N)
    gates = layer(x)
    probabilities = torch.softmax(x @ layer.weight.T, -1)
    torch.testing.assert_close(gates.max(-1).values, probabilities.max(-1).values)
    assert ((gates > 0).sum(-1) == 1).all()
    gates.sum().backward()
    assert layer.weight.grad.abs().max() > 1e-3


def test_no_bias_and_kaiming_uniform_start_within_its_bound():
    layer = router(in_features=64)
    assert [tuple(p.shape) for p in layer.parameters()] == [(E, 64)]
    assert 0.9 / 8 < layer.weight.abs().max() <= 1 / 8  # 1 / sqrt(N)


def test_same_generator_gives_the_same_start_wherever_defaults_point():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            other = router()
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.weight.dtype == torch.float32
    assert torch.equal(other.weight, router().weight)


def test_softmax_is_float32_under_autocast_and_for_half_precision_input():
    layer, x = router(), tokens(50, N)
    reference = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = layer(x)
    assert gates.dtype == torch.float32
    assert torch.equal(gates, reference)
    assert layer(x.bfloat16()).dtype == torch.float32
    assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_input_is_saved_as_it_came_and_gets_the_gradients_of_its_float32_copy(autocast):
    layer, x = TopKRouter(64, E, 2, generator=torch.Generator().manual_seed(0)), tokens(3, 50, 64).bfloat16().requires_grad_()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        gates = layer(x).gates
    wide = {tensor.data_ptr(): tensor.dtype for tensor in saved if tensor.shape[-1] == 64}
    assert wide == {x.data_ptr(): torch.bfloat16, layer.weight.data_ptr(): torch.float32}

    weighting = tokens(3, 50, 2, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):  # must not lower the backward pass either
        (gates * weighting).sum().backward()
    reference = x.detach().float().requires_grad_()
    probabilities = torch.softmax(reference @ layer.weight.T, -1).topk(2, -1).values
    expected_gates = probabilities / probabilities.sum(-1, keepdim=True)
    expected = torch.autograd.grad((expected_gates * weighting).sum(), (reference, layer.weight))
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.float(), expected[0], rtol=1e-2, atol=1e-5)  # one rounding to bfloat16
    torch.testing.assert_close(layer.weight.grad, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_router_gives_no_gradient_to_what_is_frozen(frozen):
    layer, x = router(), tokens(5, N).requires_grad_(frozen != "input")
    layer.weight.requires_grad_(frozen != "weight")
    layer(x).square().sum().backward()
    assert (x.grad is None, layer.weight.grad is None) == (frozen == "input", frozen == "weight")


def test_router_passes_gradcheck_up_to_second_order():
    layer, x = router(num_experts=3).double(), tokens(2, 4, N).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.weight))
    assert torch.autograd.gradgradcheck(lambda x, _: layer(x), (x, layer.weight))


def test_a_half_precision_weight_still_gives_float32_gates():
    layer = router().bfloat16()
    gates = layer(tokens(50, N).bfloat16())
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.sum(-1), torch.ones(50), rtol=0, atol=1e-6)


def test_extreme_logits_stay_finite():
    gates = router()(1e6 * tokens(20, N))
    assert gates.isfinite().all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(20))


@pytest.mark.parametrize("shape", [(N,), (0, N), (1, N), (2, 3, 4, N)])
def test_any_leading_shape(shape):
    layer = router()
    with recording(layer):
        assert layer(tokens(*shape)).shape == (*shape[:-1], E)
        loss = layer.balance_loss()
    loss.backward()
    assert loss.isfinite()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_perfect_balance_gives_k(top_k):
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    x = torch.stack([p.roll(shift) for shift in range(4)]).log()
    assert balance(transparent_router(top_k, 4), x).item() == pytest.approx(top_k, abs=1e-5)


def test_balance_loss_of_an_example_computed_by_hand():
    x = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    # top-2: {0, 1} and {1, 2}; f = (0.5, 1, 0.5), P = (0.3, 0.45, 0.25); 3 * (0.15 + 0.45 + 0.125)
    assert balance(transparent_router(2, 3), x).item() == pytest.approx(2.175, abs=1e-6)
    # top-1: f = (0.5, 0.5, 0)
    assert balance(transparent_router(1, 3), x).item() == pytest.approx(3 * (0.15 + 0.225), abs=1e-6)


def test_collapse_costs_more_than_balance():
    x = torch.tensor([[0.97, 0.01, 0.01, 0.01]]).log().expand(8, -1)
    assert balance(transparent_router(1, 4), x).item() == pytest.approx(4 * 0.97, abs=1e-5)


def test_gradient_flows_through_the_mean_probability_only():
    layer, x = router(), tokens(30, N)
    balance(layer, x).backward()
    probabilities = torch.softmax(x @ layer.weight.T, -1)
    load = layer(x).ne(0).float().mean(0)
    (expected,) = torch.autograd.grad(E * (load * probabilities.mean(0)).sum(), layer.weight)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-7)


def with_gradient(layer, x, mask=None):
    layer.zero_grad()
    loss = balance(layer, x, mask)
    loss.backward()
    return loss.detach(), layer.weight.grad.clone()


def test_padding_changes_neither_balance_loss_nor_gradient():
    layer, x = router(), tokens(2, 5, N)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    short = with_gradient(layer, x[mask])
    padded = torch.cat([x, 9 * tokens(2, 7, N, seed=1)], 1)
    padded_mask = torch.cat([mask, torch.zeros(2, 7, dtype=torch.bool)], 1)
    for result in (with_gradient(layer, x, mask), with_gradient(layer, padded, padded_mask)):
        torch.testing.assert_close(result, short, rtol=1e-5, atol=1e-7)
    assert abs(with_gradient(layer, x)[0] - short[0]) > 1e-3
    integers = with_gradient(layer, x, mask.long())  # Hugging Face's attention_mask
    torch.testing.assert_close(integers, short, rtol=1e-5, atol=1e-7)


def test_all_padding_gives_zero_and_finite_gradients():
    layer = router()
    loss, gradient = with_gradient(layer, tokens(2, 5, N), torch.zeros(2, 5, dtype=torch.bool))
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_two_forwards_in_one_recording_count_like_one_of_all_tokens():
    layer, first, second = router(), tokens(5, N), tokens(9, N, seed=1)
    with recording(layer):
        layer(first)
        alone = layer.balance_loss()
        layer(second)
        both = layer.balance_loss()
    torch.testing.assert_close(both, balance(layer, torch.cat([first, second])))
    torch.testing.assert_close(alone, balance(layer, first))
    assert abs(both - alone) > 1e-4


def test_forgets_on_exit_and_starts_afresh():
    layer = router()
    first = balance(layer, tokens(5, N))
    with pytest.raises(RuntimeError, match="saw no tokens"):
        layer.balance_loss()
    balance(layer, tokens(50, N, seed=1))
    torch.testing.assert_close(balance(layer, tokens(5, N)), first)


def test_forgets_after_an_exception():
    layer = router()
    with pytest.raises(ValueError, match="token_mask"), recording(layer, torch.ones(5)):
        layer(tokens(6, N))
    with pytest.raises(RuntimeError):
        layer.balance_loss()
    layer(tokens(7, N))  # neither recorded nor checked against the mask
    with pytest.raises(RuntimeError):
        layer.balance_loss()


def test_balance_loss_outside_of_recording_is_an_error():
    layer = router()
    layer(tokens(5, N))
    with pytest.raises(RuntimeError, match=r"with recording\(model\)"):
        layer.balance_loss()
    with recording(layer), pytest.raises(RuntimeError):
        layer.balance_loss()


@pytest.mark.parametrize("shape", [(2, 4), (10,), (5, 2), (2, 5, 1)])
def test_mask_of_another_shape_is_an_error_that_names_both(shape):
    with pytest.raises(ValueError, match=r"token_mask has shape .* tokens of shape \(2, 5\)"):
        balance(router(), tokens(2, 5, N), torch.ones(shape))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_activation_checkpointing_counts_once_and_keeps_all_gradients(masked, backward_inside):
    model = Transformer()
    inject(model, config(head=["classifier"], balance_weight=0.3))
    randomize(model, 0.5)
    model.eval()  # batch norm would see the batch twice
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool() if masked else None
    x = tokens(2, 5, 16)
    results = []
    for checkpointed in (False, True):
        model.zero_grad()
        with recording(model, mask):
            hidden = x
            for block in model.layers:
                hidden = checkpoint(block, hidden, use_reentrant=False) if checkpointed else block(hidden)
            task = model.classifier(model.norm(hidden.mean(1))).square().mean()
            balances = torch.stack([adapter.balance_loss() for adapter in adapters(model).values()])
            loss = task + balances.sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        results.append((balances.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert len(results[0][1]) == 4 * 2 + 2
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-5, atol=1e-7)


def test_balance_gradient_alone_survives_activation_checkpointing():
    layer, x = router(), tokens(2, 5, N)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    expected = with_gradient(layer, x, mask)
    layer.zero_grad()
    with recording(layer, mask):
        checkpoint(layer, x, use_reentrant=False)
        loss = layer.balance_loss()
    loss.backward()
    torch.testing.assert_close((loss.detach(), layer.weight.grad), expected)


def test_recording_changes_no_output():
    layer, x = router(), tokens(5, N)
    with recording(layer):
        inside = layer(x)
    assert torch.equal(inside, layer(x))
