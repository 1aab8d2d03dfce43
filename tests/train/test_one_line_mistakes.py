"""A mistake on the command line or in a config is one line that names key, value and what is valid, before any model loads."""

import runpy
import signal
import sys
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from support import commands
from support.commands import DEMO

import train


class SGD(torch.optim.SGD):
    """Of the same name as torch's, as bitsandbytes has one."""


TYPO = "trainer.max_epohcs is no option; did you mean --trainer.max_epochs?"


@pytest.fixture
def said(main, capsys, monkeypatch):
    """The line that a command ends with; it writes nothing and loads no model."""
    monkeypatch.setattr("lightning_modules.AdaptationModule.configure_model", lambda *_: pytest.fail("a model was loaded"))

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            train.run([*words])
        assert stop.value.code != 0
        text = (str(stop.value) if isinstance(stop.value.code, str) else capsys.readouterr().err).strip()
        assert text.startswith("error: ")
        assert "\n" not in text
        return text.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--trainer.max_epohcs 1", f"--{TYPO}"),
        ("trainer.max_epochs 1", "trainer.max_epochs is no option; did you mean --trainer.max_epochs?"),
        ("--trainer.max_epoch 1", "--trainer.max_epoch is no option; did you mean --trainer.max_epochs?"),
        ("--seed 1", "--seed is no option"),
        ("--model.adapter.init_args.bandwith 1", "did you mean model.adapter.init_args.bandwidth?"),
        ("--model.optimization.expert.lr 1", "did you mean model.optimization.experts.lr?"),
        ("--model.optimization.experts.learning_rate 1", "ParameterGroup takes lr, weight_decay"),
        ("--data.init_args.batchsize 1", "no option of ImageDataModule; did you mean data.init_args.batch_size?"),
        ("--data datamodules.ImagDataModule", "data=ImagDataModule is no class; did you mean datamodules.ImageDataModule?"),
        ("--model.adapter FourierMoE", "did you mean fourier_moe.FourierMoEConfig?"),
        ("--trainer.logger TensorBordLogger", "did you mean lightning.pytorch.loggers.TensorBoardLogger?"),
        ("--trainer.callbacks+=lightning_modules.callbacks.RouterLod", "did you mean lightning_modules.callbacks.RouterLoad?"),
        ("--model.optimization.experts.lr nan", "model.optimization.experts.lr=nan must be a finite number"),
        ("--model.optimization.router.lr=-1", "optimization.router.lr=-1.0 must be 0 or more"),
        ("--model.optimization.schedule cosin", "must be one of linear, cosine, constant; did you mean cosine?"),
        ("--model.optimization.optimizer torch.optim.SGDD", "did you mean torch.optim.SGD?"),
        ("--model.optimization.optimizer torch.nn.Linear", "optimization.optimizer=torch.nn.Linear is no Optimizer"),
        (
            "--model.optimization.optimizer SGD --model.optimization.optimizer.momentun 0.9",
            "did you mean model.optimization.optimizer.momentum?",
        ),
        ("--model.optimization.optimizer SGD --model.optimization.optimizer.nesterov true", "Nesterov momentum requires"),
        ("--model.optimization.schedule torch.optim.lr_scheduler.StepLR", "schedule.step_size is missing"),
        (
            "--model.optimization.schedule StepLR --model.optimization.schedule.step_size x",
            "step_size=x must be a whole number",
        ),
        ("--model.adapter null", "model.adapter=null: give the class_path"),
        ("--model.adapter.init_args.top_k 1.5", "model.adapter.init_args.top_k=1.5 must be a whole number"),
        ("--model.adapter.init_args.scaling true", "scaling=True must be a finite number or relative"),
        ("--data null", "--data is missing"),
        (
            "--data datamodules.GlueDataModule --data.init_args.dataset cola --data.init_args.synthetic true",
            "ImageClassification needs batches with image, and those of GlueDataModule have input_ids, attention_mask, label;",
        ),
        ("--model.optimization null", "model.optimization is missing"),
        ("--trainer.max_epochs ten", "trainer.max_epochs=ten must be a whole number or null"),
        ("--trainer.max_epochs 0", "trainer.max_epochs=0 would train nothing"),
        ("--trainer.max_steps 0", "trainer.max_steps=0 would train nothing"),
        ("--trainer.limit_train_batches 0", "trainer.limit_train_batches=0 would train nothing"),
        ("--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches=0 must be 1 or more"),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1 must be 0 or more"),
        ("--trainer.val_check_interval 0", "trainer.val_check_interval=0 must be above 0"),
        ("--trainer.accelerator gpuu", "accelerator=gpuu"),
        ("--trainer.accelerator tpu", "accelerator=tpu"),
        ("--trainer.devices 0", "devices=0"),
        ("--trainer.strategy fsdp", "strategy=fsdp"),
        ("--trainer.strategy ddpp", "strategy=ddpp"),
        ("--trainer.max_epochs=-2", "max_epochs=-2"),
        ("--trainer.profiler simpel", "profiler=simpel"),
        ("--seed_everything=-1", "seed_everything=-1 must be between 0 and"),
        ("--ckpt_path best", "ckpt_path='best' is known only within a run"),
    ],
)
def test_argument(said, words, line):
    assert line in said("fit", *DEMO, *words.split())


