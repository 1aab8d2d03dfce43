"""Runs that are killed and resumed end with the bits of an uninterrupted one. 20 kills: python killed_runs.py"""

import pytest
import torch
from support.killed_runs import At, in_process, killed_again_and_again, moments, same


def test_uninterrupted_runs_are_equal_to_the_bit_whoever_loads_the_data(tmp_path, straight):
    status, outcome = in_process(tmp_path, num_workers=0)
    assert status == 0
    assert same(torch.load(outcome), straight)
    assert straight["steps"] == 8
    assert all(bool(value.abs().sum() > 0) for name, value in straight["weights"].items() if "coefficients" in name)


def test_deterministic_algorithms_work_and_change_nothing_on_the_cpu(tmp_path, straight):
    status, outcome = in_process(tmp_path, deterministic=True)
    assert status == 0, (tmp_path / "log.txt").read_text()
    assert same(torch.load(outcome), straight)


def test_other_seed_is_another_run(tmp_path, straight):
    _, outcome = in_process(tmp_path, seed=1, max_epochs=1)
    assert not same(torch.load(outcome)["weights"], straight["weights"])


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, straight):
    outcome, deaths = killed_again_and_again(tmp_path / "run", moments(4, seed=1))
    assert deaths >= 2
    assert same(torch.load(outcome), straight)


@pytest.mark.parametrize(
    ("hook", "count"),
    [
        ("half written", 4),  # the file before it is the one to resume from
        ("step", 3),
        ("on_train_epoch_start", 2),
    ],
)
def test_run_killed_at_the_worst_moments_too(tmp_path, straight, hook, count):
    outcome, deaths = killed_again_and_again(tmp_path / "run", [At(hook, count)])
    assert deaths == 1
    assert same(torch.load(outcome), straight)
