from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data.distributed import DistributedSampler

from datamodules.shared.sampling import BATCHES_PER_CHUNK, ShuffledSampler, TrainShare, evaluation_sampler, num_shares, run_seed

SIZE = 4
LENGTHS = torch.randint(1, 200, (6 * BATCHES_PER_CHUNK * SIZE + 3,), generator=torch.Generator().manual_seed(0)).tolist()


def epoch(sampler, number):
    sampler.set_epoch(number)
    return list(sampler)


def batches(order, size=SIZE):
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding(order, size=SIZE):
    """Share of padding in batches that are as long as their longest example."""
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches(order, size))
    return 1 - sum(LENGTHS[index] for index in order) / padded


def grouped(seed=0, size=SIZE, **options):
    return ShuffledSampler(LENGTHS, seed, lengths=LENGTHS, batch_size=size, **options)


# Plain


def test_every_example_comes_once_in_an_order_of_seed_and_epoch():
    orders = [epoch(ShuffledSampler(range(50), seed), number) for seed in (0, 1) for number in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch(ShuffledSampler(range(50), 1), 1) == orders[3]


def test_plain_order_is_the_one_that_earlier_versions_had():
    generator = torch.Generator().manual_seed(7 + 3 * 0x9E3779B1)
    assert epoch(ShuffledSampler(range(20), 7), 3) == torch.randperm(20, generator=generator).tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"lengths": LENGTHS, "batch_size": SIZE}, {"weights": [0.7] * len(LENGTHS)}],
    ids=["plain", "lengths", "weights"],
)
def test_resumed_epoch_is_the_uninterrupted_one(options):
    straight, resumed = (ShuffledSampler(LENGTHS, 5, **options) for _ in range(2))
    orders = [epoch(straight, number) for number in range(3)]
    torch.rand(1, generator=resumed.generator)  # what workers draw does not matter
    assert epoch(resumed, 2) == orders[2] != orders[1]


# Lengths


def test_batches_of_similar_lengths_have_every_example_and_little_padding():
    order = epoch(grouped(), 0)
    assert sorted(order) == list(range(len(LENGTHS)))
    assert padding(epoch(ShuffledSampler(LENGTHS, 0), 0)) > 0.3
    assert padding(order) < 0.03


def test_short_and_long_batches_are_mixed_and_differ_from_epoch_to_epoch():
    sampler = grouped()
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    longest = [max(LENGTHS[index] for index in batch) for batch in batches(first)]
    assert sorted(longest) != longest
    # In order of length within chunks, neighbors would be about 4 apart.
    assert sum(abs(a - b) for a, b in pairwise(longest)) / len(longest) > 40
    sets = [{frozenset(batch) for batch in batches(order)} for order in (first, second)]
    assert len(sets[0] & sets[1]) < 5


def test_examples_that_fill_no_batch_come_last_and_are_not_the_longest_or_shortest():
    lasts = [epoch(grouped(), number)[-3:] for number in range(60)]
    mean = sum(LENGTHS[index] for last in lasts for index in last) / 180
    assert abs(mean - sum(LENGTHS) / len(LENGTHS)) < 20


def test_fewer_examples_than_a_batch_make_one():
    sampler = ShuffledSampler(range(3), 0, lengths=[5, 1, 3], batch_size=8)
    assert sorted(sampler) == [0, 1, 2]


def test_each_process_gets_similar_lengths_in_the_same_step():
    processes, per_process = 2, 4
    shares = []
    for rank in range(processes):
        trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": processes, "rank": rank})
        share = TrainShare(grouped(size=per_process * num_shares(trainer)), trainer)
        shares.append(epoch(share, 1))
        assert isinstance(share, DistributedSampler)  # Lightning takes any other for undivided, and divides again
        assert epoch(share, 2) != epoch(share, 1) == shares[-1]
    assert set(shares[0]) | set(shares[1]) == set(range(len(LENGTHS)))
    assert all(padding(share, per_process) < 0.05 for share in shares)
    means = [[sum(LENGTHS[i] for i in batch) / len(batch) for batch in batches(share, per_process)] for share in shares]
    differences = [abs(a - b) for a, b in zip(*means, strict=True)]
    assert sum(differences) / len(differences) < 3


