"""The commands of train.py, in this process, on the demo."""

import copy
import json
import math
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

import datamodules.images.data_module
import lightning_modules.adaptation
import train
from datamodules import ImageDataModule
from datamodules.images.transforms import eval_transform
from fourier_moe import FourierMoEConfig, HeadOnly, adapter_state_dict, adapters, describe_adapter, inject
from lightning_modules import AdaptationModule
from lightning_modules.cli import AdaptationCLI, user_mistake

REPOSITORY = Path(__file__).parent.parent
DEMO = ("--config", "configs/demo.yaml")
SMOKE = ("--config", "configs/smoke.yaml")
HEAD_ONLY = ("--config", "configs/adapters/head_only.yaml")
FULL = ("--config", "configs/adapters/full_fine_tuning_small.yaml")
EXPERTS_LR = "--model.optimization.experts.lr"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The demo after one epoch of 3 steps: the CLI, for tests that only look."""
    directory = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", ["train.py"])
        words = ["--trainer.logger.init_args.save_dir", str(directory), "--trainer.enable_progress_bar", "false"]
        return train.main(["fit", *DEMO, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", *words])


@pytest.fixture
def snapshots(monkeypatch):
    """State dicts of the modules that are built in this test, as configure_model left them."""
    states = []
    configure_model = AdaptationModule.configure_model

    def wrapped(self):
        first = self.task.model is None
        configure_model(self)
        if first:
            states.append({key: value.clone() for key, value in self.state_dict().items()})

    monkeypatch.setattr(AdaptationModule, "configure_model", wrapped)
    return states


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(AdaptationModule, "training_step", lambda *_: pytest.fail("training began"))


STEPS = 26  # 808 training images of the demo in batches of 32


def run_directory(cli):
    return Path(cli.trainer.log_dir)


# ---------------------------------------------------------------- mistakes


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
    line = str(user_mistake(caught.value))
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
        assert len(list(tmp_path.rglob("predictions.csv"))) == 1


def caught(function, *args):
    with pytest.raises((ValueError, RuntimeError)) as error:
        function(*args)
    return error.value


def test_error_that_torch_raises_below_a_line_of_ours_is_no_mistake_of_the_user():
    layer = FourierMoEConfig(targets=["q_proj"], num_coefficients=16, num_experts=2).build_layer(nn.Linear(16, 16), "q_proj")
    error = caught(layer, torch.zeros(3, 7))
    files = [entry.filename for entry in traceback.extract_tb(error.__traceback__)]
    assert any("fourier_moe/linear.py" in file for file in files)
    assert user_mistake(error) is None


def test_error_of_ours_is_a_mistake_of_the_user_through_whatever_was_raised_from_it():
    ours = caught(lambda: FourierMoEConfig(targets=[], num_coefficients=16))
    assert user_mistake(ours) is ours

    def raised_from(cause):
        raise RuntimeError("instantiation failed") from cause

    wrapped = caught(raised_from, caught(raised_from, ours))
    assert user_mistake(wrapped) is ours
    foreign = caught(int, "x")
    assert user_mistake(caught(raised_from, foreign)) is None
    assert user_mistake(caught(raised_from, ValueError("never raised"))) is None
    assert user_mistake(ValueError("never raised")) is None
    assert user_mistake(None) is None


def test_error_that_ours_was_raised_from_is_not_the_one_shown(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"\1" + bytes(7) + b"{")
    error = caught(describe_adapter, tmp_path)
    assert isinstance(error.__cause__, json.JSONDecodeError)
    assert user_mistake(error) is error
    layer = caught(
        inject, nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), FourierMoEConfig(targets=["q_proj"], num_coefficients=64)
    )
    assert str(user_mistake(layer)).startswith("q_proj: num_coefficients asks for")


def test_missing_adapter_is_one_line_and_no_traceback_in_the_real_process(tmp_path):
    command = [sys.executable, "train.py", "test", *DEMO, "--model.adapter_path", str(tmp_path / "nowhere")]
    save_dir = ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    done = subprocess.run([*command, *save_dir], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"error: no adapter in {tmp_path / 'nowhere'}: adapter.safetensors not found")


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("overlay", "kinds"),
    [
        ((), {"experts.coefficients", "router.weight", "head.weight", "head.bias"}),
        (("--trainer.precision", "bf16-mixed"), {"experts.coefficients", "router.weight", "head.weight", "head.bias"}),
        (HEAD_ONLY, {"head.weight", "head.bias"}),
    ],
    ids=["FourierMoE", "FourierMoE-bf16", "HeadOnly"],
)
def test_training_changes_what_the_method_trains_and_no_other_tensor_by_a_bit(run, snapshots, overlay, kinds):
    cli = run("fit", *DEMO, *overlay, "--trainer.max_steps", "3")
    before, after = snapshots[0], cli.model.state_dict()
    assert cli.trainer.global_step == 3
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.endswith(tuple(kinds))}
    assert changed == {name for name, parameter in cli.model.named_parameters() if parameter.requires_grad}
    assert all(after[key].dtype == torch.float32 for key in changed)
    assert sum(after[key].numel() for key in changed) == cli.model.report.total


def test_full_fine_tuning_changes_every_tensor(run, snapshots):
    cli = run("fit", *DEMO, *FULL, "--trainer.max_steps", "3")
    before, after = snapshots[0], cli.model.state_dict()
    assert {key for key in before if torch.equal(before[key], after[key])} == set()
    assert cli.model.report.frozen == 0


def test_zero_initialised_adapter_gives_the_outputs_of_the_model_before_injection(run, monkeypatch):
    originals = []
    inject = lightning_modules.adaptation.inject

    def remember(model, config):
        originals.append(copy.deepcopy(model))
        return inject(model, config)

    monkeypatch.setattr(lightning_modules.adaptation, "inject", remember)
    cli = AdaptationCLI([*DEMO], run=False)
    cli.datamodule.setup("fit")
    cli.model.configure_model()
    assert len(adapters(cli.model.model)) == 8
    (original,), adapted = originals, cli.model.model.eval()
    original.eval()
    for batch in cli.datamodule.val_dataloader():
        with torch.no_grad():
            torch.testing.assert_close(adapted(batch["image"]), original(batch["image"]), rtol=0, atol=1e-5)


def test_same_seed_gives_the_same_images_in_the_same_order_whatever_the_adapter(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        AdaptationModule, "on_train_batch_start", lambda self, batch, index: seen[-1].append((batch["id"], batch["image"]))
    )

    def images(*words):
        seen.append([])
        run("fit", *DEMO, "--trainer.max_steps", "3", *words)
        return [id_ for ids, _ in seen[-1] for id_ in ids], torch.cat([image for _, image in seen[-1]])

    own_ids, own_images = images()
    for overlay in (HEAD_ONLY, FULL):
        ids, pixels = images(*overlay)
        assert ids == own_ids
        assert torch.equal(pixels, own_images)
    other_ids, _ = images("--seed_everything", "1")
    assert len(other_ids) == len(own_ids) == 96
    assert other_ids != own_ids


# ---------------------------------------------------------------- resuming


@pytest.fixture
def no_augmentation(monkeypatch):
    """Without worker processes the crops come from torch's global generator, which a checkpoint does not keep."""
    monkeypatch.setattr(datamodules.images.data_module, "train_transform", eval_transform)


