"""The routers' statistics: what is counted, for whom, and the measures that are read off it."""

import copy
import gc
import math
import pickle

import pytest
import torch
from support.models import Transformer, balance, config, router, tokens, transparent_router
from torch import nn
from torch.utils.checkpoint import checkpoint

from fourier_moe import RouterStatistics, StatisticsReader, inject, recording, routers
from fourier_moe.routing.statistics import TokenWeights

E, N = 4, 6


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
    before = dict(vars(layer.record))
    with monkeypatch.context() as patch:
        patch.setattr(RouterStatistics, "of_tokens", forbidden)
        patch.setattr(TokenWeights, "by_task", forbidden)
        with recording(layer, None, ["a", "b"]):
            layer(tokens(2, 5, N))
            layer.balance_loss()
        assert vars(layer.record) == before
        reader = StatisticsReader(layer)
        with pytest.raises(AssertionError, match="counted for nobody"):
            balance(layer, tokens(2, N))
    balance(layer, tokens(2, N))
    assert layer.record.total is not None
    reader.close()
    assert vars(layer.record) == before


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
        assert layer.record.num_readers == 1
    assert layer.record.num_readers == 0


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
    assert (other.record.num_readers, other.record.total) == (0, None)
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
        return [float(v) for v in (statistics.load_imbalance, statistics.load_entropy, statistics.balance)]

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
        return [float(v) for v in (statistics.active, statistics.load_imbalance, statistics.load_entropy, statistics.balance)]

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
