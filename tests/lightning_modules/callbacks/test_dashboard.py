"""Dashboard and Throughput: what TensorBoard and CSV files get to see."""

import csv
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.token_task import ADAPTER, TokenData, token_batch, token_module, token_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data as parse_experiment
from torch.utils.data import DataLoader

from fourier_moe import HeadOnly
from lightning_modules.callbacks import Dashboard, RouterLoad, SpectralOccupancy, Throughput
from lightning_modules.callbacks.monitoring.dashboard import CHARTS, layout
from lightning_modules.optimization import Optimization, ParameterGroup

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on tiny runs


def fit(directory, *callbacks, logger=None, module=None, data=None, **options):
    options = {"log_every_n_steps": 1, **options}
    trainer = token_trainer(directory, *callbacks, **options)
    trainer.loggers = [logger] if logger else []
    trainer.fit(module or token_module(), data or TokenData())
    return trainer


def board(directory):
    return TensorBoardLogger(directory, name="", version="", default_hp_metric=False)


def events_in(directory):
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def shown(events):
    """The page as TensorBoard reads it: {section: {chart: patterns}}, for bands {chart: series}."""
    text = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    page = Layout.FromString(text)
    return {
        section.title: {chart.title: list(chart.multiline.tag) or list(chart.margin.series) for chart in section.chart}
        for section in page.category
    }


def test_every_chart_of_the_page_shows_tags_that_are_logged(tmp_path):
    callbacks = [RouterLoad(), SpectralOccupancy(), Throughput(), Dashboard(), LearningRateMonitor()]
    fit(tmp_path, *callbacks, logger=board(tmp_path))
    events = events_in(tmp_path)
    page = shown(events)
    assert {section: list(charts) for section, charts in page.items()} == {s: list(charts) for s, charts in CHARTS.items()}
    (bands,) = [charts[title] for section, charts in page.items() for title in charts if title.startswith("bands")]
    assert [series.value for series in bands] == [f"spectrum/center/expert_{e}" for e in range(4)]
    for series in bands:
        inner, outer = (events.Scalars(tag)[-1].value for tag in (series.lower, series.upper))
        assert outer - inner == pytest.approx(ADAPTER.bandwidth, abs=1e-5)
    tags = ["router/load/expert_0", "router/load_map", "router/load/expert_10", "router/load_imbalance"]
    charts = layout(tags)["Are my experts alive and balanced?"]
    assert [pattern for (pattern,) in charts.values()] == [r"router/load/expert_\d+$", "router/load_(imbalance|entropy)$"]


def test_page_of_a_model_without_experts_shows_nothing_of_them_and_keeps_the_order_of_the_sections(tmp_path):
    module = token_module(HeadOnly(), Optimization(head=ParameterGroup(0.01)))
    fit(tmp_path, RouterLoad(), Dashboard(), logger=board(tmp_path), module=module)
    page = shown(events_in(tmp_path))
    assert list(page) == list(CHARTS)  # TensorBoard puts the sections of all runs in the order of the first one's
    assert {section: charts for section, charts in page.items() if charts} == {
        "Does the model learn?": {"loss": ["(train|val)/loss$"], "validation": ["val/(?!loss$)[^/]+$"]}
    }


