"""Gates, the load-balancing loss and the statistics, with padding, several forwards and activation checkpointing."""

import copy
import gc
import math
import pickle

import pytest
import torch
from fourier_moe_models import Transformer, config
from torch import nn
from torch.utils.checkpoint import checkpoint

from fourier_moe import RouterStatistics, StatisticsReader, TopKRouter, adapters, inject, recording, routers
from fourier_moe.router_statistics import TokenWeights

E, N = 4, 6


class DenseRouter(TopKRouter):
    """Gives the gates of all experts, 0 for the inactive ones."""

    def forward(self, x):
        return super().forward(x).dense(self.num_experts)


def router(top_k=2, num_experts=E, in_features=N, seed=0, **arguments):
    return DenseRouter(in_features, num_experts, top_k, generator=torch.Generator().manual_seed(seed), **arguments)


def transparent_router(top_k, num_experts):
    """R = identity, so that the input log(p) gives the probabilities p."""
    layer = router(top_k, num_experts, num_experts)
    nn.init.eye_(layer.weight)
    return layer


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def balance(layer, x, mask=None):
    with recording(layer, mask):
        layer(x)
        return layer.balance_loss()


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_gates_sum_to_one_with_exactly_k_active(top_k):
    gates = router(top_k)(tokens(3, 5, N))
    assert gates.shape == (3, 5, E)
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, 5))
    assert ((gates > 0).sum(-1) == top_k).all()
    assert (gates >= 0).all()


def test_gates_are_the_renormalised_softmax_of_the_most_probable_experts():
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
    inject(model, config(head=["classifier"], init_std=0.5, balance_weight=0.3))
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


# ---------------------------------------------------------------- statistics