def test_one_process_has_the_whole():
    sampler = grouped()
    for trainer in (None, SimpleNamespace(distributed_sampler_kwargs=None)):
        assert num_shares(trainer) == 1
        assert epoch(TrainShare(sampler, trainer), 3) == epoch(sampler, 3)


# Weights


def test_weights_are_the_mean_number_of_times_and_epochs_are_equally_long():
    weights = [0.0, 0.1, 0.25, 0.5, 0.9, 1.0, 1.6, 2.3, 0.15, 0.2]
    sampler = ShuffledSampler(weights, 0, weights=weights)
    counts: Counter[int] = Counter()
    epochs = 4000
    for number in range(epochs):
        order = epoch(sampler, number)
        assert len(order) == len(sampler) == 7
        once = Counter(order)
        assert all(int(weight) <= once[index] <= int(weight) + 1 for index, weight in enumerate(weights))
        counts += once
    means = [counts[index] / epochs for index in range(len(weights))]
    assert means == pytest.approx(weights, abs=0.03)
    assert counts[0] == 0


def test_whole_weights_repeat_exactly():
    order = epoch(ShuffledSampler(range(3), 0, weights=[2, 0, 1]), 0)
    assert Counter(order) == {0: 2, 2: 1}


def test_sum_of_tenths_counts_as_whole():
    assert len(ShuffledSampler(range(10), 0, weights=[0.1] * 10)) == 1
    assert len(ShuffledSampler(range(1000), 0, weights=[0.3] * 1000)) == 300


def test_sum_between_whole_numbers_is_rounded_down():
    sampler = ShuffledSampler(range(4), 0, weights=[0.9, 0.9, 0.9, 0.9])
    assert {len(epoch(sampler, number)) for number in range(50)} == {3}
    assert all(len(set(epoch(sampler, number))) == 3 for number in range(50))  # nothing twice


def test_repeated_examples_are_shuffled_too():
    order = epoch(ShuffledSampler(range(100), 0, weights=[1.5] * 100), 0)
    assert sorted(order[:100]) != list(range(100))


def test_weights_and_lengths_go_together():
    weights = [0.5] * len(LENGTHS)
    order = epoch(grouped(weights=weights), 0)
    assert len(order) == len(set(order)) == len(LENGTHS) // 2
    assert padding(order) < 0.03


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [1, 2], "batch_size": 2}, "lengths has 2 entries, but the data set has 3 examples"),
        ({"lengths": [1, 2, 3]}, "batch_size=None must be 1 or more with lengths, and None without"),
        ({"lengths": [1, 2, 3], "batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"batch_size": 4}, "batch_size=4 must be 1 or more with lengths, and None without"),
        ({"weights": [1.0]}, "weights has 1 entries, but the data set has 3 examples"),
        ({"weights": [1.0, -1.0, 1.0]}, "negative or not finite"),
        ({"weights": [1.0, float("nan"), 1.0]}, "negative or not finite"),
        ({"weights": [1.0, float("inf"), 1.0]}, "negative or not finite"),
        ({"weights": [0.3, 0.3, 0.3]}, r"weights add up to 0\.9; at least 1 is needed"),
    ],
)
def test_invalid_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ShuffledSampler(range(3), 0, **options)


# Evaluation


def test_evaluation_in_one_process_needs_no_sampler():
    assert evaluation_sampler(range(5), None) is None
    assert evaluation_sampler(range(5), SimpleNamespace(world_size=1)) is None


def test_processes_that_share_a_model_get_equally_many_examples_repetition_included():
    strategy = ModelParallelStrategy()
    trainers = [SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy) for rank in range(2)]
    assert [list(evaluation_sampler(range(5), trainer)) for trainer in trainers] == [[0, 2, 4], [1, 3, 0]]


def test_evaluation_on_three_processes_has_every_example_once():
    trainers = [SimpleNamespace(world_size=3, global_rank=rank, strategy=DDPStrategy()) for rank in range(3)]
    assert sorted(index for trainer in trainers for index in evaluation_sampler(range(7), trainer)) == list(range(7))


def test_processes_that_nobody_seeded_take_the_first_one_s_seed():
    torch.manual_seed(3)
    first = SimpleNamespace(broadcast=lambda seed: 7)  # what process 0 has
    assert run_seed(SimpleNamespace(world_size=2, strategy=first)) == 7
    assert run_seed(SimpleNamespace(world_size=1, strategy=first)) == run_seed(None) == 3