@pytest.fixture
def few_images(monkeypatch):
    """Train on the validation images, 3 steps an epoch."""

    def train_dataloader(self):
        return DataLoader(self.val_dataloader().dataset, batch_size=32)

    monkeypatch.setattr(ImageDataModule, "train_dataloader", train_dataloader)


@pytest.fixture
def rates(monkeypatch):
    """Learning rates by group, before each step of the runs in this test."""
    steps = []

    def record(self, batch, index):
        steps.append({group["name"]: group["lr"] for group in self.optimizers().param_groups})

    monkeypatch.setattr(AdaptationModule, "on_train_batch_start", record)
    return steps


class PowerCutError(Exception):
    pass


def interrupted(run, monkeypatch, *words, epoch=1):
    """A run that dies at the start of an epoch."""

    def power_cut(self):
        if self.current_epoch == epoch:
            raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(AdaptationModule, "on_train_epoch_start", power_cut)
        with pytest.raises(PowerCutError):
            run("fit", *words, "--trainer.logger.init_args.version", "7")


@pytest.mark.parametrize("overlay", [(), HEAD_ONLY, FULL], ids=["FourierMoE", "HeadOnly", "FullFineTuning"])
def test_resumed_run_continues_in_its_directory_to_the_weights_of_an_uninterrupted_one(
    run, monkeypatch, tmp_path, no_augmentation, overlay
):
    seen = []
    monkeypatch.setattr(AdaptationModule, "on_train_batch_start", lambda _, batch, index: seen.append(batch["id"]))
    words = (*DEMO, *overlay, "--trainer.max_epochs", "3", "--model.optimization.warmup_ratio", "0.5")
    straight = run("fit", *words, "--trainer.logger.init_args.version", "6")
    straight_order, seen[:] = list(seen), []
    interrupted(run, monkeypatch, *words, epoch=2)
    directory = tmp_path / "demo/version_7"
    checkpoint = directory / "checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2 * STEPS == len(seen)
    resumed = run("fit", *words, "--trainer.logger.init_args.version", "7", "--ckpt_path", str(checkpoint))

    assert run_directory(resumed) == directory
    assert resumed.trainer.global_step == straight.trainer.global_step == 3 * STEPS
    assert seen == straight_order  # first the interrupted run's, then the resumed one's
    epochs = [[id_ for ids in seen[epoch * STEPS : (epoch + 1) * STEPS] for id_ in ids] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    ours, theirs = adapter_state_dict(resumed.model.model), adapter_state_dict(straight.model.model)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    trained = {name for name, parameter in straight.model.model.named_parameters() if parameter.requires_grad}
    assert trained <= ours.keys()
    moments, their_moments = (cli.trainer.optimizers[0].state_dict()["state"] for cli in (resumed, straight))
    assert all(torch.equal(moments[i][name], their_moments[i][name]) for i in moments for name in ("exp_avg", "exp_avg_sq"))
    assert (directory / "adapter_last/adapter.safetensors").is_file()
    assert len(list(directory.glob("events.out.tfevents.*"))) == 2


def test_learning_rates_of_the_command_win_over_the_checkpoints_at_every_step(run, monkeypatch, few_images, rates, tmp_path):
    words = (*DEMO, "--trainer.max_epochs", "3", "--model.optimization.warmup_ratio", "0.6")
    new = (EXPERTS_LR, "0.5", "--model.optimization.head.lr", "0.03", "--model.optimization.router.weight_decay", "0.1")
    run("fit", *words, *new)
    straight, rates[:] = list(rates), []
    interrupted(run, monkeypatch, *words, "--model.optimization.head.lr", "0")
    assert [step["head"] for step in rates] == [0, 0, 0]
    rates.clear()
    last = ("--trainer.logger.init_args.version", "7", "--ckpt_path", str(tmp_path / "demo/version_7/checkpoints/last.ckpt"))
    resumed = run("fit", *words, *new, *last)

    warmup = 6  # ceil(0.6 * 9): the run was cut in the warm-up, and goes on through the cosine
    assert [step["experts"] for step in straight[:warmup]] == pytest.approx([0.5 * step / warmup for step in range(warmup)])
    assert straight[warmup]["experts"] == pytest.approx(0.5)
    assert straight[-1]["experts"] < 0.2
    assert len(rates) == 6
    for step, expected in zip(rates, straight[3:], strict=True):
        assert step == pytest.approx(expected, rel=1e-9)
    groups = {group["name"]: group for group in resumed.trainer.optimizers[0].param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"experts": 0, "router": 0.1, "head": 0}
    assert {name: group["initial_lr"] for name, group in groups.items()} == {"experts": 0.5, "router": 1e-3, "head": 0.03}
    saved = yaml.safe_load((run_directory(resumed) / "config.yaml").read_text())
    assert saved["model"]["optimization"]["experts"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--model.task.init_args.pretrained", "null"),
            r"checkpoint was trained on backbone 'digits_vit/digits_vit\.safetensors', this model is 'digits_vit/untrained'",
        ),
        (("--model.adapter.init_args.num_coefficients", "256"), "differ in num_coefficients: 512 against 256"),
        (HEAD_ONLY, "differ in method: FourierMoEConfig against HeadOnly"),
    ],
    ids=["backbone", "coefficients", "method"],
)
def test_checkpoint_of_another_run_is_refused(run, trained, no_training, words, message):
    checkpoint = run_directory(trained) / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=message):
        run("fit", *DEMO, *words, "--ckpt_path", str(checkpoint))


