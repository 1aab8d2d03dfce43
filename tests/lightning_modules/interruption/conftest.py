"""The run that nothing interrupts."""

import pytest
import torch
from support.killed_runs import in_process


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """Its weights, optimizer and schedule."""
    status, outcome = in_process(tmp_path_factory.mktemp("straight"))
    assert status == 0, (outcome.parent / "log.txt").read_text()
    return torch.load(outcome)
