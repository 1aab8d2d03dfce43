"""What a user may get wrong on the command line of train.py."""

import json
import subprocess
import sys
import traceback

import pytest
import torch
from support import REPOSITORY
from support.commands import DEMO, SMOKE, run_directory
from support.limits import HANGS_AFTER
from torch import nn

from fourier_moe import FourierMoEConfig, describe_adapter, inject
from fourier_moe.adapter import build_layer
from lightning_modules import AdaptationModule
from lightning_modules.cli import user_error


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("trainer", "max_epoks"),
        ("model.adapter.init_args", "bandwith"),
        ("model.task.init_args", "pretraned"),
        ("model.optimization", "expert.lr"),
        ("data.init_args", "batchsize"),
    ],
)
def test_unknown_option_is_rejected_by_name(run, capsys, no_training, section, key):
    with pytest.raises(SystemExit) as stop:
        run("fit", *DEMO, f"--{section}.{key}", "1")
    assert stop.value.code == 2
    assert key in capsys.readouterr().err


def test_unknown_key_in_a_config_is_rejected_by_name(run, capsys, tmp_path, no_training):
    (tmp_path / "overlay.yaml").write_text("model:\n  optimization:\n    warm_up: 0.1\n")
    with pytest.raises(SystemExit) as stop:
        run("fit", *DEMO, "--config", str(tmp_path / "overlay.yaml"))
    assert stop.value.code == 2
    assert "warm_up" in capsys.readouterr().err


def test_target_that_matches_nothing_is_an_error_with_near_names_before_training(run, no_training):
    with pytest.raises(ValueError, match=r"'q_prj' matches no module.*near names:.*q_proj"):
        run("fit", *DEMO, "--model.adapter.init_args.targets", "[q_prj]")


def test_fit_without_optimization_is_an_error_before_training(run, no_training):
    with pytest.raises(ValueError, match="optimization is missing"):
        run("fit", *DEMO, "--model.optimization", "null")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precision_that_would_cast_the_adapters_is_refused(run, no_training, precision):
    with pytest.raises(ValueError, match=f"{precision}.*bf16-mixed"):
        run("fit", *DEMO, "--trainer.precision", precision)


def test_missing_checkpoint_is_an_error_that_lists_those_beside_it(run, trained, no_training):
    path = run_directory(trained) / "checkpoints/lst.ckpt"
    with pytest.raises(ValueError, match=r"lst\.ckpt' does not exist.*last\.ckpt"):
        run("fit", *DEMO, "--ckpt_path", str(path))


@pytest.mark.parametrize("command", ["test", "predict", "validate"])
def test_command_that_needs_an_adapter_says_so_in_one_line(run, monkeypatch, capsys, command, tmp_path):
    monkeypatch.setattr(
        AdaptationModule, f"{'validation' if command == 'validate' else command}_step", lambda *_: pytest.fail("it went on")
    )
    with pytest.raises(ValueError) as caught:
        run(command, *DEMO)
    line = str(user_error(caught.value))
    assert line.startswith(f"{command} needs a trained adapter: give --model.adapter_path DIR")
    assert "\n" not in line
    assert list(tmp_path.rglob("*.csv")) == []


@pytest.mark.parametrize("command", ["test", "predict"])
def test_zero_shot_head_needs_no_adapter(run, command, tmp_path):
    cli = run(command, *DEMO, *SMOKE, "--model.task.init_args.head", "zero_shot")
    assert cli.model._stored is None
    if command == "test":
        assert set(cli.trainer.callback_metrics) >= {"test/accuracy", "test/loss"}
    else:
        assert len(list(tmp_path.rglob("predictions_partial.csv"))) == 1


def caught(function, *args):
    with pytest.raises((ValueError, RuntimeError)) as error:
        function(*args)
    return error.value


def test_error_that_torch_raises_below_a_line_of_ours_is_no_mistake_of_the_user():
    layer = build_layer(nn.Linear(16, 16), FourierMoEConfig(targets=["q_proj"], num_coefficients=16, num_experts=2), "q_proj")
    error = caught(layer, torch.zeros(3, 7))
    files = [entry.filename for entry in traceback.extract_tb(error.__traceback__)]
    assert any("fourier_moe/spectral/layer.py" in file for file in files)
    assert user_error(error) is None


def test_error_of_ours_is_a_mistake_of_the_user_through_whatever_was_raised_from_it():
    ours = caught(lambda: FourierMoEConfig(targets=[], num_coefficients=16))
    assert user_error(ours) is ours

    def raised_from(cause):
        raise RuntimeError("instantiation failed") from cause

    wrapped = caught(raised_from, caught(raised_from, ours))
    assert user_error(wrapped) is ours
    foreign = caught(int, "x")
    assert user_error(caught(raised_from, foreign)) is None
    assert user_error(caught(raised_from, ValueError("never raised"))) is None
    assert user_error(ValueError("never raised")) is None
    assert user_error(None) is None


def test_error_that_ours_was_raised_from_is_not_the_one_shown(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"\1" + bytes(7) + b"{")
    error = caught(describe_adapter, tmp_path)
    assert isinstance(error.__cause__, json.JSONDecodeError)
    assert user_error(error) is error
    layer = caught(
        inject, nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), FourierMoEConfig(targets=["q_proj"], num_coefficients=64)
    )
    assert str(user_error(layer)).startswith("q_proj: num_coefficients asks for")


@pytest.mark.slow
def test_missing_adapter_is_one_line_and_no_traceback_in_the_real_process(tmp_path):
    command = [sys.executable, "train.py", "test", *DEMO, "--model.adapter_path", str(tmp_path / "nowhere")]
    save_dir = ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": HANGS_AFTER, "check": False}
    done = subprocess.run([*command, *save_dir], **options)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"error: no adapter in {tmp_path / 'nowhere'}: adapter.safetensors not found")
