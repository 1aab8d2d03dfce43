"""What every run's row says: commit, versions, hash of the config, peak memory; and the picture of them all."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lightning_modules.experiments.provenance
from lightning_modules.callbacks.monitoring.peak_memory import PeakMemory
from lightning_modules.experiments.plots import pareto_front, plot_comparison
from lightning_modules.experiments.provenance import config_hash, repository_commit, versions
from lightning_modules.experiments.results import Result, result_frame

CPU = torch.device("cpu")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one file that stands for provenance.py; returns a function that runs git in it."""

    def git(*words):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "provenance.py").write_text("1")
    monkeypatch.setattr(lightning_modules.experiments.provenance, "__file__", str(tmp_path / "provenance.py"))
    repository_commit.cache_clear()
    yield git
    repository_commit.cache_clear()


def test_commit_and_whether_there_are_changes(repository, tmp_path):
    repository("init", "-q")
    repository("add", "provenance.py")
    repository("commit", "-q", "-m", "x")
    commit = repository("rev-parse", "HEAD")
    (tmp_path / "untracked").touch()
    assert repository_commit() == commit
    repository_commit.cache_clear()
    (tmp_path / "provenance.py").write_text("2")
    assert repository_commit() == f"{commit}+dirty"


def test_no_commit_outside_of_a_repository_or_installed_below_another(repository):
    assert repository_commit() is None
    repository_commit.cache_clear()
    repository("init", "-q")
    repository("commit", "-q", "--allow-empty", "-m", "x")
    assert repository_commit() is None


def test_no_commit_without_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert repository_commit() is None


def test_hash_is_of_every_setting_but_where_the_run_writes():
    config = {"model": {"adapter": {"r": 8}}, "trainer": {"max_epochs": 1, "logger": {"save_dir": "a"}}}
    same = {"trainer": {"logger": {"save_dir": "b"}, "max_epochs": 1}, "model": {"adapter": {"r": 8}}}
    assert config_hash(config) == config_hash(same)
    assert config_hash(config) != config_hash({**config, "model": {"adapter": {"r": 9}}})
    assert config_hash(config) != config_hash({**config, "trainer": {"max_epochs": 2, "logger": None}})


def test_versions_name_libraries_and_device():
    assert {"python", "torch", "peft", "device"} <= versions(CPU).keys()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory can be reset on Linux only")
def test_peak_is_of_this_training_and_not_of_an_earlier_larger_one():
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=CPU, reduce=lambda value, reduce_op: value))
    size = 64 * 2**20  # bytes; as one block, which goes back to the system

    def peak(blocks):
        callback = PeakMemory()
        callback.on_train_start(trainer, None)
        torch.ones(blocks * size, dtype=torch.uint8)
        callback.on_train_end(trainer, None)
        return callback.peak

    none, three, one = peak(0), peak(3), peak(1)
    assert three - none == pytest.approx(3 * size, rel=0.2)
    assert one - none == pytest.approx(size, rel=0.3)


def test_pareto_front_has_what_nothing_else_beats_at_its_price():
    points = {
        "dear": (9.0, 0.7),
        "best": (5.0, 0.9),
        "cheap": (1.0, 0.5),
        "beaten": (3.0, 0.4),
        "tie": (6.0, 0.9),
        "twin": (5.0, 0.8),
    }
    assert pareto_front(points) == ["cheap", "best"]
    assert pareto_front({"only": (1.0, 0.1)}) == ["only"]


def test_plot_draws_many_methods_each_in_its_own_way(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.errorbar", lambda self, *_, **style: drawn.append((style["marker"], style["color"]))
    )
    monkeypatch.setattr("matplotlib.axes.Axes.get_legend_handles_labels", lambda self: ([], []))
    monkeypatch.setattr(
        "matplotlib.figure.Figure.legend",
        lambda *_, **__: SimpleNamespace(get_texts=lambda: [SimpleNamespace(set_fontweight=str)] * 20),
    )
    names = {f"method {number}": f"method {number}" for number in range(20)}
    results = [Result(name, name, 0, "test/accuracy", {"test/accuracy": 0.5}, {"head": 1}, 1.0) for name in names]
    plot_comparison(tmp_path / "plot.png", result_frame(results), names)
    assert len(drawn) == 40
    assert len(set(drawn)) == 20


def test_front_of_an_error_has_the_lowest_values(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, *_, **__: lines.append(list(y)))
    results = [Result(name, name, 0, "test/loss", {"test/loss": float(name)}, {"head": 1}, 1.0) for name in ("2", "1", "3")]
    plot_comparison(tmp_path / "plot.png", result_frame(results), {name: name for name in "123"})
    assert lines == [[1.0], [1.0]]
