"""AdapterTrainerMixin: an adapted model in `transformers.Trainer` or a subclass of it, such as TRL's SFTTrainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.adapter import adapters
from fourier_moe.config import AdapterConfig
from fourier_moe.errors import UserError
from fourier_moe.files.adapter_files import load_adapter, save_adapter
from fourier_moe.inject import adapter_config, after_step, is_adapted
from fourier_moe.integrations.loss_hook import own_losses, token_mask
from fourier_moe.report import trained_parameters
from fourier_moe.routing.reader import StatisticsReader
from fourier_moe.routing.recording import recording
from fourier_moe.routing.statistics import RouterStatistics


class AdapterTrainerMixin:
    """Trains an adapted model in any Trainer: `class MyTrainer(AdapterTrainerMixin, Trainer): pass`.

    - The balance loss and the regularization are added to the task's loss, with the same weight in every optimizer step
      however it is divided into micro-batches and processes. Logs have the task's part as `task_loss`, the rest as
      `adapter_loss`, and the `load_imbalance` of the active routers (the busiest expert's tokens in multiples of an even
      share), over all processes.
    - Parameters have learning rates by their role.
    - Checkpoints hold the adapter (a file of `save_adapter`) instead of the whole model, and training resumes from them. For
      a model that peft adapted they are peft's.

    Under gradient accumulation, and with several processes, transformers 5.17 to 5.24 do not divide the loss of sequence
    classifiers, which take `num_items_in_batch` and ignore it: set `trainer.model_accepts_loss_kwargs = False` for them.

    Args:
        learning_rates: peak learning rate by kind of parameters: experts, router, adapter, head, backbone. A kind that it does
            not name has the rate of the TrainingArguments.
        arguments: of the Trainer. Its model is adapted already, by `inject` or peft, or the Trainer lets peft adapt it.

    Raises:
        UserError: if the model is not adapted, or a rate is for parameters that are not trained.
    """

    model: Any  # what Trainer sets
    accelerator: Any
    args: Any
    state: Any
    optimizer: Any
    processing_class: Any
    model_accepts_loss_kwargs: bool
    get_optimizer_cls_and_kwargs: Any

    def __init__(self, *arguments: Any, learning_rates: Mapping[str, float] | None = None, **options: Any) -> None:
        self._trainer.__init__(*arguments, **options)
        trained = self._trained()
        unknown = [kind for kind in learning_rates or {} if kind not in trained]
        if unknown:
            raise UserError(f"learning_rates has {', '.join(unknown)}, and the model trains {', '.join(trained)}")
        self.learning_rates = dict(learning_rates or {})
        self._reader: StatisticsReader | None = None
        self._hooked: Any = None  # the optimizer after whose steps `after_step` runs
        self._sums: list[Tensor] = []  # (2,): task and adapter loss of each batch since the last log

    @property
    def _trainer(self) -> Any:
        """The Trainer behind this class."""
        return super()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Trainer multiplies by the number of processes wherever it gives this number, used by the model or not
        given = num_items_in_batch is not None and getattr(self, "loss_is_scaled_for_ga", None) is not False
        options = {"num_items_in_batch": num_items_in_batch} if given else {}
        if not model.training:
            return self._trainer.compute_loss(model, inputs, return_outputs=return_outputs, **options)
        if self._reader is None:
            self._reader = StatisticsReader(self.model)
        with recording(self.model, token_mask(inputs)):
            # no outputs that are not asked for: TRL computes the logits of an SFTTrainer in a second forward pass
            result = self._trainer.compute_loss(model, inputs, return_outputs=return_outputs, **options)
            loss = result[0] if return_outputs else result
            extra = own_losses(self.model).to(loss.device)
        parts = self._accumulation_steps if self._is_scaled(options) else 1  # of the step's loss, of which this is one
        self._sums.append(torch.stack([loss.detach().float() * parts, extra.detach()]))
        total = loss + (extra / parts).to(loss.dtype)
        return (total, result[1]) if return_outputs else total

    def _trained(self) -> dict[str, list[nn.Parameter]]:
        """Return what is trained, by kind."""
        of_peft = not is_adapted(self.model) and adapters(self.model)
        config = AdapterConfig() if of_peft else adapter_config(self.model)
        kinds: dict[str, list[nn.Parameter]] = {}
        for kind, parameters in trained_parameters(self.model, config).items():
            name = "head" if of_peft and kind == "backbone" else str(kind)  # peft's modules_to_save
            kinds.setdefault(name, []).extend(parameter for parameter in parameters if parameter.requires_grad)
        return {kind: parameters for kind, parameters in kinds.items() if parameters}

    @property
    def _saves_adapter(self) -> bool:
        """Whether checkpoints are adapter files; Trainer knows how to save a peft model, and a whole one."""
        return is_adapted(self.model) and not adapter_config(self.model).trains_backbone

    @property
    def _accumulation_steps(self) -> int:
        """Micro-batches of the current optimizer step; the last one of an epoch may have fewer."""
        return getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)

    def _is_scaled(self, options: Mapping[str, Any]) -> bool:
        """Whether the task's loss is divided by the items of all micro-batches; otherwise Trainer divides by their number."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        return bool(self.model_accepts_loss_kwargs and options) or getattr(self, "compute_loss_func", None) is not None

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        if self._sums and "loss" in logs:
            task, adapter = self.accelerator.reduce(torch.stack(self._sums).mean(0), "mean").tolist()
            logs = {**logs, "task_loss": task, "adapter_loss": adapter}
            self._sums.clear()
            sums = [one.sums for one in self._reader.read().values()] if self._reader is not None else []
            if sums:
                reduced = self.accelerator.reduce(torch.cat(sums), "sum").cpu().split([len(one) for one in sums])
                active = [one for one in map(RouterStatistics, reduced) if one.tokens > 0]  # not peft's inactive adapters
                if active:
                    logs["load_imbalance"] = float(torch.stack([one.load_imbalance for one in active]).mean())
        self._trainer.log(logs, *arguments, **options)

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = [
                {
                    "params": parameters,
                    "name": kind,
                    "lr": self.learning_rates.get(kind, self.args.learning_rate),
                    "weight_decay": self.args.weight_decay,
                }
                for kind, parameters in self._trained().items()
            ]
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **settings)
        if self._hooked is not self.optimizer:  # a second `train` asks again
            self.optimizer.register_step_post_hook(lambda *_: after_step(self.model))
            self._hooked = self.optimizer
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter, the tokenizer and the arguments; all that Trainer saves beside the weights stays."""
        if not self._saves_adapter:
            self._trainer._save(output_dir, state_dict)
            return
        directory = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, directory)
        if self.args.should_save:
            if getattr(self, "processing_class", None) is not None:
                self.processing_class.save_pretrained(directory)
            torch.save(self.args, directory / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str | os.PathLike[str], model: Any = None) -> None:
        if self._saves_adapter:
            load_adapter(self.model, resume_from_checkpoint)
        else:
            self._trainer._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._saves_adapter:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            self._trainer._load_best_model()
