"""Small training runs in processes of their own, which kill themselves where they are told to."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import stat
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import ImageDataModule
from datamodules.images.benchmarks import BENCHMARKS
from fourier_moe import FourierMoEConfig
from lightning_modules import AdaptationModule
from lightning_modules.interruption import CheckedCheckpointIO, newest_intact
from lightning_modules.optimization import Optimization, ParameterGroup
from lightning_modules.tasks import ImageClassification
from support import REPOSITORY

TOWER = REPOSITORY / "examples/digits_tower"
BENCHMARKS["digits"].open("digits")  # once for all children
HOOKS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
]
RARE = {"on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_validation_start", "on_validation_end"}
INSIDE = ["step", "half written", "before the move", "after the move"]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class At(L.Callback):
    """Do something the n-th time a hook is called."""

    def __init__(self, hook: str, count: int, action: Callable[[], None] = kill) -> None:
        self.hook, self.count, self.action = hook, count, action
        if hook in HOOKS:
            setattr(self, hook, self._called)

    def _called(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.count -= 1
        if self.count == 0:
            self.action()

    def patch(self) -> None:
        """Arrange for a kill inside the optimizer's step or the writing of a file; in the process that is to die."""
        adamw, fsync, replace = torch.optim.AdamW.step, os.fsync, os.replace
        due = self

        def half_a_step(optimizer: Any, closure: Any = None) -> Any:
            due.count -= 1
            if due.count == 0:
                closure()
                with torch.no_grad():
                    optimizer.param_groups[0]["params"][0].add_(1.0)
                kill()
            return adamw(optimizer, closure)

        def half_a_file(descriptor: int) -> None:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            due.count -= due.hook == "half written" and is_file
            if due.count == 0 and is_file:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                kill()
            fsync(descriptor)

        def move(source: Any, target: Any) -> None:
            due.count -= due.hook.endswith("move")
            if due.count == 0 and due.hook == "before the move":
                kill()
            replace(source, target)
            if due.count == 0:
                kill()

        if self.hook == "step":
            torch.optim.AdamW.step = half_a_step  # type: ignore[method-assign]
        if self.hook in INSIDE[1:]:
            os.fsync, os.replace = half_a_file, move


def moments(number: int, seed: int) -> list[At]:
    """`number` moments, drawn at random: which hook, and which call of it (of those that every run comes to, if it is long)."""
    draw = random.Random(seed)
    hooks = [draw.choice(HOOKS + INSIDE) for _ in range(number)]
    return [At(hook, draw.randint(1, 1 if hook in RARE else 6)) for hook in hooks]


def fit(directory: Path, *callbacks: L.Callback, resume: Path | None = None, **options: Any) -> L.Trainer:
    """Train the digits' tower for 2 epochs of 7 batches with dropout, crops, workers, accumulation and validation."""
    data = {"num_workers": options.pop("num_workers", 1), "batch_size": options.pop("batch_size", 16)}
    newest = ModelCheckpoint(directory, filename="newest", every_n_train_steps=1)
    more = [] if options.pop("without_newest", False) else [newest]
    L.seed_everything(options.pop("seed", 0), workers=True, verbose=False)
    module = AdaptationModule(
        ImageClassification(str(TOWER / "digits_vit.json"), str(TOWER / "digits_vit.safetensors")),
        FourierMoEConfig(targets=["q_proj", "v_proj"], num_coefficients=64, num_experts=4, dropout=0.2, scaling="relative"),
        Optimization(ParameterGroup(0.05), head=ParameterGroup(0.01)),
        num_classes=10,
    )
    defaults = {"max_epochs": 2, "limit_train_batches": 7, "limit_val_batches": 2, "val_check_interval": 3}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(
        accelerator="cpu",
        plugins=[CheckedCheckpointIO()],
        callbacks=[
            ModelCheckpoint(directory, monitor="val/accuracy", mode="max", save_last=True),
            *more,
            *callbacks,
        ],
        **{**defaults, "accumulate_grad_batches": 2, **quiet, **options},  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=ImageDataModule("digits", image_size=8, **data), ckpt_path=resume)
    return trainer


