"""Static merge: routing frozen to its mean gates and written into the weights, and what that changes, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fourier_moe import StatisticsReader, adapters, recording, routers
from fourier_moe.errors import UserError
from fourier_moe.serving.merge import check_mergeable, merge_adapters, swap, swapped
from lightning_modules.adaptation import AdaptationModule
from lightning_modules.tasks.base import Batch, Task, select


@dataclass(frozen=True)
class MergeReport:
    """What a static merge changed.

    Attributes:
        split: `val` or `test`, on which gates and differences were measured.
        main_metric: the name of the metric that people compare by.
        routed: metrics of the split with the adapter.
        merged: the same of the merged model.
        logit_difference: root mean square of the difference of the logits over that of the routed model's, both after each
            row's mean is taken off, which softmax ignores.
        gates: frozen gates (E,) of every projection that routes; empty for a method without routing, whose merge is exact.
    """

    split: str
    main_metric: str
    routed: dict[str, float]
    merged: dict[str, float]
    logit_difference: float
    gates: dict[str, list[float]] = field(default_factory=dict)

    @property
    def drop(self) -> float:
        """Points of the main metric (times 100) that the merge costs."""
        return 100 * (self.routed[self.main_metric] - self.merged[self.main_metric])


class OnBatches(L.Callback):
    """Call `look(task, batch)` before every evaluation batch, with the trainer's precision, on the examples of one task.

    Args:
        task_name: the task, as batches name it under `task`; None takes all examples.
    """

    def __init__(self, look: Callable[[Task, Batch], None], task_name: str | None) -> None:
        self.look, self.task_name = look, task_name
        self.num_examples = 0
        self.known: dict[str, None] = {}

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert isinstance(pl_module, AdaptationModule)
        rows = list(range(len(batch["id"])))
        if self.task_name is not None:
            names = batch.get("task", [""] * len(rows))
            self.known |= dict.fromkeys(names)
            rows = [row for row in rows if names[row] == self.task_name]
        self.num_examples += len(rows)
        if rows:
            with trainer.precision_plugin.val_step_context():
                self.look(pl_module.task, select(batch, rows))

    on_test_batch_start = on_validation_batch_start

    def check(self) -> None:
        """Refuse to go on with nothing."""
        if not self.num_examples and self.task_name is None:
            raise UserError("the split has no examples to measure gates on; hold a part out, or give the other --split")
        if not self.num_examples:
            tasks = ", ".join(name for name in self.known if name)
            raise UserError(f"--task {self.task_name!r} is in no batch; tasks of the data: {tasks or 'none are named'}")


def merge(
    trainer: L.Trainer, model: AdaptationModule, data: Any, *, split: str, task_name: str | None, ckpt_path: str | None
) -> MergeReport:
    """Merge the adapters of `model` into its weights, in place.

    Reads the split twice: for the mean gates of every projection, and to compare logits and metrics with and without adapters.

    Raises:
        UserError: if the adapter or the base cannot be merged, the split is empty, or nothing belongs to the task.
    """
    run = {"val": trainer.validate, "test": trainer.test}[split]
    gates: dict[str, Tensor] = {}
    gate_meter = OnBatches(_record, task_name)
    trainer.callbacks = [_Prepare(gates), gate_meter]  # type: ignore[attr-defined]
    routed = _metrics(run(model, data, ckpt_path=ckpt_path, verbose=False), split)
    gate_meter.check()

    found = adapters(model.model)
    merged = merge_adapters(found, gates)
    sums = torch.zeros(2, dtype=torch.float64)

    def compare(task: Task, batch: Batch) -> None:
        merged_logits = task.logits(batch)
        with swapped(model.model, {new: old for old, new in merged.items()}):
            sums.add_(_squares(task.logits(batch), merged_logits))

    swap(model.model, merged)
    trainer.callbacks = [OnBatches(compare, task_name)]  # type: ignore[attr-defined]
    metrics = _metrics(run(model, data, verbose=False), split)
    difference = float((sums[0] / sums[1]).sqrt()) if sums[0] != 0 else 0.0
    main = _main_metric(model.task, routed, split, task_name)
    return MergeReport(split, main, routed, metrics, difference, {name: values.tolist() for name, values in gates.items()})


def _main_metric(task: Task, metrics: Mapping[str, float], split: str, task_name: str | None) -> str:
    """The task's main metric, or what stands for it in validation; of the set called like `task_name`, if there is one."""
    names = [task.main_metric, *task.new_metrics()]
    for name in [*(f"{task_name}/{name}" for name in names), *names]:
        if name in metrics:
            return name
    raise UserError(f"the {split} set gave {', '.join(metrics) or 'nothing'}, and no {names[0]} to compare; has it labels?")


class _Prepare(L.Callback):
    """Before the first batch refuse what cannot be merged; after the last one read the mean gates."""

    def __init__(self, gates: dict[str, Tensor]) -> None:
        self.gates = gates

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AdaptationModule)
        check_mergeable(adapters(pl_module.model))
        self.reader = StatisticsReader(pl_module.model)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AdaptationModule)
        if routers(pl_module.model):
            for name, adapter in adapters(pl_module.model).items():
                self.gates[name] = adapter.router.statistics().mean_gate.float()  # type: ignore[union-attr, operator]
        self.reader.close()

    on_test_start, on_test_end = on_validation_start, on_validation_end


def _record(task: Task, batch: Batch) -> None:
    assert task.model is not None
    with recording(task.model, task.token_mask(batch)):
        task.logits(batch)


def _squares(routed: Tensor, merged: Tensor) -> Tensor:
    """Sums of squares of the difference and of the routed logits, (2,), without what is masked by -infinity.

    NaN and infinity, for example of a half-precision weight that overflowed in the merge, make the difference NaN.
    """
    seen = ~routed.isneginf()

    def centred(logits: Tensor) -> Tensor:
        logits = logits.double().where(seen, 0)
        return (logits - logits.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)).where(seen, 0)

    routed, merged = centred(routed), centred(merged)
    return torch.stack([(merged - routed).square().sum(), routed.square().sum()]).cpu()


def _metrics(of_sets: list[Mapping[str, float]], split: str) -> dict[str, float]:
    """Metrics by their name without the split."""
    return {name.removeprefix(f"{split}/"): float(value) for metrics in of_sets for name, value in metrics.items()}
