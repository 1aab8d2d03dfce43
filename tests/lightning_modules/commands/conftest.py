"""What the tests of compare and sweep share."""

import pytest

import lightning_modules.experiments.grid


@pytest.fixture
def _no_run(monkeypatch):
    monkeypatch.setattr(lightning_modules.experiments.grid, "run_one", lambda *_: pytest.fail("a run began"))
