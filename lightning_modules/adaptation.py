"""AdaptationModule: the single LightningModule. Task + adapter + optimization."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fourier_moe import (
    AdapterConfig,
    AdapterDescription,
    InjectionReport,
    adapter_state_dict,
    balance_loss,
    describe_adapter,
    inject,
    load_adapter,
    recording,
    save_adapter,
)
from fourier_moe.errors import UserError, printable, shorten
from fourier_moe.files.adapter_files import check_fit
from fourier_moe.files.format import description_of
from fourier_moe.files.hub import local_directory
from fourier_moe.inject import adapter_config, regularization
from fourier_moe.models.backbone import backbone_fingerprint, backbone_name
from lightning_modules.evaluation_sets import EvaluationSets, each_loader, num_own, set_names
from lightning_modules.interruption import (
    ExactResume,
    GracefulStop,
    NewestState,
    open_csv_files,
    require_finite_loss,
    require_finite_weights,
)
from lightning_modules.optimization import Optimization
from lightning_modules.optimization.chosen_classes import check_direction, follow_validation
from lightning_modules.run_directory import attach_run_directory
from lightning_modules.strategies.blocks import check_backend, checkpoint_activations, compile_blocks
from lightning_modules.strategies.sharding import check_strategy
from lightning_modules.tasks import Task
from lightning_modules.tasks.base import data_module, run_data, without_weights
from lightning_modules.tasks.building_code import building_code
from lightning_modules.tasks.generation import is_sharded
from lightning_modules.training.planned_schedule import PlannedSchedule, accumulated_batches
from lightning_modules.training.step_mean import StepMean
from lightning_modules.training.supported_callbacks import check_callbacks, check_monitors
from lightning_modules.training.training_inputs import measure_training_inputs
from lightning_modules.training.unused_adapters import UnusedAdapters
from lightning_modules.training.weight_averaging import WeightAverage, attach_weight_average, check_resumed


class BatchLosses(NamedTuple):
    """The parts of the loss of a training batch on this process; scalars without gradients.

    Attributes:
        weight: the batch's weight in its optimizer step, see `Task.loss_weight`.
        task: the task's loss.
        balance: the sum of all adapters' weighted load-balancing losses.
        penalty: the adapters' regularization of their own parameters.
    """

    weight: Tensor
    task: Tensor
    balance: Tensor
    penalty: Tensor


class AdaptationModule(L.LightningModule):
    """Adapt a task's pretrained model and train the adapter.

    Checkpoints contain the trained parameters, not the frozen model.

    Args:
        task: the model to adapt, and how it is scored.
        adapter: how to adapt it.
        optimization: learning rates by kind of parameters, and their schedule. Not needed to validate, test or predict.
        num_classes: outputs of the head; the command line sets it from the data.
        adapter_path: saved adapter to start from (fit) or to use (validate, test, predict): its directory, or
            `hf://owner/name[@revision]` on the Hugging Face hub.
        activation_checkpointing: keep only the input of every transformer block for the backward pass and recompute the rest:
            much less memory for about a third more time.
        compile: run the transformer blocks through torch.compile in training; the name of a backend, or true for `inductor`.

    Attributes:
        batch_losses: parts of the loss of the last training batch.

    Raises:
        UserError: if there is no adapter at adapter_path, or `compile` cannot work.
    """

    def __init__(
        self,
        task: Task,
        adapter: AdapterConfig,
        optimization: Optimization | None = None,
        num_classes: int | None = None,
        adapter_path: str | None = None,
        activation_checkpointing: bool = False,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints leave the frozen model out
        self.task = task
        self.adapter = adapter
        self.optimization = optimization
        self.num_classes = num_classes
        self.adapter_path = adapter_path
        self.activation_checkpointing = activation_checkpointing
        self.compile_backend = "inductor" if compile is True else compile or None
        if self.compile_backend is not None and activation_checkpointing:
            raise UserError("compile and activation_checkpointing do not work together; set one of them to false")
        self.class_names: list[str] | None = None
        self.report: InjectionReport | None = None
        self.skips_prediction = False  # set by PredictionsWriter for batches whose rows it has
        self.val_sets: EvaluationSets | None = None
        self.test_sets: EvaluationSets | None = None
        self.batch_losses: BatchLosses | None = None
        self._step_mean = StepMean()
        self._schedule: PlannedSchedule | None = None
        self.average: WeightAverage | None = None
        self._untrained = self._compiled = False
        self._adapter_directory = local_directory(adapter_path) if adapter_path else None
        self._stored: AdapterDescription | None = describe_adapter(self._adapter_directory) if self._adapter_directory else None

    @property
    def model(self) -> nn.Module:
        """The adapted model; available after configure_model."""
        assert self.task.model is not None, "configure_model() comes first"
        return self.task.model

    def configure_model(self) -> None:
        """Load the pretrained model and inject the adapter, once."""
        if self.task.model is not None:
            return
        precision = getattr(self._trainer, "precision", "32-true")
        if precision in ("16-true", "bf16-true", "64-true"):
            raise UserError(
                f"trainer.precision={precision!r} would cast the adapters, which stay in float32; use bf16-mixed or 32-true"
            )
        if self.adapter.head:
            raise UserError(f"adapter.head={list(self.adapter.head)} is set by the task; remove it from the config")
        if self._trainer is not None:
            strategy, quantization = self._trainer.strategy, getattr(self.task, "quantization", None)
            compiles = self.compile_backend is not None and self._trainer.state.fn == "fit"
            check_strategy(strategy, self.adapter, quantization, compiles)
            if compiles:
                check_backend(str(self.compile_backend), strategy.root_device)
        self.task.check_data(run_data(self._trainer))
        adapter_classes = self._stored.class_names if self._stored else None
        data_classes = list(run_data(self._trainer).class_names) or self.class_names  # without data, those of a checkpoint
        self.class_names = _agree(f"adapter_path={self.adapter_path!r}", adapter_classes, "the data", data_classes)
        # A local directory may have fewer classes than its benchmark, and so may an adapter trained on it.
        num_classes = len(self.class_names) if self.class_names else self.num_classes
        model = self.task.build(num_classes, self.class_names)
        _check_main_metric(self.task)
        self.report = inject(model, dataclasses.replace(self.adapter, head=self.task.head_names))
        if self._adapter_directory and not without_weights():
            load_adapter(model, self._adapter_directory)
        if self.activation_checkpointing:
            checkpoint_activations(model)
        self._untrained = not (self.adapter_path or self.task.works_untrained)
        rank_zero_info(f"\n{backbone_name(model)}, {type(self.adapter).__name__}\n{self.report}\n")

    def configure_callbacks(self) -> list[L.Callback]:
        """Add the callbacks of every run: exact resumption, a graceful stop, the newest state, a check for unused adapters.

        Also tells the data what the model reads, and claims the run's directory. This is the last hook before Lightning opens
        the loggers' files.
        """
        check_callbacks(self.trainer)
        self.task.tell_data(data_module(self.trainer))
        directory = attach_run_directory(self.trainer)
        directory.claim(self.trainer)
        if self.trainer.state.fn == "fit":
            directory.lock(self.trainer)
            self.average = attach_weight_average(self.trainer)
        open_csv_files(self.trainer)
        return [ExactResume(), GracefulStop(), NewestState(), UnusedAdapters()]

    def on_validation_start(self) -> None:
        self._require_trained()
        if self.trainer.sanity_checking:
            measure_training_inputs(self.trainer, self.task)
        self.val_sets = self._start("val", self.val_sets, self.trainer.val_dataloaders)

    def on_validation_end(self) -> None:
        if self.trainer.sanity_checking:
            check_monitors(self.trainer)
        if self.average is not None and self.trainer.state.fn == "fit":
            self.average.put_current_back()  # after all callbacks have seen the validated weights

    def on_test_start(self) -> None:
        self._require_trained()
        self.test_sets = self._start("test", self.test_sets, self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        self._require_trained()
        self.task.split = "predict"
        self.task.check(each_loader(self.trainer.predict_dataloaders))
        if is_sharded(self.model):
            self._require_equal_batches()

    def _require_equal_batches(self) -> None:
        """Refuse unequal numbers of batches, which Lightning allows in predict: the last forward would wait forever."""
        counts = torch.tensor([float(count) for count in self.trainer.num_predict_batches], device=self.device)
        most = self.trainer.strategy.reduce(counts.clone(), reduce_op="max")
        assert isinstance(most, Tensor)
        if not self.trainer.strategy.reduce_boolean_decision(torch.equal(counts, most), all=True):
            raise UserError(
                "the processes have different numbers of predict batches, and a sharded model needs all processes in every "
                "batch; give the DataModule's predict loader a torch DistributedSampler without shuffling"
            )

    def _require_trained(self) -> None:
        """Refuse to evaluate a new head, whose results would be noise.

        Not part of configure_model, since no checkpoint is loaded by then.
        """
        command = self.trainer.state.fn
        if self._untrained and command is not None and command != "fit":
            raise untrained(command.value)

    def _start(self, split: Literal["val", "test"], sets: EvaluationSets | None, loaders: Any) -> EvaluationSets:
        self.task.split = split
        names = set_names(loaders)
        self.task.check(each_loader(loaders))
        if sets is None or sets.names != names:
            sets = EvaluationSets(names, self.task.new_metrics).to(self.device)
        sets.reset()
        return sets

    def on_fit_start(self) -> None:
        # GradientAccumulationScheduler warns modules that override optimizer_step; this override changes nothing for it.
        warnings.filterwarnings("ignore", message=r"When using `Trainer\(accumulate_grad_batches != 1\)` and overriding")
        if self.compile_backend is not None and not self._compiled:
            compile_blocks(self.model, self.compile_backend)
            self._compiled = True
        if not self.trainer.strategy.restore_checkpoint_after_setup:  # else a checkpoint may still bring what was measured
            measure_training_inputs(self.trainer, self.task)

    def on_train_start(self) -> None:
        assert self._schedule is not None
        self._schedule.on_train_start(self.trainer)
        with self.trainer.precision_plugin.forward_context():
            self.task.check_training(run_data(self.trainer))
        measure_training_inputs(self.trainer, self.task)
        self._step_mean.reset()
        # Lightning sets it at the start of an epoch, but not if a resumed run continues within one.
        self.trainer.accumulate_grad_batches = accumulated_batches(self.trainer, self.trainer.current_epoch)
        self._freeze_statistics()

    def on_train_epoch_start(self) -> None:
        assert self._schedule is not None
        self._schedule.on_train_epoch_start(self.trainer)
        self._untrained = False
        self._freeze_statistics()

    def _freeze_statistics(self) -> None:
        # Keep the batch statistics of a frozen backbone, too.
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in module.parameters()):
                module.eval()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        with recording(self.model, self.task.token_mask(batch), batch.get("task")):
            task_loss = self.task.loss(batch)
            balance = balance_loss(self.model)
        penalty = regularization(self.model)
        weight = self.task.loss_weight(batch)
        if not isinstance(weight, Tensor):
            weight = torch.full_like(task_loss, weight, dtype=torch.float32)  # a copy from the CPU would wait for the device
        self.batch_losses = BatchLosses(*(value.detach() for value in (weight, task_loss, balance, penalty)))
        require_finite_loss(self, {"task": task_loss, "balance": balance, "penalty": penalty}, batch)
        loss = task_loss + balance + penalty
        logs = {"train/loss": task_loss.detach()}
        if self.report is not None and self.report.trained.get("router"):
            logs |= {"train/balance_loss": balance.detach(), "train/total_loss": loss.detach()}
        if penalty.requires_grad:
            logs |= {"train/regularization": penalty.detach(), "train/total_loss": loss.detach()}
        self.log_dict(logs, batch_size=_batch_size(batch))
        self.log("loss", task_loss.detach(), prog_bar=True, logger=False, batch_size=_batch_size(batch))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        assert self.batch_losses is not None
        super().backward(self._step_mean.weigh(loss, self.batch_losses.weight, self.trainer), *args, **kwargs)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Turn the gradients into the mean over the step, after its last backward pass and before anything reads them."""
        assert optimizer_closure is not None

        def closure() -> Any:
            result = optimizer_closure()
            self._step_mean.divide(optimizer, self.trainer)  # type: ignore[arg-type]
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self._evaluate(self.val_sets, self.trainer.val_dataloaders, batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self._evaluate(self.test_sets, self.trainer.test_dataloaders, batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        return [] if self.skips_prediction else self.task.predict(batch)

    def _evaluate(
        self, sets: EvaluationSets | None, loaders: Any, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int
    ) -> dict[str, Any]:
        """Score the batch, and return its rows and predictions to the callbacks."""
        assert sets is not None
        loader = each_loader(loaders)[dataloader_idx]
        evaluation = self.task.evaluate(batch).first(num_own(loader, batch_idx, _batch_size(batch)))
        sets[dataloader_idx].update(evaluation)
        graded = {name: getattr(evaluation, name) for name in ("prediction", "target", "num_classes")}
        return {"set": sets.names[dataloader_idx], "rows": evaluation.rows, **graded}

    def on_validation_epoch_end(self) -> None:
        values = self._log_evaluation("val", self.val_sets)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            assert self._schedule is not None
            follow_validation(self._schedule.scheduler, self.task.monitor[0], values)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", self.test_sets)

    def _log_evaluation(self, split: str, sets: EvaluationSets | None) -> dict[str, Any]:
        """Log the results and return them. All processes must call it together, also one without examples of some set."""
        assert sets is not None
        values = {f"{split}/{name}": value for name, value in sets.compute().items()}
        for name, value in values.items():
            self.log(name, value, prog_bar=name == f"{split}/{self.task.main_metric}", sync_dist=True)  # avoids a warning
        return values

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.optimization is None:
            raise UserError("optimization is missing; fit needs its learning rates")
        optimizer = self.optimization.build_optimizer(self.model, adapter_config(self.model))
        self._schedule = PlannedSchedule(self.optimization, optimizer, self.trainer)
        scheduler, interval = self._schedule.scheduler, self.optimization.schedule_interval
        check_direction(scheduler, *self.task.monitor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "reduce_on_plateau": False},  # see lr_scheduler_step
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Leave ReduceLROnPlateau to the end of validation: Lightning advances it after the checkpoints, and not if resumed."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def save_adapter(self, directory: Path, metrics: Mapping[str, float]) -> None:
        """Write the adapter with a description of this run; see `fourier_moe.save_adapter`."""
        data = run_data(self._trainer)
        task = {
            "class": type(self.task).__name__,
            "pipeline_tag": self.task.pipeline_tag,
            "main_metric": self.task.main_metric,
            "data": data.dataset_name,
        }
        if data.data_revision:
            task["data_revision"] = data.data_revision
        task |= prompt_of(data_module(self._trainer))
        code = building_code(self.task, self.num_classes, self.class_names)
        with self.average.in_use() if self.average is not None else nullcontext():
            save_adapter(self.model, directory, class_names=self.class_names, metrics=metrics, task=task, code=code)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained parameters, drop the frozen model, and record what they belong to."""
        trained = {f"task.model.{key}" for key in adapter_state_dict(self.model)}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in trained}
        if self.average is not None:
            checkpoint["state_dict"] |= self.average.averaged()
        require_finite_weights(self.trainer, checkpoint["state_dict"])
        if self.optimization is not None:
            checkpoint["optimization"] = self.optimization.description()
        checkpoint["adaptation"] = {
            "backbone": backbone_name(self.model),
            "backbone_fingerprint": backbone_fingerprint(self.model),
            "adapter": adapter_config(self.model).to_dict(),
            "class_names": self.class_names,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or adapter; replace its learning rates by the configured ones.

        Raises:
            UserError: naming what differs.
        """
        raw = checkpoint.get("adaptation")
        if not isinstance(raw, dict):
            raise UserError("the checkpoint was not written by AdaptationModule")
        stored = description_of({"config": raw.get("adapter"), "metrics": {}, **raw}, "the checkpoint")
        self.class_names = _agree("the checkpoint", stored.class_names, "this run", self.class_names)
        state = {key.removeprefix("task.model."): tensor for key, tensor in checkpoint["state_dict"].items()}
        check_fit(self.model, "the checkpoint", state, stored.config, stored.backbone, stored.fingerprint)
        self._untrained = False
        check_resumed(self.trainer, checkpoint, self.average)
        if self.optimization is not None and self.trainer.state.fn == "fit":
            self.optimization.override(checkpoint)


def prompt_of(data: L.LightningDataModule | None) -> dict[str, str]:
    """Return what an adapter says of the words around questions: `prompt`, and `chat_template` where the run gave one."""
    fields = {name: getattr(data, name, None) for name in ("prompt", "chat_template")}
    return {name: text for name, text in fields.items() if isinstance(text, str)}


def _check_main_metric(task: Task) -> None:
    """Refuse a task without a main metric, and warn of one that nothing seems to measure.

    A metric may give several values under names of its own (ROUGE), so an unknown name is no error.
    """
    name, known = getattr(task, "main_metric", None), [*task.new_metrics(), "loss"]
    if name is None:
        raise UserError(
            f"{type(task).__name__}.main_metric is missing; set it to one of the task's metrics: {', '.join(known)}"
        )
    if name not in known:
        rank_zero_warn(f"{type(task).__name__}.main_metric={name!r} is none of the task's metrics: {', '.join(known)}")


def untrained(command: str) -> UserError:
    """Return the error of a `command` that has nothing trained to work with."""
    return UserError(
        f"{command} needs a trained adapter: give --model.adapter_path DIR (what fit wrote to RUN/adapter) or --ckpt_path FILE"
    )


def _batch_size(batch: Mapping[str, Any]) -> int:
    return len(batch["id"])


def _agree(first: str, names: list[str] | None, second: str, others: list[str] | None) -> list[str] | None:
    """Return the known class names; refuse two different lists, since the outputs of a head depend on names and order."""
    if names and others and names != others:
        raise UserError(
            f"{first} was trained on {len(names)} classes ({shorten(map(printable, names))}), {second} has {len(others)} "
            f"({shorten(map(printable, others))}); names and order must be the same"
        )
    return names or others
