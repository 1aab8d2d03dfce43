"""What the tests of compare and sweep share."""

from dataclasses import replace

import pytest
from support.commands import DEMO
from support.sweeps import RESULT, ROUTER

import lightning_modules.experiments.grid
import lightning_modules.experiments.plots
from fourier_moe import FourierMoEConfig


@pytest.fixture
def _no_run(monkeypatch):
    monkeypatch.setattr(lightning_modules.experiments.grid, "run_one", lambda *_: pytest.fail("a run began"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "swept"


@pytest.fixture
def sweep(main, output):
    return lambda study, *words: main("sweep", study, *DEMO, "--output", str(output), *words)


@pytest.fixture
def trained(monkeypatch):
    """(name, seed, adapter) of every run that would have been trained; a run's accuracy counts them."""
    runs = []

    def train_and_test(cli, variant, seed):
        runs.append((variant, seed, cli.model.adapter))
        metrics = {"test/accuracy": 0.5 + len(runs) / 100, "test/loss": len(runs)}
        if isinstance(cli.model.adapter, FourierMoEConfig):
            return replace(RESULT, variant=variant, seed=seed, metrics=metrics, router=ROUTER), {}
        parameters = {"experts": 0, "router": 0, "adapter": 4096, "head": 650}
        return replace(RESULT, variant=variant, seed=seed, metrics=metrics, parameters=parameters), {}

    monkeypatch.setattr(lightning_modules.experiments.grid, "_train_and_test", train_and_test)
    monkeypatch.setattr(lightning_modules.experiments.plots, "plot_study", lambda *_: None)  # slower than all the rest
    return runs