def test_page_is_there_after_the_first_interval_and_written_again_only_for_new_charts(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.logger.experiment.flush()
            seen.append("custom_scalars__config__" in events_in(tmp_path).Tags()["tensors"])

    fit(tmp_path, RouterLoad(), Dashboard(), Look(), logger=board(tmp_path), max_epochs=3)
    assert seen[:1] == [True]
    pages = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    pages.Reload()
    assert 1 <= len(pages.Tensors("custom_scalars__config__")) <= 3  # router; losses; validation


def test_hyper_parameters_stand_beside_the_metrics(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/accuracy", mode="max")
    options = {"enable_checkpointing": True, "max_epochs": 3}
    trainer = fit(tmp_path, checkpoint, Dashboard(), logger=board(tmp_path), **options)
    trainer.test(trainer.lightning_module, TokenData(), verbose=False)
    events = events_in(tmp_path)
    content = events.PluginTagToContent("hparams")
    values = parse_session_start_info_plugin_data(content[SESSION_START_INFO_TAG]).hparams
    assert values["adapter.num_experts"].number_value == 4
    assert values["adapter.targets"].string_value == "q_proj, v_proj"
    assert values["optimization.head.lr"].number_value == 0.01
    assert "optimization.backbone" not in values  # null
    columns = [info.name.tag for info in parse_experiment(content[EXPERIMENT_TAG]).metric_infos]
    assert columns == ["val/accuracy", "test/accuracy", "best/val/accuracy"]
    assert set(columns) <= set(events.Tags()["scalars"])
    assert not any("hp_metric" in tag for tag in events.Tags()["scalars"])
    scores = [event.value for event in events.Scalars("val/accuracy")]
    assert events.Scalars("best/val/accuracy")[-1].value == max(scores) == pytest.approx(float(checkpoint.best_model_score))


def test_best_is_logged_at_the_step_that_it_was_reached(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss")
    fit(tmp_path, checkpoint, Dashboard(), logger=board(tmp_path), enable_checkpointing=True, max_epochs=3)
    events = events_in(tmp_path)
    losses = [event.value for event in events.Scalars("val/loss")]
    reached = {2 + 3 * epoch: loss for epoch, loss in enumerate(losses) if loss == min(losses[: epoch + 1])}
    assert len(set(losses)) == 3
    assert {event.step: event.value for event in events.Scalars("best/val/loss")} == reached


def test_hyper_parameters_of_a_command_line_run_have_its_names(tmp_path, run):
    words = ["--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1"]
    run("fit", "--config", "configs/demo.yaml", *words, "--trainer.callbacks+=lightning_modules.callbacks.Dashboard")
    values = yaml.safe_load((tmp_path / "demo/version_0/hparams.yaml").read_text())
    assert values["task.class"] == "ImageClassification"
    assert values["task.model"].endswith("examples/digits_tower/digits_vit.json")  # found from any directory
    assert (values["data.dataset"], values["data.batch_size"]) == ("digits", 32)
    assert (values["adapter.class"], values["optimization.experts.lr"]) == ("FourierMoEConfig", 0.05)
    assert (values["seed"], values["trainer.max_epochs"]) == (0, 1)
    assert all(isinstance(value, (bool, int, float, str)) for value in values.values())


def test_all_of_it_works_with_csv(tmp_path):
    callbacks = [RouterLoad(), Throughput(), Dashboard()]
    trainer = fit(tmp_path, *callbacks, logger=CSVLogger(tmp_path, name="", version=""))
    trainer.logger.finalize("success")
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for tag in ("router/load_entropy", "speed/samples_per_second", "memory/process_peak_gib"):
        assert [row["step"] for row in rows if row[tag]] == ["0", "1", "2"]
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text())["adapter.top_k"] == 2


def test_without_any_logger_there_is_nothing_to_do(tmp_path):
    trainer = fit(tmp_path, RouterLoad(), Throughput(), Dashboard())
    assert float(trainer.callback_metrics["speed/step_seconds"]) > 0


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_run_that_only_evaluates_has_its_hyper_parameters(tmp_path, command):
    module = token_module()
    fit(tmp_path, module=module)
    trainer = token_trainer(tmp_path, Dashboard())
    trainer.loggers = [board(tmp_path / "evaluation")]
    getattr(trainer, command)(module, TokenData(), verbose=False)
    assert SESSION_START_INFO_TAG in events_in(tmp_path / "evaluation").PluginTagToContent("hparams")


# ---------------------------------------------------------------- throughput


class Slow(L.Callback):
    """A clock of its own: every batch takes a second, every validation a hundred."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.seconds)

    def on_train_batch_start(self, *_):
        self.seconds += 1

    def on_validation_epoch_start(self, *_):
        self.seconds += 100


def measured(directory, monkeypatch, **options):
    """The tags `speed/...` as lists over the intervals."""
    callbacks = [Throughput(**options.pop("arguments", {})), Slow(monkeypatch)]
    fit(directory, *callbacks, logger=CSVLogger(directory, name="", version=""), **options)
    with open(directory / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("speed/step_seconds")]
    tags = ("step_seconds", "samples_per_second", "tokens_per_second")
    return {tag: [float(row[f"speed/{tag}"]) for row in rows] for tag in tags}


def test_speed_counts_real_tokens_and_leaves_validation_out(tmp_path, monkeypatch):
    speed = measured(tmp_path, monkeypatch, log_every_n_steps=3, max_epochs=2)
    tokens = sum(int(token_batch(seed=seed)["mask"].sum()) for seed in range(3))
    assert speed["step_seconds"] == pytest.approx([1, 1])
    assert speed["samples_per_second"] == pytest.approx([8, 8])
    assert speed["tokens_per_second"] == pytest.approx([tokens / 3, tokens / 3])


def test_validation_within_an_interval_is_left_out_too(tmp_path, monkeypatch):
    options = {"val_check_interval": 1, "log_every_n_steps": 3}
    assert measured(tmp_path, monkeypatch, **options)["step_seconds"] == pytest.approx([1])


def test_a_step_is_one_of_the_optimizer(tmp_path, monkeypatch):
    options = {"accumulate_grad_batches": 3, "arguments": {"every_n_steps": 1}, "log_every_n_steps": 50}
    speed = measured(tmp_path, monkeypatch, max_epochs=2, **options)
    assert speed["step_seconds"] == pytest.approx([3, 3])
    assert speed["samples_per_second"] == pytest.approx([8, 8])


def test_logging_switched_off(tmp_path):
    trainer = fit(tmp_path, Throughput(), Dashboard(), RouterLoad(), log_every_n_steps=0)
    assert not any(tag.startswith(("speed", "memory")) for tag in trainer.callback_metrics)


def test_a_task_without_padding_has_no_tokens_per_second(tmp_path, monkeypatch):
    module = token_module()
    monkeypatch.setattr(type(module.task), "token_mask", lambda self, batch: None)
    metrics = fit(tmp_path, Throughput(), module=module).callback_metrics
    assert "speed/samples_per_second" in metrics
    assert "speed/tokens_per_second" not in metrics


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for a second opinion")
def test_peak_memory_is_that_of_the_process(tmp_path):
    logged = float(fit(tmp_path, Throughput()).callback_metrics["memory/process_peak_gib"])
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    assert logged == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)


class DataOfProcess(TokenData):
    """The second process has batches of half the size."""

    def train_dataloader(self):
        size = 8 if torch.distributed.get_rank() == 0 else 4
        return DataLoader([token_batch(size, seed) for seed in range(3)], batch_size=None)


def test_two_processes_are_counted_together(tmp_path, monkeypatch):
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "log_every_n_steps": 3}
    trainer = fit(tmp_path, Throughput(), Slow(monkeypatch), data=DataOfProcess(), **options)
    tokens = sum(int(token_batch(size, seed)["mask"].sum()) for size in (8, 4) for seed in range(3))
    assert float(trainer.callback_metrics["speed/samples_per_second"]) == pytest.approx(12)
    assert float(trainer.callback_metrics["speed/tokens_per_second"]) == pytest.approx(tokens / 3)


def test_wrong_interval_is_an_error():
    with pytest.raises(ValueError, match="every_n_steps=0 must be 1 or more, or null"):
        Throughput(every_n_steps=0)
