"""configs/defaults.yaml: every command starts from it, whatever the working directory, and a config is laid over it."""

import pytest
import yaml
from lightning.pytorch.callbacks import ModelSummary
from support import REPOSITORY

from lightning_modules.cli import ON_DEFAULTS, AdaptationCLI

DEFAULTS = REPOSITORY / "configs/defaults.yaml"
OWN = {
    "trainer": {"accelerator": "cpu"},
    "model": {
        "task": {"class_path": "ImageClassification", "init_args": {"model": "ViT-B-32", "pretrained": None}},
        "adapter": {"class_path": "HeadOnly"},
    },
    "data": {"class_path": "datamodules.ImageDataModule", "init_args": {"dataset": "digits"}},
}


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """The config of a file of one's own without callbacks and logger, in a directory of one's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
    return lambda *words: AdaptationCLI(["--config", "own.yaml", *words], run=False)


def classes(cli):
    callbacks = cli.config.trainer.callbacks or []
    return [one.class_path.rpartition(".")[2] for one in (callbacks if isinstance(callbacks, list) else [callbacks])]


def test_config_without_callbacks_has_those_of_the_defaults_in_every_directory(parsed):
    cli = parsed()
    listed = [
        callback["class_path"].rpartition(".")[2] for callback in yaml.safe_load(DEFAULTS.read_text())["trainer"]["callbacks"]
    ]
    assert classes(cli) == listed
    assert cli.trainer.logger.save_dir == "runs"
    assert (cli.config.trainer.accelerator, cli.config.trainer.log_every_n_steps) == ("cpu", 10)


def test_callbacks_are_added_replaced_and_switched_off(parsed):
    added = parsed("--trainer.callbacks+=lightning.pytorch.callbacks.ModelSummary")
    assert classes(added) == [*classes(parsed()), "ModelSummary"]
    assert sum(isinstance(callback, ModelSummary) for callback in added.trainer.callbacks) == 1
    assert classes(parsed("--trainer.callbacks=lightning_modules.callbacks.RouterLoad")) == ["RouterLoad"]
    assert classes(parsed("--trainer.callbacks", "null")) == classes(parsed("--trainer.callbacks", "[]")) == []
    assert parsed("--trainer.logger", "false").trainer.loggers == []


@pytest.mark.parametrize(
    ("config", "monitor"),
    [("demo", ("val/accuracy", "max")), ("glue_rte", ("val/accuracy", "max")), ("demo_math", ("val/loss", "min"))],
)
def test_best_checkpoint_and_adapter_follow_the_task(monkeypatch, config, monitor):
    monkeypatch.chdir(REPOSITORY)
    words = ["--config", f"configs/{config}.yaml", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    found = AdaptationCLI(
        [*words, "--model.task.tiny=true"] if config == "glue_rte" else words, run=False
    ).config.trainer.callbacks
    followed = [callback.init_args for callback in found if callback.get("init_args", {}).get("monitor")]
    assert [(arguments.monitor, arguments.mode) for arguments in followed] == [monitor] * 3


def test_mistake_in_the_defaults_names_their_file(main, capsys, tmp_path, monkeypatch):
    wrong = tmp_path / "defaults.yaml"
    wrong.write_text(DEFAULTS.read_text().replace("log_every_n_steps:", "log_every_step:"))
    monkeypatch.setitem(ON_DEFAULTS, "default_config_files", [str(wrong)])
    with pytest.raises(SystemExit):
        main("fit", "--config", "configs/demo.yaml")
    error = capsys.readouterr().err
    assert str(wrong) in error
    assert "log_every_step" in error


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_help_says_where_the_defaults_come_from(main, capsys, command):
    with pytest.raises(SystemExit):
        main(command, "--help")
    assert str(DEFAULTS) in "".join(capsys.readouterr().out.split())