def test_name_of_two_classes(said, monkeypatch):
    for module in (commands, sys.modules[__name__]):
        one = type("Twice", (torch.optim.SGD,), {"__module__": module.__name__})
        monkeypatch.setattr(module, "Twice", one, raising=False)
    line = said("fit", *DEMO, "--model.optimization.optimizer", "Twice")
    assert "model.optimization.optimizer=Twice is the name of several classes; give one of support.commands.Twice, " in line


def test_data_of_one_class(said, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / split / "cat" / f"{number}.png")
    custom = ("--data.init_args.dataset", "custom", "--data.init_args.directory", str(tmp_path))
    assert said("fit", *DEMO, *custom) == "the data has one class (cat); a classifier needs two"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\x80\x02}q\x00.", "own.yaml: not a text file"),
        (b"trainer:\n  max_epochs: 1\n bad: [1,\n", "own.yaml, line 3: "),
        (b"", "own.yaml is empty"),
        (b"- a\n", "own.yaml is no mapping"),
        (b"trainer: {max_epochs: 1}\ntrainer: {max_steps: 2}\n", "own.yaml, line 2: trainer is given in line 1 already"),
        (b"trainer: {max_epohcs: 1}\n", f"{TYPO} (in "),
    ],
)
def test_config_file_is_named(said, tmp_path, content, line):
    (tmp_path / "own.yaml").write_bytes(content)
    assert line in said("fit", *DEMO, "--config", str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("fit --config configs/dmeo.yaml", "did you mean"),
        ("fit --config configs/smoke.yaml --config configs/clip_cars.yaml", "data.class_path is not given"),
        ("fit", "--model.task is missing; give a --config"),
        ("", "a command is missing; choose from fit,"),
        ("analyze --config configs/demo.yaml --batchs 3", "--batchs is no option; did you mean --batches?"),
        ("compare --config configs/demo.yaml --adapters config --trainer.max_epohcs 1", TYPO),
    ],
)
def test_command(said, words, line):
    assert line in said(*words.split())


def test_interrupt_is_no_traceback(monkeypatch, main):
    monkeypatch.setattr("lightning_modules.commands.main.FrontDoor", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        train.run([])
    assert stop.value.code == 130


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_libraries_load_ends_the_process_at_once(monkeypatch, main):
    seen = []

    class Commands(ModuleType):
        def __getattr__(self, name):
            seen.append((name, signal.getsignal(signal.SIGINT)))
            return lambda: seen.append(("called", signal.getsignal(signal.SIGINT)))

    monkeypatch.setitem(sys.modules, "lightning_modules.commands.main", Commands("main"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        runpy.run_path("train.py", run_name="__main__")
    handlers = {name: handler for name, handler in seen if name in ("main", "run", "called")}
    assert handlers == {"main": signal.SIG_DFL, "run": signal.SIG_DFL, "called": signal.default_int_handler}


def test_checkpoint_that_cannot_be_resumed(said, tmp_path, trained):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    assert "was not written by this trainer" in said("fit", *DEMO, "--ckpt_path", str(tmp_path / "foreign.ckpt"))
    run = trained.trainer.log_dir
    both = ("--ckpt_path", run, "--model.adapter_path", f"{run}/adapter_last")
    assert "give one of them" in said("test", *DEMO, *both)
