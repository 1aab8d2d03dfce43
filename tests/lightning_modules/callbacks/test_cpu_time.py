"""What a run without a GPU is told of its time."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from datamodules import ImageDataModule
from lightning_modules.callbacks.monitoring import cpu_time
from lightning_modules.callbacks.monitoring.cpu_time import StepTime, bound_cpu_time, num_steps, readable_time
from lightning_modules.tasks import ImageClassification, SequenceClassification


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(cpu_time, "rank_zero_info", lines.append)
    return lines


def trainer(**options):
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)


def test_vit_b_32_takes_8_8_gflop_an_image_without_its_weights():
    before = torch.get_rng_state()
    assert ImageClassification().forward_flops() == pytest.approx(8.82e9, rel=1e-3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("bfloat16", "slower"), [(1e10, True), (9e10, False)])
def test_clip_cars_is_told_before_anything_is_fetched(monkeypatch, told, bfloat16, slower):
    rates = iter([bfloat16, 1e11])
    monkeypatch.setattr(cpu_time, "_flops_per_second", lambda _: next(rates))
    bound_cpu_time(
        trainer(max_epochs=280, precision="bf16-mixed"), ImageClassification(), ImageDataModule("cars", batch_size=512)
    )
    days = 4200 * 512 * 2 * 8.8176e9 / bfloat16 / 86400
    assert told[0].startswith(
        f"This run has no GPU: 4,200 steps of 512 take at least {days:.1f} days on this CPU (17.6 GFLOP an"
    )
    assert ("--trainer.precision 32-true is 10 times as fast on this CPU" in told[0]) == slower
    assert "configs/demo.yaml (minutes), or --trainer.max_epochs 1 --data.batch_size 32" in told[0]


def test_a_short_run_and_sizes_that_are_not_known_are_passed_over(monkeypatch, told):
    monkeypatch.setattr(cpu_time, "_flops_per_second", lambda _: pytest.fail("measured"))
    bound_cpu_time(trainer(max_steps=2), ImageClassification(), ImageDataModule("cars", batch_size=32))
    bound_cpu_time(trainer(max_epochs=-1), ImageClassification(), ImageDataModule("cars"))
    bound_cpu_time(trainer(max_epochs=280), SequenceClassification(), ImageDataModule("cars"))
    bound_cpu_time(trainer(max_epochs=280), ImageClassification(), SimpleNamespace())
    assert told == []


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 280}, 4200),
        ({"max_epochs": 280, "max_steps": 7}, 7),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 8),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 14),
        ({"max_epochs": -1}, None),
    ],
)
def test_steps_are_those_of_the_trainer(options, steps):
    assert num_steps(trainer(**options), 15) == steps


def test_time_of_a_step_is_told_once_after_a_warm_up(monkeypatch, told):
    ends = iter([100.0, 105.0, 110.0, 115.0])
    monkeypatch.setattr(cpu_time.time, "monotonic", lambda: next(ends))
    callback = StepTime()
    for step in range(1, 7):
        callback.on_train_batch_end(
            SimpleNamespace(accumulate_grad_batches=2, estimated_stepping_batches=2004, global_step=step // 2)
        )
    assert told == ["A step takes 10.0 s on this CPU (3 batches measured): the 2,002 to go take about 5.6 h, validation aside"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(1800, "30 min"), (5400, "1.5 h"), (47 * 3600, "47.0 h"), (4.4 * 86400, "4.4 days")]
)
def test_times_are_readable(seconds, text):
    assert readable_time(seconds) == text


def test_fit_on_a_cpu_tells_its_time_before_data_are_read(run, monkeypatch):
    def stop(trainer, task, data):
        assert trainer.strategy.root_device.type == "cpu"
        assert data.num_train_examples == 808
        raise KeyError("told")

    monkeypatch.setattr("lightning_modules.cli.bound_cpu_time", stop)
    with pytest.raises(KeyError, match="told"):
        run("fit", "--config", "configs/demo.yaml")