def check_statistics(statistics, layer, x):
    """Against sums token by token, over the tokens x (T, N)."""
    load, probability, gate = torch.zeros(3, E, dtype=torch.float64)
    for token in x:
        p, gates = torch.softmax(layer.weight @ token, -1).double().detach(), layer(token).double().detach()
        load, probability, gate = load + (gates > 0), probability + p, gate + gates
    assert statistics.tokens == len(x)
    torch.testing.assert_close(statistics.load, load / max(len(x), 1))
    torch.testing.assert_close(statistics.probability, probability / max(len(x), 1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(statistics.gate, gate / load.clamp(min=1), rtol=1e-5, atol=1e-7)
    assert not statistics.sums.requires_grad


@pytest.mark.parametrize(("top_k", "normalize"), [(1, True), (2, True), (2, False), (4, True)])
def test_statistics_are_those_of_the_real_tokens_of_all_steps_since_the_last_read(top_k, normalize):
    layer = router(top_k, normalize_gates=normalize)
    reader = StatisticsReader(layer)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    check_statistics(layer.statistics(), layer, tokens(0, N))
    seen = []
    for seed in range(3):
        x = tokens(2, 5, N, seed=seed)
        with recording(layer, mask):
            layer(x)
            layer.balance_loss()
        seen.append(x[mask])
        check_statistics(layer.statistics(), layer, torch.cat(seen))
    check_statistics(reader.read()[""], layer, torch.cat(seen))
    check_statistics(reader.read()[""], layer, tokens(0, N))
    balance(layer, seen[0])
    check_statistics(reader.read()[""], layer, seen[0])
    check_statistics(layer.statistics(), layer, torch.cat([*seen, seen[0]]))  # nobody resets it


def test_readers_take_nothing_from_each_other():
    layer, steps = router(), [tokens(5, N, seed=seed) for seed in range(4)]
    early = StatisticsReader(layer)
    balance(layer, steps[0])
    late = StatisticsReader(layer)
    balance(layer, steps[1])
    check_statistics(early.read()[""], layer, torch.cat(steps[:2]))
    balance(layer, steps[2])
    check_statistics(late.read()[""], layer, torch.cat(steps[1:3]))
    early.close()
    balance(layer, steps[3])
    check_statistics(late.read()[""], layer, steps[3])
    check_statistics(layer.statistics(), layer, torch.cat(steps))


def test_nothing_is_counted_and_nothing_held_while_nobody_asks(monkeypatch):
    def forbidden(*_):
        raise AssertionError("counted for nobody")

    layer = router()
    before = dict(layer.__dict__)
    with monkeypatch.context() as patch:
        patch.setattr(RouterStatistics, "of_tokens", forbidden)
        patch.setattr(TokenWeights, "by_task", forbidden)
        with recording(layer, None, ["a", "b"]):
            layer(tokens(2, 5, N))
            layer.balance_loss()
        assert layer.__dict__ == before
        reader = StatisticsReader(layer)
        with pytest.raises(AssertionError, match="counted for nobody"):
            balance(layer, tokens(2, N))
    balance(layer, tokens(2, N))
    assert layer._total is not None
    reader.close()
    assert layer.__dict__ == before


def test_asking_in_vain_says_what_to_do():
    layer = router()
    with pytest.raises(RuntimeError, match=r"make `reader = StatisticsReader\(model\)`"):
        layer.statistics()
    reader = StatisticsReader(layer)
    reader.close()
    with pytest.raises(RuntimeError, match="is closed; make another"):
        reader.read()


def test_a_forgotten_reader_is_closed_and_closing_twice_changes_nothing():
    layer = router()
    forgotten, closed = StatisticsReader(layer), StatisticsReader(layer)
    with StatisticsReader(layer):
        closed.close()
        closed.close()
        balance(layer, tokens(5, N))
        assert layer.statistics().tokens == 5
        del forgotten
        gc.collect()
        assert layer._num_readers == 1
    assert layer._num_readers == 0


def test_reading_in_inference_mode_does_not_end_the_counting():
    layer = router()
    with torch.inference_mode():
        reader = StatisticsReader(layer)
        balance(layer, tokens(3, N))
        reader.read()
    balance(layer, tokens(5, N))
    check_statistics(reader.read()[""], layer, tokens(5, N))


def test_statistics_by_task_follow_the_examples_when_tasks_come_and_go():
    layer = router()
    whole, interval = StatisticsReader(layer), StatisticsReader(layer)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    seen = {}
    for seed, tasks in enumerate([("b", "a", "b"), ("c", "c", "c"), ("a", "d", "b"), None]):
        x, own = tokens(3, 5, N, seed=seed), {}
        with recording(layer, mask, tasks):
            layer(x)
        for task, row, real in zip(tasks or [None] * 3, x, mask, strict=True):
            own.setdefault(task, []).append(row[real])
            seen.setdefault(task, []).append(row[real])
        by_task = interval.read()[""].by_task
        assert {task for task, found in by_task.items() if found.tokens} == set(tasks or ())
        for task in tasks or ():
            check_statistics(by_task[task], layer, torch.cat(own[task]))
    statistics = whole.read()[""]
    assert set(statistics.by_task) == {"a", "b", "c", "d"}
    for task, found in statistics.by_task.items():
        check_statistics(found, layer, torch.cat(seen[task]))
    check_statistics(statistics, layer, torch.cat([row for rows in seen.values() for row in rows]))


def test_routers_that_met_other_tasks_keep_theirs_apart():
    model = nn.Sequential(router(), router(seed=1))
    reader = StatisticsReader(model)
    with recording(model[1], None, ["b"]):
        model[1](tokens(1, N))
    for tasks in (["a", "b"], ["c", "b"]):
        with recording(model, None, tasks):
            model[0](tokens(2, N))
            model[1](tokens(2, N))
    counts = {name: {task: int(s.tokens) for task, s in read.by_task.items()} for name, read in reader.read().items()}
    assert counts == {"0": {"a": 1, "b": 2, "c": 1}, "1": {"a": 1, "b": 3, "c": 1}}


def test_every_forward_of_a_step_counts_also_of_other_shapes():
    layer, first, second = router(), tokens(5, N), tokens(3, 3, N, seed=1)
    reader = StatisticsReader(layer)
    with recording(layer):
        layer(first)
        layer.balance_loss()
        layer(second)
    check_statistics(reader.read()[""], layer, torch.cat([first, second.flatten(0, 1)]))


def test_many_routers_are_told_apart():
    model = nn.Sequential(*(router(seed=seed) for seed in range(40)))
    x = tokens(7, N)
    reader = StatisticsReader(model)
    with recording(model):
        for layer in model:
            layer(x)
    for layer, statistics in zip(model, reader.read().values(), strict=True):
        check_statistics(statistics, layer, x)


def test_a_step_that_fails_and_forwards_outside_of_recording_do_not_count():
    layer = router()
    reader = StatisticsReader(layer)
    layer(tokens(5, N))
    with pytest.raises(RuntimeError), recording(layer):
        layer(tokens(5, N)).view(3)
    assert reader.read()[""].tokens == 0


def test_counts_are_exact_under_autocast():
    layer = transparent_router(1, 4)
    x = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log().expand(1001, -1)
    with StatisticsReader(layer) as reader:
        with torch.autocast("cpu", dtype=torch.bfloat16), recording(layer):
            layer(x)
        statistics = reader.read()[""]
    assert statistics.counts.tolist() == [1001, 0, 0, 0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_statistics_are_no_part_of_the_state_and_of_a_copy(copied):
    layer = router()
    reader = StatisticsReader(layer)
    balance(layer, tokens(5, N))
    assert set(layer.state_dict()) == {"weight"}
    other = copied(layer)
    balance(other, tokens(5, N))
    assert (other._num_readers, other._total) == (0, None)
    assert reader.read()[""].tokens == 5


@pytest.mark.parametrize("masked", [False, True])
def test_wrong_number_of_tasks_is_an_error(masked):
    layer = router()
    reader = StatisticsReader(layer)
    with (
        pytest.raises(ValueError, match=r"tasks has 3 names, .* shape \(2, 5\)"),
        recording(layer, torch.ones(2, 5) if masked else None, ["a", "b", "c"]),
    ):
        layer(tokens(2, 5, N))
    assert reader.read()[""].tokens == 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_statistics_under_activation_checkpointing(checkpointed):
    layer, x = router(), tokens(2, 5, N).requires_grad_()
    reader = StatisticsReader(layer)
    with recording(layer, None, ["a", "b"]):
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        layer.balance_loss()
    y.sum().backward()
    check_statistics(reader.read()[""], layer, x.detach().flatten(0, 1))


def test_measures_of_loads_computed_by_hand():
    def measured(counts, top_k):
        counts = torch.tensor(counts, dtype=torch.float64)
        tokens = counts.sum(-1, keepdim=True) / top_k
        statistics = RouterStatistics(torch.cat([counts, counts / top_k, counts / top_k, tokens]))
        return [float(v) for v in (statistics.load_imbalance, statistics.load_entropy, statistics.spread)]

    assert measured([5, 5, 5, 5], 2) == pytest.approx([1, 1, 1])
    assert measured([10, 10, 0, 0], 2) == pytest.approx([2, 0.5, 0])
    assert measured([10, 0, 0, 0], 1) == pytest.approx([4, 0, 0])
    assert measured([10, 5, 5, 0], 2) == pytest.approx([2, 0.75, (2**1.5 - 2) / 2])
    assert measured([10, 10], 2) == pytest.approx([1, 1, 1])  # K = E: every token goes everywhere
    assert measured([10], 1) == pytest.approx([1, 1, 1])
    assert measured([0, 0, 0, 0], 2)[0] == 0
    assert not any(math.isnan(value) for value in measured([0, 0, 0, 0], 2))


def test_dead_is_relative_to_an_even_load():
    counts = torch.tensor([100.0, 95, 4, 1])  # even: 50
    statistics = RouterStatistics(torch.cat([counts, counts, counts, counts.sum(-1, keepdim=True) / 2]))
    assert statistics.dead(0.05).tolist() == [False, False, False, True]
    assert statistics.dead(0.1).tolist() == [False, False, True, True]
    assert not statistics.dead(0).any()


def test_measures_where_tokens_have_any_number_of_experts():
    def measured(counts, tokens):
        counts = torch.tensor(counts, dtype=torch.float64)
        statistics = RouterStatistics(torch.cat([counts, counts, counts, torch.tensor([tokens])]))
        return [float(v) for v in (statistics.active, statistics.load_imbalance, statistics.load_entropy, statistics.spread)]

    assert measured([4, 4, 4, 4], 10) == pytest.approx([1.6, 1, 1, 1])
    assert measured([10, 5, 0, 0], 10) == pytest.approx([1.5, 8 / 3, 0.4591479, (math.exp(0.6365142) - 1.5) / 2.5])
    assert measured([0, 0, 0, 0], 10)[:3] == [0, 0, 0]
    nobody = RouterStatistics(torch.tensor([0.0] * 12 + [10.0]))
    assert nobody.dead(0.01).all()
    assert RouterStatistics(torch.tensor([1.0, 1, 1, 0] * 3 + [1000.0])).dead(0.01).tolist() == [True] * 4


def test_balance_loss_of_the_statistics_is_that_of_the_tokens():
    layer, x = router(), tokens(30, N)
    reader = StatisticsReader(layer)
    loss = balance(layer, x)
    assert float(reader.read()[""].balance_loss) == pytest.approx(loss.item(), rel=1e-5)


def test_routers_are_named_by_projection_and_shared_ones_count_once():
    model = Transformer()
    inject(model, config(router_scope="block"))
    assert list(routers(model)) == ["layers.0.attention.q_proj", "layers.1.attention.q_proj"]
    reader = StatisticsReader(model)
    with recording(model):
        model(tokens(2, 5, 16))
    assert [int(statistics.tokens) for statistics in reader.read().values()] == [20, 20]  # two projections of 2 x 5
