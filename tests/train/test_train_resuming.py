"""train.py with checkpoints: runs that go on, and checkpoints that do not fit."""

import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import REPOSITORY
from support.commands import DEMO, FULL, HEAD_ONLY, run_directory
from torch.utils.data import DataLoader

from datamodules import ImageDataModule
from fourier_moe import adapter_state_dict
from lightning_modules import AdaptationModule

EXPERTS_LR = "--model.optimization.experts.lr"
STEPS = 6  # 90 training images in batches of 16


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


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [(), HEAD_ONLY, FULL], ids=["FourierMoE", "HeadOnly", "FullFineTuning"])
def test_resumed_run_continues_in_its_directory_to_the_weights_of_an_uninterrupted_one(run, monkeypatch, tmp_path, overlay):
    seen = []
    monkeypatch.setattr(AdaptationModule, "on_train_batch_start", lambda _, batch, index: seen.append(batch["id"]))
    words = (*DEMO, *overlay, "--trainer.max_epochs", "3", "--model.optimization.warmup_ratio", "0.5")
    words += (
        "--data.init_args.validation_fraction",
        "0.9",
        "--data.init_args.batch_size",
        "16",
        "--trainer.limit_val_batches",
        "1",
    )
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


@pytest.mark.slow
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
        ValueError, match=r"checkpoint was trained on 10 classes \(0, 1, 2 and 7 more\), this run has 4 \(blue, green"
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
    message = r"checkpoint was trained on 10 classes \(1, 0, 2 .*this run has 10 \(0, 1, 2 .*order must be the same"
    with pytest.raises(ValueError, match=message):
        run(command, *DEMO, "--ckpt_path", permuted)


def test_checkpoint_of_other_weights_under_the_same_name_is_refused(run, trained, tmp_path, no_training):
    words = tower(tmp_path, lambda tensor: 1.1 * tensor)
    with pytest.raises(ValueError, match=r"backbone 'digits_vit/digits_vit\.safetensors', with other weights"):
        run("fit", *DEMO, *words, "--ckpt_path", str(run_directory(trained) / "checkpoints/last.ckpt"))
    with pytest.raises(ValueError, match=r"backbone 'digits_vit/digits_vit\.safetensors', with other weights"):
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
    with pytest.raises(ValueError, match="was not written by this trainer"):
        run("fit", *DEMO, "--ckpt_path", str(tmp_path / "foreign.ckpt"))


def test_hyper_parameters_in_a_checkpoint_do_not_win_over_the_command(run, trained, tmp_path):
    """Lightning takes arguments from there silently."""
    checkpoint = torch.load(run_directory(trained) / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"adapter_path": str(tmp_path / "elsewhere")}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    words = ("--ckpt_path", str(tmp_path / "other.ckpt"), "--trainer.limit_test_batches", "1")
    assert run("test", *DEMO, *words).model.adapter_path is None


def test_checkpoint_holds_what_is_trained_and_its_optimizer_state_and_no_frozen_weight(trained):
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
