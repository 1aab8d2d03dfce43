"""Random state: of every source, in every process, through a file that holds no code."""

import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_modules.interruption import ExactResume
from lightning_modules.interruption.random_state import all_random_states, random_state, reseed, set_random_state

CPU = torch.device("cpu")


def draw():
    return [
        torch.rand(()).item(),
        torch.randn(()).item(),
        np.random.rand(),
        np.random.randn(),
        random.random(),
        random.gauss(0, 1),
    ]


@pytest.fixture(autouse=True)
def _own_state():
    before = random_state(CPU)
    yield
    set_random_state(before, CPU)


def test_all_sources_go_on_where_they_were_after_a_file_without_code():
    draw()  # leaves half a pair of Gaussian numbers in each
    buffer = io.BytesIO()
    torch.save(random_state(CPU), buffer)
    expected = draw()
    buffer.seek(0)
    set_random_state(torch.load(buffer, weights_only=True), CPU)
    assert draw() == expected


def test_new_seeds_differ_by_seed_step_and_rank_and_are_the_same_again():
    drawn = {}
    for key in [(0, 5, 0), (1, 5, 0), (0, 6, 0), (0, 5, 1), (-3, 5, 0), (2**64 - 1, 5, 0)]:
        reseed(*key)
        drawn[key] = draw()
        reseed(*key)
        assert draw() == drawn[key]
    for place in range(6):
        assert len({values[place] for values in drawn.values()}) == len(drawn)


def test_one_process_has_one_state():
    state = random_state(CPU)
    assert all_random_states(state) == [state]


def loaded(states, rank=0, world_size=1):
    callback = ExactResume()
    strategy = SimpleNamespace(root_device=CPU)
    trainer = SimpleNamespace(strategy=strategy, state=SimpleNamespace(fn="fit"), world_size=world_size, global_rank=rank)
    callback.on_load_checkpoint(trainer, None, {"random_states": {"seed": 7, "step": 5, "states": states}} if states else {})
    return callback._next


def test_every_process_takes_its_own_state():
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(random_state(CPU))
    assert [loaded(states, rank, 3)["torch"].equal(states[rank]["torch"]) for rank in range(3)] == [True] * 3


def test_another_number_of_processes_derives_new_states_and_warns():
    before = draw(), random_state(CPU)
    with pytest.warns(UserWarning, match=r"1 process\(es\) on CPU, this run has 2 on CPU: .* derived"):
        states = [loaded([before[1]], rank, 2) for rank in range(2)]
    assert not states[0]["torch"].equal(states[1]["torch"])
    with pytest.warns(UserWarning, match="are derived"):
        assert loaded([before[1]], 1, 2)["torch"].equal(states[1]["torch"])
    assert torch.get_rng_state().equal(before[1]["torch"])  # until training begins, nothing has changed
    reseed(7, 5, 1)
    assert random_state(CPU)["torch"].equal(states[1]["torch"])


def test_checkpoint_of_a_gpu_derives_new_states_on_the_cpu():
    state = random_state(CPU) | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="1 process.* on GPU, this run has 1 on CPU"):
        assert not loaded([state])["torch"].equal(state["torch"])


def test_older_checkpoint_without_random_state_says_so():
    with pytest.warns(UserWarning, match="no random state"):
        assert loaded([]) is None