def test_checkpoint_with_other_classes_is_refused(run, trained, no_training):
    words = ("--data.init_args.synthetic", "true", "--ckpt_path", str(run_directory(trained) / "checkpoints/last.ckpt"))
    with pytest.raises(
        ValueError, match=r"checkpoint was trained on 10 classes \(0, 1, 2, \.\.\.\), this run has 4 \(blue, green"
    ):
        run("fit", *DEMO, *words)


@pytest.fixture
def permuted(trained, tmp_path):
    """The trained checkpoint, as if the first two of its classes had stood the other way around."""
    checkpoint = torch.load(run_directory(trained) / "checkpoints/last.ckpt", weights_only=True)
    names = checkpoint["adaptation"]["class_names"]
    assert names == [str(digit) for digit in range(10)]
    checkpoint["adaptation"]["class_names"] = [names[1], names[0], *names[2:]]
    torch.save(checkpoint, tmp_path / "permuted.ckpt")
    return str(tmp_path / "permuted.ckpt")


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_checkpoint_with_the_same_classes_in_another_order_is_refused(run, permuted, command, no_training):
    message = r"checkpoint was trained on 10 classes \(1, 0, 2, .*this run has 10 \(0, 1, 2, .*order must be the same"
    with pytest.raises(ValueError, match=message):
        run(command, *DEMO, "--ckpt_path", permuted)


