"""Dashboard: TensorBoard's pages CUSTOM SCALARS and HPARAMS for the tags that a run logs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard.summary import hparams

from fourier_moe.inject import adapter_config
from lightning_modules.adaptation import AdaptationModule
from lightning_modules.callbacks.any_module import adapted_model
from lightning_modules.callbacks.monitoring.hyperparameters import hyperparameters
from lightning_modules.callbacks.monitoring.logged import log_now, tensorboards
from lightning_modules.tasks import Task

# Section -> chart -> pattern of the tags in the chart, or BANDS.
BANDS = "bands"
CHARTS = {
    "Are my experts alive and balanced?": {
        "DEAD EXPERTS: layers in which an expert is dead (0 is healthy)": r"router/dead_layers/expert_\d+",
        "load: share of the tokens per expert": r"router/load/expert_\d+",
        "load imbalance (1 is even) and entropy (1 is even)": r"router/load_(imbalance|entropy)",
        "mean gate per expert": r"router/gate/expert_\d+",
        "balance loss (top_k is even)": r"router/balance_loss_unscaled",
    },
    "Are they specialized?": {
        "energy of the update": r"spectrum/energy/(expert_\d+|shared)",
        "bands: where each expert's energy lies (line) in the band that it owns (shade)": BANDS,
        "center: mean radius of the spectrum": r"spectrum/center/(expert_\d+|shared)",
        "share of the energy inside the expert's band": r"spectrum/in_band/expert_\d+",
        "effective number of coefficients": r"spectrum/effective_coefficients/(expert_\d+|shared)",
        "effective rank of the update": r"spectrum/effective_rank/(expert_\d+|shared)",
        "rank of a token's update, at most, by task": r"spectrum/token_rank/.+",
    },
    "Does the model learn?": {
        "loss": r"(train|val)/loss",
        "validation": r"val/(?!loss$)[^/]+",
        "total loss and its balance term": r"train/(total|balance)_loss",
        "learning rates": r"lr-.+",
    },
    "How fast, how large?": {
        "samples per second": r"speed/samples_per_second",
        "tokens per second, without padding": r"speed/tokens_per_second",
        "peak memory (GiB)": r"memory/.+",
    },
}


class Dashboard(L.Callback):
    """Lay out the values of a run.

    - TensorBoard's CUSTOM SCALARS: one page that shows whether the experts are alive, balanced and specialized, whether the
      model learns and how fast (`CHARTS`). Charts without data are left out; sections are not, since TensorBoard puts them in
      the order of the first run in the directory.
    - HPARAMS, for every logger that takes hyperparameters: adapter, optimization, task, data and trainer by the names of the
      command line. TensorBoard shows them beside the last `val/...` and `test/...` metrics and the best values that
      ModelCheckpoint monitors, logged as `best/{monitor}`.
    """

    def __init__(self) -> None:
        self._tags: set[str] = set()
        self._layout: Mapping[str, Any] = {}
        self._described: set[str | None] = set()  # log directories; TensorBoard reads the first description only
        self._best: dict[str, float] = {}
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._describe(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tags, self._layout, self._best, self._last_step = set(), {}, {}, trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self._last_step and interval and step % interval == 0:
            self._lay_out(trainer)
        self._last_step = step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_best(trainer)  # of the previous epoch: ModelCheckpoint scores it after all other callbacks

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_best(trainer)
        self._lay_out(trainer)

    def _lay_out(self, trainer: L.Trainer) -> None:
        """Write the layout again whenever there are new tags; TensorBoard shows the last one."""
        tags = set(trainer.callback_metrics)
        if tags <= self._tags:
            return
        self._tags |= tags
        page = layout(self._tags)
        if page != self._layout:
            self._layout = page
            for board in tensorboards(trainer):
                board._get_file_writer().add_summary(layout_summary(page))

    def _log_best(self, trainer: L.Trainer) -> None:
        scores = {
            f"best/{callback.monitor}": float(callback.best_model_score)
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None
        }
        new = {name: score for name, score in scores.items() if self._best.get(name) != score}
        if new:
            self._best |= new
            log_now(trainer, new)

    def _describe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.log_dir in self._described:
            return
        self._described.add(trainer.log_dir)
        own = pl_module if isinstance(pl_module, AdaptationModule) else None
        values = hyperparameters(trainer, own, own.adapter if own else adapter_config(adapted_model(pl_module, self)))
        monitors = [callback.monitor for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        metrics = _metric_names(own.task) if own else []
        columns = [*metrics, *(f"best/{monitor}" for monitor in monitors if monitor)]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # log_hyperparams needs the values of the metrics now, or writes placeholders.
                logger.hparams.update(values)
            else:
                logger.log_hyperparams(values)
        for board in tensorboards(trainer):
            for summary in hparams(values, dict.fromkeys(columns, 0)):  # the scalars of these names give the values
                board._get_file_writer().add_summary(summary)


def _metric_names(task: Task) -> list[str]:
    """Return what validation and test log; a language model measures something else in each."""
    names, current = [], task.split
    splits: tuple[Literal["val", "test"], ...] = ("val", "test")
    for split in splits:
        task.split = split
        names += [f"{split}/{name}" for name in task.new_metrics()]
    task.split = current
    return names


def layout(tags: Iterable[str]) -> Mapping[str, Mapping[str, list[Any]]]:
    """Return the page: by section and chart, patterns of tags, or (center, inner edge, outer edge) of each expert's band."""
    tags = list(tags)
    experts = sorted({tag.rpartition("_")[2] for tag in tags if tag.startswith("spectrum/band_inner/")}, key=int)
    bands = [tuple(f"spectrum/{name}/expert_{e}" for name in ("center", "band_inner", "band_outer")) for e in experts]
    page: dict[str, dict[str, list[Any]]] = {}
    for section, charts in CHARTS.items():
        page[section] = {}
        for title, pattern in charts.items():
            if pattern == BANDS and bands:
                page[section][title] = bands
            elif any(re.fullmatch(pattern, tag) for tag in tags):
                page[section][title] = [f"{pattern}$"]
    return page


def layout_summary(page: Mapping[str, Mapping[str, list[Any]]]) -> Summary:
    """Return the page for TensorBoard. `SummaryWriter.add_custom_scalars` knows no chart of several bands."""

    def chart(title: str, content: list[Any]) -> layout_pb2.Chart:
        if isinstance(content[0], str):
            return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=content))
        series = [layout_pb2.MarginChartContent.Series(value=v, lower=low, upper=up) for v, low, up in content]
        return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=series))

    categories = [
        layout_pb2.Category(title=title, chart=[chart(*each) for each in charts.items()]) for title, charts in page.items()
    ]
    content = layout_pb2.Layout(category=categories).SerializeToString()
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=TensorShapeProto())
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    return Summary(value=[Summary.Value(tag="custom_scalars__config__", tensor=tensor, metadata=metadata)])
