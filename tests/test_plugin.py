"""The example package in examples/callback_plugin: found through its entry point, and by class_path."""

import configparser
import sys

import pytest
from support import REPOSITORY

from fourier_moe import adapters

PLUGIN = REPOSITORY / "examples/callback_plugin"
GROUP = "lightning.pytorch.callbacks_factory"
QUICK = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1")

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on tiny runs


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """What `pip install examples/callback_plugin` leaves: the package, and its entry points beside it."""
    pyproject = configparser.ConfigParser()
    pyproject.read_string((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))
    name = pyproject["project"]["name"].strip('"')
    ((key, target),) = pyproject[f'project.entry-points."{GROUP}"'].items()
    metadata = tmp_path / "site" / f"{name.replace('-', '_')}-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{key} = {target.strip(chr(34))}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.syspath_prepend(PLUGIN)
    yield
    for module in [module for module in sys.modules if module.partition(".")[0] == "adaptive_balance"]:
        del sys.modules[module]


def names(cli):
    return [type(callback).__name__ for callback in cli.trainer.callbacks]


def test_entry_point_adds_the_callback_where_the_variable_is_set(installed, monkeypatch, run):
    monkeypatch.setenv("ADAPTIVE_BALANCE", "1")
    cli = run("fit", "--config", "configs/demo.yaml", *QUICK)
    (callback,) = [callback for callback in cli.trainer.callbacks if type(callback).__name__ == "AdaptiveBalance"]
    assert callback.target == 1


def test_installed_but_not_asked_for_changes_nothing(installed, monkeypatch, run):
    monkeypatch.delenv("ADAPTIVE_BALANCE", raising=False)
    assert "AdaptiveBalance" not in names(run("fit", "--config", "configs/demo.yaml", *QUICK))


def test_class_path_adds_the_callback_and_it_steers_the_weights(installed, monkeypatch, run):
    monkeypatch.delenv("ADAPTIVE_BALANCE", raising=False)
    callback = ["--trainer.callbacks+=adaptive_balance.AdaptiveBalance", "--trainer.callbacks.target=1.0"]
    cli = run("fit", "--config", "configs/demo.yaml", *QUICK, *callback, "--trainer.callbacks.every_n_steps=1")
    assert names(cli).count("AdaptiveBalance") == 1
    weights = [adapter.balance_weight for adapter in adapters(cli.model.model).values()]
    assert weights == pytest.approx([1e-3 * 1.5**2] * 8)  # no load is perfectly even, so all of them were raised twice