def test_checkpoint_of_other_weights_under_the_same_name_is_refused(run, trained, tmp_path, no_training):
    words = tower(tmp_path, lambda tensor: 1.1 * tensor)
    with pytest.raises(ValueError, match=r"backbone 'digits_vit/digits_vit\.safetensors', whose weights are others"):
        run("fit", *DEMO, *words, "--ckpt_path", str(run_directory(trained) / "checkpoints/last.ckpt"))
    with pytest.raises(ValueError, match=r"backbone 'digits_vit/digits_vit\.safetensors', whose weights are others"):
        run("test", *DEMO, *words, "--model.adapter_path", str(run_directory(trained) / "adapter_last"))


def test_checkpoint_of_the_same_weights_under_another_name_tests(run, trained, tmp_path):
    words = (*tower(tmp_path, lambda tensor: tensor, "renamed.safetensors"), "--trainer.limit_test_batches", "1")
    losses = [
        run("test", *DEMO, *words, *path).trainer.callback_metrics["test/loss"]
        for path in (
            ("--ckpt_path", str(run_directory(trained) / "checkpoints/last.ckpt")),
            ("--model.adapter_path", str(run_directory(trained) / "adapter_last")),
        )
    ]
    assert losses[0] == losses[1]


def tower(directory, change, name="digits_vit.safetensors"):
    """Options for the demo's tower with changed weights."""
    state = load_file(REPOSITORY / "examples/digits_tower/digits_vit.safetensors")
    (directory / "towers").mkdir()
    save_file({key: change(tensor) for key, tensor in state.items()}, directory / "towers" / name)
    return ("--model.task.init_args.pretrained", str(directory / "towers" / name))


