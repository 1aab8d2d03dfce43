"""SIGTERM, SIGINT and SLURM's signal: a checkpoint, the command to resume, an exit status."""

import os
import pty
import re
import shlex
import signal
import sys

import lightning as L
import pytest
import torch
from support import REPOSITORY
from support.killed_runs import At, fit, forked, in_process, in_two_processes, same

import train
from lightning_modules import AdaptationModule
from lightning_modules.interruption import GracefulStop, read_checkpoint
from lightning_modules.strategies.sharding import ShardedBaseStrategy


def signaled(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("hook", "count", "number", "step"),
    [
        ("on_after_backward", 5, signal.SIGINT, 2),  # one during accumulation
        ("on_validation_batch_start", 1, signal.SIGTERM, 1),  # validation, during accumulation
        ("on_validation_batch_start", 3, signal.SIGTERM, 3),  # validation, the second of the epoch
        ("on_after_backward", 4, signal.SIGHUP, 2),  # a closed terminal
    ],
)
def test_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on_to_the_same_bits(
    tmp_path, straight, hook, count, number, step
):
    status, outcome = in_process(tmp_path, At(hook, count, signaled(number)))
    log = (tmp_path / "log.txt").read_text()
    assert status == 128 + number, log
    assert f"{number.name} ended the run at step {step}. Checkpoint: {tmp_path / 'interrupted.ckpt'}" in log
    assert f"the same command with --ckpt_path {tmp_path / 'interrupted.ckpt'}" in log
    assert read_checkpoint(tmp_path / "interrupted.ckpt")["global_step"] == step
    status, outcome = in_process(tmp_path)
    assert status == 0
    assert same(torch.load(outcome), straight)


def test_second_ctrl_c_ends_at_once(tmp_path):
    def twice():
        signaled(signal.SIGINT)()
        signaled(signal.SIGINT)()
        pytest.fail("it went on")

    status, _ = in_process(tmp_path, At("on_after_backward", 2, twice))
    assert status == 1
    assert not (tmp_path / "interrupted.ckpt").exists()


def test_hang_up_that_nohup_ignores_stays_ignored(tmp_path):
    def child():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        fit(tmp_path, At("on_after_backward", 2, signaled(signal.SIGHUP)), max_steps=2)

    assert forked(child, tmp_path / "log.txt") == 0, (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "interrupted.ckpt").exists()


def test_run_whose_terminal_has_gone_writes_its_checkpoint_though_it_cannot_print(tmp_path):
    """A terminal that takes nothing more makes every line of a progress bar an error."""

    def child():
        master, terminal = pty.openpty()
        for descriptor in (1, 2):
            os.dup2(terminal, descriptor)
        os.close(terminal)

        def hang_up():
            os.close(master)  # from now on the terminal answers EIO
            signaled(signal.SIGHUP)()

        fit(tmp_path, At("on_after_backward", 3, hang_up), enable_progress_bar=True)

    assert forked(child, tmp_path / "log.txt") == 128 + signal.SIGHUP
    assert read_checkpoint(tmp_path / "interrupted.ckpt")["global_step"] == 1


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    class Trainer:
        received_sigterm = False
        _accelerator_connector = type("connector", (), {"cluster_environment": None})

    for end in ("on_train_end", "on_exception"):
        callback = GracefulStop()
        callback.on_train_start(Trainer(), None)
        assert signal.getsignal(signal.SIGTERM) == callback._note
        getattr(callback, end)(*[None] * (2 if end == "on_train_end" else 3))
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_command_line_names_the_command_that_resumes_and_it_works(tmp_path, monkeypatch):
    """The real process's whole way: config, logger, exit status, and the printed line run as it stands."""
    monkeypatch.chdir(REPOSITORY)
    words = ["fit", "--config", "configs/demo.yaml", "--trainer.max_steps", "4", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.limit_val_batches", "0"]
    hook = At("on_before_backward", 2, signaled(signal.SIGTERM))

    def child():
        configure = AdaptationModule.configure_callbacks
        AdaptationModule.configure_callbacks = lambda self: [*configure(self), hook]
        train.main(words)

    assert forked(child, tmp_path / "log.txt") == 128 + signal.SIGTERM
    log = (tmp_path / "log.txt").read_text()
    command = re.search(r"^Resume: python (train\.py fit .*)$", log, re.MULTILINE)
    assert command is not None, log
    assert "step 2" in log
    again = shlex.split(command[1])[1:]
    assert forked(lambda: train.main(again), tmp_path / "again.txt") == 0, (tmp_path / "again.txt").read_text()
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["version_0"]
    assert (tmp_path / "demo/version_0/adapter_last").is_dir()


REQUEUE = """
import os, sys
open(os.environ["CALLS"], "a").write(" ".join(sys.argv[1:]) + chr(10))
"""


def test_slurm_s_signal_checkpoints_and_requeues_the_job(tmp_path, monkeypatch):
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!{sys.executable}\n{REQUEUE}")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name, value in {"NTASKS": "1", "JOB_NAME": "job", "JOB_ID": "77", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    status, _ = in_process(tmp_path / "run", At("on_after_backward", 3, signaled(signal.SIGUSR1)), devices=1)
    assert status == 128 + signal.SIGUSR1, (tmp_path / "run/log.txt").read_text()
    assert (tmp_path / "calls").read_text() == "requeue 77\n"
    assert (tmp_path / "run/interrupted.ckpt").is_file()


def test_run_without_checkpoints_says_that_none_was_written(tmp_path):
    class NoCheckpoints(L.Callback):
        def setup(self, trainer, *_, **__):
            trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, L.pytorch.callbacks.Checkpoint)]

    status, _ = in_process(tmp_path, NoCheckpoints(), At("on_after_backward", 2, signaled(signal.SIGTERM)))
    assert status == 128 + signal.SIGTERM
    assert list(tmp_path.glob("*.ckpt")) == []


def test_signal_to_one_of_two_processes_ends_both_at_one_step_and_both_go_on_with_their_own_random_numbers(tmp_path):
    """The interrupted run sharded, during accumulation, and resumed with copies."""
    statuses, outcome = in_two_processes(tmp_path / "straight", max_epochs=1)
    assert statuses == [0, 0], (tmp_path / "straight/log_0.txt").read_text()
    straight = torch.load(outcome)
    run, hook = tmp_path / "run", At("on_after_backward", 3, signaled(signal.SIGTERM))
    statuses, outcome = in_two_processes(run, hook, max_epochs=1, strategy=ShardedBaseStrategy())
    assert statuses == [128 + signal.SIGTERM] * 2, (run / "log_0.txt").read_text()
    states = read_checkpoint(run / "interrupted.ckpt")["random_states"]["states"]
    assert len(states) == 2
    assert not states[0]["torch"].equal(states[1]["torch"])  # or both would drop the same activations
    statuses, outcome = in_two_processes(run, max_epochs=1)
    assert statuses == [0, 0], (run / "log_0.txt").read_text()
    assert same(torch.load(outcome), straight)