def result(trainer: L.Trainer) -> dict[str, Any]:
    """What has to be the same: trained weights, the optimizer's and the schedule's state, the number of steps."""
    model = trainer.lightning_module
    return {
        "weights": {name: value.detach() for name, value in model.named_parameters() if value.requires_grad},
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "rates": trainer.lr_scheduler_configs[0].scheduler.get_last_lr(),
        "steps": trainer.global_step,
    }


def same(one: Any, other: Any) -> bool:
    """Equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def forked(function: Callable[[], Any], log: Path) -> int:
    """Run a function in a child; its exit status, or minus the signal that ended it. What it prints goes to `log`."""
    return ended(start(function, log))


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(function: Callable[[], Any], log: Path) -> int:
    sys.stdout.flush(), sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks of processes with threads
        child = os.fork()
    if child == 0:
        status = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            warnings.simplefilter("ignore")
            for number in (signal.SIGINT, signal.SIGHUP):  # which a test run in the background ignores
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            for name in (None, "lightning.pytorch", "lightning.fabric", "lightning"):
                for handler in logging.getLogger(name).handlers:
                    if isinstance(handler, logging.StreamHandler):
                        handler.setStream(sys.stderr)
            function()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return child


def in_process(directory: Path, *callbacks: L.Callback, **options: Any) -> tuple[int, Path]:
    """`fit` in a child, from the newest intact checkpoint there is: its status, and the file of its result."""
    directory.mkdir(exist_ok=True)
    outcome = directory / "result.pt"

    def child() -> None:
        for callback in callbacks:
            if isinstance(callback, At):
                callback.patch()
        resume, _ = newest_intact(directory)
        torch.save(result(fit(directory, *callbacks, resume=resume, **options)), outcome)

    return forked(child, directory / "log.txt"), outcome


def in_two_processes(directory: Path, *of_second: L.Callback, **options: Any) -> tuple[list[int], Path]:
    """`fit` in two children, with DDP unless `strategy` says otherwise; the callbacks are the second's."""
    directory.mkdir(exist_ok=True)
    outcome = directory / "result.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    resume, _ = newest_intact(directory)

    def child(rank: int) -> None:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        callbacks = of_second if rank else ()
        trainer = fit(directory, *callbacks, resume=resume, **{"strategy": "ddp", "devices": 2, "num_workers": 0, **options})
        if rank == 0:
            torch.save(result(trainer), outcome)

    children = [start(partial(child, rank), directory / f"log_{rank}.txt") for rank in range(2)]
    return [ended(one) for one in children], outcome


def killed_again_and_again(directory: Path, when: list[At], **options: Any) -> tuple[Path, int]:
    """A run that is killed at each of these moments, if it lives to see it, and resumed each time; how often it died."""
    deaths = 0
    for moment in when:
        status, outcome = in_process(directory, moment, **options)
        deaths += status == -signal.SIGKILL
        if status == 0:
            return outcome, deaths
        assert status == -signal.SIGKILL, (directory / "log.txt").read_text()
    status, outcome = in_process(directory, **options)
    assert status == 0, (directory / "log.txt").read_text()
    return outcome, deaths


if __name__ == "__main__":  # python tests/support/killed_runs.py [KILLS] [SEED]
    import tempfile

    torch.set_num_threads(1)
    kills, seed = (int(word) for word in (*sys.argv[1:], "20", "0")[:2])
    root, epochs = Path(tempfile.mkdtemp()), 8 + kills // 2
    _, expected = in_process(root / "straight", max_epochs=epochs)
    outcome_file, times = killed_again_and_again(root / "run", moments(kills, seed), max_epochs=epochs)
    equal = same(torch.load(outcome_file), torch.load(expected))
    steps = torch.load(expected)["steps"]
    print(f"{steps} steps, killed {times} times: {'the same bits' if equal else 'DIFFERENT'}")
    sys.exit(0 if equal and times == kills else 1)