def test_checkpoint_of_another_program_is_refused(run, trained, tmp_path, no_training):
    checkpoint = torch.load(run_directory(trained) / "checkpoints/last.ckpt", weights_only=True)
    del checkpoint["adaptation"]
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not written by AdaptationModule"):
        run("fit", *DEMO, "--ckpt_path", str(tmp_path / "foreign.ckpt"))


def test_hyper_parameters_in_a_checkpoint_do_not_win_over_the_command(run, trained, tmp_path):
    """Lightning takes arguments from there without a word."""
    checkpoint = torch.load(run_directory(trained) / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"adapter_path": str(tmp_path / "elsewhere")}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    words = ("--ckpt_path", str(tmp_path / "other.ckpt"), "--trainer.limit_test_batches", "1")
    assert run("test", *DEMO, *words).model.adapter_path is None


def test_checkpoint_holds_what_is_trained_and_its_optimiser_state_and_no_frozen_weight(trained):
    path = run_directory(trained) / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    expected = adapter_state_dict(trained.model.model)
    assert checkpoint["state_dict"].keys() == {f"task.model.{key}" for key in expected}
    assert not [key for key in checkpoint["state_dict"] if ".base." in key]
    assert "hyper_parameters" not in checkpoint
    numbers = 3 * trained.model.report.total  # weights and AdamW's two moments
    assert path.stat().st_size < 4 * numbers + 100_000 < 4 * trained.model.report.frozen


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_tests_like_the_module_it_was_saved_from(run, trained, tmp_path, weights_only):
    path = tmp_path / "saved.ckpt"
    trained.trainer.save_checkpoint(path, weights_only=weights_only)

    def test_loss(*words):
        return run("test", *DEMO, "--trainer.limit_test_batches", "3", *words).trainer.callback_metrics["test/loss"]

    from_checkpoint = test_loss("--ckpt_path", str(path))
    assert from_checkpoint == test_loss("--model.adapter_path", str(run_directory(trained) / "adapter_last"))
    checkpoint = torch.load(path, weights_only=True)
    for key, value in checkpoint["state_dict"].items():
        if ".head." in key:
            value.zero_()
    torch.save(checkpoint, path)
    assert from_checkpoint != test_loss("--ckpt_path", str(path)) == pytest.approx(math.log(10))


# ---------------------------------------------------------------- adapter files and the saved config


def test_adapter_file_keeps_class_names_and_metrics(trained):
    description = describe_adapter(run_directory(trained) / "adapter")
    metrics = trained.trainer.callback_metrics
    assert description.class_names == [str(digit) for digit in range(10)]
    assert description.metrics["val/accuracy"] == float(metrics["val/accuracy"])
    assert {key.partition("/")[0] for key in description.metrics} == {"train", "val"}
    assert description.backbone == "digits_vit/digits_vit.safetensors"


def test_fit_goes_on_from_an_adapter_file(run, trained, snapshots):
    cli = run("fit", *DEMO, "--model.adapter_path", str(run_directory(trained) / "adapter_last"), "--trainer.max_steps", "1")
    expected = adapter_state_dict(trained.model.model)
    assert all(torch.equal(snapshots[0][f"task.model.{key}"], value) for key, value in expected.items())
    assert cli.trainer.global_step == 1


def test_data_with_other_class_names_than_the_adapters_is_refused(run, trained):
    words = ("--data.init_args.synthetic", "true", "--model.adapter_path", str(run_directory(trained) / "adapter"))
    with pytest.raises(
        ValueError, match=r"trained on 10 classes \(0, 1, 2, \.\.\.\), the data has 4 \(blue, green, red, \.\.\.\)"
    ):
        run("test", *DEMO, *words)


