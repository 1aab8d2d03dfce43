"""TrainLoader: the batches after an interruption are those that would have come."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.shared.loading import TrainLoader, leave_signals_to_main_process
from datamodules.shared.sampling import ShuffledSampler, TrainShare

LENGTHS = torch.randint(1, 50, (23,), generator=torch.Generator().manual_seed(0)).tolist()


class Noisy(Dataset):
    """Items are their index and a number drawn as an augmentation would."""

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, item):
        index, seed = item if isinstance(item, tuple) else (item, 0)
        return index, torch.rand((), generator=torch.Generator().manual_seed(seed)).item()


KINDS = {
    "plain": {},
    "seeds": {"with_seeds": True},
    "lengths": {"lengths": LENGTHS, "batch_size": 4},
    "weights": {"weights": [0.3 + length / 40 for length in LENGTHS], "with_seeds": True},
}


def make(kind="seeds", trainer=None, batch_size=4, **options):
    sampler = ShuffledSampler(LENGTHS, 3, **KINDS[kind])
    share = TrainShare(sampler, trainer)
    return TrainLoader(
        **{"dataset": Noisy(), "batch_size": batch_size, "sampler": share, "generator": sampler.generator} | options
    )


def start(loader, epoch):
    """As Lightning does it: the iterator first, the epoch second."""
    iterator = iter(loader)
    loader.sampler.set_epoch(epoch)
    return ([index.tolist(), noise.tolist()] for index, noise in iterator)


WORKERS = [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]


@pytest.mark.parametrize("options", WORKERS, ids=["main", "workers", "persistent"])
@pytest.mark.parametrize("kind", KINDS)
def test_loader_goes_on_with_the_next_batch_of_the_same_epoch_and_then_with_whole_ones(kind, options):
    straight = make(kind)
    epochs = [list(start(straight, epoch)) for epoch in range(4)]
    interrupted = make(kind, **options)
    assert list(start(interrupted, 1)) == epochs[1]
    iterator = start(interrupted, 2)
    assert [next(iterator) for _ in range(2)] == epochs[2][:2]  # workers have prepared more by now
    state = interrupted.state_dict()
    assert state == {"epoch": 2, "batches": 2, "batch_size": 4}

    resumed = make(kind, **options)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # asked again before anything is read
    torch.rand(5)
    assert list(start(resumed, 2)) == epochs[2][2:]
    assert resumed.state_dict()["batches"] == len(epochs[2]) == len(resumed)
    assert list(start(resumed, 3)) == epochs[3]


def test_loader_saved_at_the_end_of_an_epoch_begins_the_next_at_its_start():
    straight = make()
    ended = make()
    list(start(ended, 0))
    resumed = make()
    resumed.load_state_dict(ended.state_dict())
    assert list(start(resumed, 1)) == list(start(straight, 1))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_go_on_together_and_one_process_goes_on_where_several_stopped(processes):
    def share(rank):
        return SimpleNamespace(distributed_sampler_kwargs={"num_replicas": processes, "rank": rank})

    loaders = [make("plain", share(rank), batch_size=2) for rank in range(processes)]
    iterators = [start(loader, 1) for loader in loaders]
    seen = {index for iterator in iterators for _ in range(2) for index in next(iterator)[0]}
    states = [loader.state_dict() for loader in loaders]
    assert states == [{"epoch": 1, "batches": 2, "batch_size": 2 * processes}] * processes

    again = [make("plain", share(rank), batch_size=2) for rank in range(processes)]
    for loader in again:
        loader.load_state_dict(states[0])
    rest = [list(start(loader, 1)) for loader in again]
    assert rest == [list(iterator) for iterator in iterators]

    alone = make("plain", batch_size=2 * processes)
    alone.load_state_dict(states[0])
    left = [index for batch in start(alone, 1) for index in batch[0]]
    assert sorted([*left, *seen]) == list(range(len(LENGTHS)))


def test_another_number_of_examples_a_batch_goes_on_near_by_and_says_so():
    resumed = make("plain", batch_size=3)
    with pytest.warns(UserWarning, match="4 examples a batch .* this run has 3: it resumes after 2 of its batches"):
        resumed.load_state_dict({"epoch": 0, "batches": 2, "batch_size": 4})
    order = [index for batch in start(make("plain"), 0) for index in batch[0]]
    assert [index for batch in start(resumed, 0) for index in batch[0]] == order[6:]


class Signaled(Noisy):
    def __getitem__(self, item):
        if item[0] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(item)


def test_workers_survive_the_signals_that_a_scheduler_sends_to_every_process():
    loader = make(dataset=Signaled(), num_workers=1, worker_init_fn=leave_signals_to_main_process)
    assert list(start(loader, 0)) == list(start(make(), 0))