def test_predict_names_the_adapters_classes_where_the_source_is_known_for_more(run, tmp_path):
    """An adapter of 4 classes predicts a directory of images for a row of the table of sources that has 196."""
    words = ("--config", "configs/clip_cars.yaml", *SMOKE)
    fitted = run("fit", *words, "--trainer.limit_train_batches", "1")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), (40, 70, 200)).save(tmp_path / "images/car.png")
    data = ("--data.init_args.synthetic", "false", "--data.init_args.predict_directory", str(tmp_path / "images"))
    predicted = run("predict", *words, *data, "--model.adapter_path", str(run_directory(fitted) / "adapter"))
    header, row = (run_directory(predicted) / "predictions.csv").read_text().splitlines()
    assert header == "id,label,prediction,probability,p(blue),p(green),p(red),p(yellow)"
    assert row.startswith("car.png,,")


def test_saved_config_holds_command_line_values_and_runs_again(run, tmp_path):
    fitted = run("fit", *DEMO, *SMOKE, EXPERTS_LR, "0.123", "--seed_everything", "5")
    path = run_directory(fitted) / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    assert saved["model"]["optimization"]["experts"]["lr"] == 0.123
    assert saved["seed_everything"] == 5
    assert saved["trainer"]["limit_train_batches"] == 4
    again = run("fit", "--config", str(path))
    assert again.trainer.log_dir != fitted.trainer.log_dir
    ours, theirs = adapter_state_dict(again.model.model), adapter_state_dict(fitted.model.model)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


ADAPTER_SEED = "--model.adapter.init_args.seed"


@pytest.mark.parametrize(
    ("words", "seed"),
    [
        ((), 0),
        (("--seed_everything", "5"), 5),
        (("--seed_everything", "5", ADAPTER_SEED, "3"), 3),
        ((ADAPTER_SEED, "0", "--seed_everything", "5"), 0),
        (("--seed_everything", "false"), None),
        (("--seed_everything", "false", ADAPTER_SEED, "3"), 3),
    ],
    ids=str,
)
def test_seed_of_the_run_is_the_seed_of_the_adapter_unless_it_has_its_own(main, words, seed):
    cli = AdaptationCLI([*DEMO, *words], run=False)
    assert cli.model.adapter.seed == seed
    cli.model.configure_model()
    layer = adapters(cli.model.model)["backbone.transformer.resblocks.0.attn.q_proj"]
    expected = draw(seed or 0)
    assert torch.equal(layer.experts.frequencies, expected)
    assert not torch.equal(layer.experts.frequencies, draw(seed=77))


def draw(seed):
    settings = FourierMoEConfig(targets=["q_proj"], num_coefficients=512, seed=seed)
    return settings.build_layer(nn.Linear(64, 64), "backbone.transformer.resblocks.0.attn.q_proj").experts.frequencies


def test_seed_everything_true_seeds_the_adapter_with_the_seed_that_lightning_chose(main, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    cli = AdaptationCLI([*DEMO, "--seed_everything", "true"], run=False)
    assert type(cli.model.adapter.seed) is int
    assert cli.model.adapter.seed == cli.config.seed_everything == torch.initial_seed()


def test_methods_without_a_seed_need_none(main):
    cli = AdaptationCLI([*DEMO, *HEAD_ONLY, "--seed_everything", "5"], run=False)
    assert cli.model.adapter == HeadOnly()


def test_head_in_the_config_is_refused(run, no_training):
    with pytest.raises(ValueError, match=r"adapter\.head=\['backbone\.ln_post'\] is the task's to say; remove it"):
        run("fit", *DEMO, "--model.adapter.init_args.head", "[backbone.ln_post]")


def test_fast_dev_run_writes_no_adapter(run, tmp_path, monkeypatch):
    run("fit", *DEMO, "--trainer.fast_dev_run", "true", "--trainer.default_root_dir", str(tmp_path / "root"))
    assert list(tmp_path.rglob("adapter*")) == []
    assert not (REPOSITORY / "adapter_last").exists()
