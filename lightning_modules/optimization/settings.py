"""An optimizer with named parameter groups, each with its own learning rate, and a schedule of these rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fourier_moe import AdapterConfig
from fourier_moe.adapter import ParameterKind
from fourier_moe.config import check_types
from fourier_moe.errors import UserError
from fourier_moe.inject import after_step
from fourier_moe.report import trained_parameters
from lightning_modules.optimization.chosen_classes import (
    check_optimizer,
    check_scheduler,
    new_optimizer,
    new_scheduler,
    replace_base_rate,
    sample_groups,
    settings_of_class,
    settings_of_scheduler,
)

_SCHEDULES = ("linear", "cosine", "constant")
_ADAMW_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class ParameterGroup:
    """How to train one kind of parameters.

    Args:
        lr: peak learning rate; 0 does not change the parameters.
        weight_decay: AdamW's decoupled weight decay (per step, lr * weight_decay), or that of the chosen optimizer.
    """

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Optimization:
    """Optimizer and schedule. Every kind of trained parameters needs a group, and every group needs parameters.

    Args:
        experts: adapters' experts.
        router: adapters' routers; null for the learning rate and weight decay of the experts.
        adapter: adapters of methods without experts (LoRA and others).
        head: the head.
        backbone: the pretrained weights (full fine-tuning only).
        schedule: learning rate after warm-up: `linear` or `cosine` to 0 at the last step, or `constant`; or the class_path and
            init_args of a PyTorch scheduler (in Python, a function of the optimizer), which scales the groups' rates and needs
            warmup_ratio 0. ReduceLROnPlateau advances after every validation, by what the task is judged by there.
        warmup_ratio: share of all optimizer steps over which the rate rises from 0.
        betas: AdamW's moment decay rates.
        optimizer: class_path and init_args of another optimizer (in Python, a function of the parameter groups); null for
            AdamW. Learning rates and weight decay are those of the groups.
        schedule_interval: whether a scheduler given by its class advances after every optimizer `step` or every `epoch`.

    Raises:
        UserError: for an impossible value, or a class that cannot train these groups.
    """

    experts: ParameterGroup | None = None
    router: ParameterGroup | None = None
    adapter: ParameterGroup | None = None
    head: ParameterGroup | None = None
    backbone: ParameterGroup | None = None
    schedule: Literal["linear", "cosine", "constant"] | Callable[[Optimizer], LRScheduler] = "cosine"
    warmup_ratio: float = 0.03
    betas: tuple[float, float] = _ADAMW_BETAS
    optimizer: Callable[[Any], Optimizer] | None = None
    schedule_interval: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        check_types(self)
        if not callable(self.schedule) and self.schedule not in _SCHEDULES:
            raise UserError(f"schedule={self.schedule!r} must be one of {', '.join(_SCHEDULES)}")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"warmup_ratio={self.warmup_ratio} must be in [0, 1)")
        if len(self.betas) != 2 or not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas={self.betas} must be two numbers in [0, 1)")
        groups = {field.name: getattr(self, field.name) for field in fields(self)}
        for kind, group in groups.items():
            for name, value in vars(group).items() if isinstance(group, ParameterGroup) else ():
                if not (value >= 0 and math.isfinite(value)):
                    raise UserError(f"optimization.{kind}.{name}={value} must be 0 or more")
        self._check_classes(any(group.weight_decay for group in groups.values() if isinstance(group, ParameterGroup)))

    def _check_classes(self, decays: bool) -> None:
        """Build what was given by its class for a few numbers: a mistake is refused before anything is loaded."""
        if self.schedule_interval not in ("step", "epoch"):
            raise UserError(f"schedule_interval={self.schedule_interval!r} must be 'step' or 'epoch'")
        if self.optimizer is not None:
            if self.betas != _ADAMW_BETAS:
                raise UserError(
                    f"betas={self.betas} are AdamW's, and optimization.optimizer is given; set them in its init_args"
                )
            check_optimizer(self.optimizer, self._sample()[0], decays)
        if self.covers_run:
            if self.schedule_interval != "step":
                raise UserError(f"schedule_interval='epoch' is of scheduler classes; schedule={self.schedule!r} counts steps")
            return
        if self.warmup_ratio:
            raise UserError(f"warmup_ratio={self.warmup_ratio} is of named schedules; set it to 0 with a scheduler's class")
        optimizer, scheduler = self._sample()
        rates = [self._sample_rates()[group["name"]] for group in optimizer.param_groups]
        check_scheduler(scheduler, self._sample(2.0)[1], rates, self.schedule_interval)

    @property
    def covers_run(self) -> bool:
        """Whether the schedule is one of the named ones, which end with the run."""
        return isinstance(self.schedule, str)

    def _sample_rates(self) -> dict[str, float]:
        """Return the peak rates of the groups; without any group, of two."""
        groups = {kind: self._group(kind) for kind in get_args(ParameterKind)}
        return {kind: group.lr for kind, group in groups.items() if group is not None} or {"experts": 0.5, "head": 0.125}

    def _sample(self, factor: float = 1.0) -> tuple[Optimizer, LRScheduler]:
        """Build both for groups of a few numbers.

        Adapters may have experts without a router, which only the model tells. Lists by group, such as min_lr, may fit either.
        """
        rates = {kind: factor * rate for kind, rate in self._sample_rates().items()}
        without_router = {kind: rate for kind, rate in rates.items() if kind != "router" or self.router is not None}
        try:
            return self._built_for(rates)
        except UserError as error:
            try:
                return self._built_for(without_router)
            except UserError:
                raise error from None

    def _built_for(self, rates: dict[str, float]) -> tuple[Optimizer, LRScheduler]:
        optimizer = self._optimizer_of(sample_groups(rates))
        return optimizer, self.build_scheduler(optimizer, 1)

    def _optimizer_of(self, groups: list[dict[str, Any]]) -> Optimizer:
        return AdamW(groups, betas=self.betas) if self.optimizer is None else new_optimizer(self.optimizer, groups)

    def description(self) -> dict[str, Any]:
        """Return what checkpoints say of this: both classes, and the settings of a scheduler given by its class."""
        optimizer, scheduler = self._sample()
        settings = {} if self.covers_run else settings_of_scheduler(scheduler)
        names = {"optimizer": type(optimizer).__name__, "scheduler": type(scheduler).__name__}
        return {**names, "scheduler_settings": {"schedule_interval": self.schedule_interval, **settings}}

    def build_optimizer(self, model: nn.Module, config: AdapterConfig) -> Optimizer:
        """Return an optimizer of an adapted model's parameters in groups named experts, router, adapter, head and backbone.

        Raises:
            UserError: if trained parameters have no group, a group no parameters, or the chosen optimizer takes no such ones.
        """
        groups, method = [], type(config).__name__
        for kind, parameters in trained_parameters(model, config).items():
            group = self._group(kind)
            if parameters and group is None:
                raise UserError(f"optimization.{kind} is missing, but {method} trains {kind} parameters; give its lr")
            if parameters and group is not None:
                groups.append({"params": parameters, "name": kind, "lr": group.lr, "weight_decay": group.weight_decay})
            elif getattr(self, kind) is not None:
                remedy = "set it to null" + (", or name the head in the task's head_names" if kind == "head" else "")
                raise UserError(f"optimization.{kind} is given, but {method} trains no {kind} parameters; {remedy}")
        optimizer = self._optimizer_of(groups)
        optimizer.register_step_post_hook(lambda *_: after_step(model))
        return optimizer

    def build_scheduler(self, optimizer: Optimizer, num_steps: int) -> LRScheduler:
        """Return the schedule over `num_steps` optimizer steps, which a scheduler given by its class does not know."""
        if callable(self.schedule):
            return new_scheduler(self.schedule, optimizer)
        return LambdaLR(optimizer, self._share_of_peak(num_steps))

    def reschedule(self, scheduler: LRScheduler, num_steps: int) -> None:
        """Continue from the scheduler's current step with a named schedule over another number of steps.

        Also sets the rates of the next step, since a checkpoint restores those of the former schedule, which are 0 at the end
        of a finished run.
        """
        assert isinstance(scheduler, LambdaLR), "the schedule is not a named one"
        share = self._share_of_peak(num_steps)
        scheduler.lr_lambdas = [share] * len(scheduler.base_lrs)
        rates = [base * share(scheduler.last_epoch) for base in scheduler.base_lrs]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates  # returned by get_last_lr

    def _share_of_peak(self, num_steps: int) -> Callable[[int], float]:
        warmup = math.ceil(self.warmup_ratio * num_steps)
        return partial(_share_of_peak, schedule=str(self.schedule), warmup=warmup, num_steps=num_steps)

    def override(self, checkpoint: dict[str, Any]) -> None:
        """Write these rates, and the settings of the optimizer, into a Lightning checkpoint's optimizer and scheduler states.

        Without this a resumed run would silently continue with the stored values. The position in the schedule is kept.

        Raises:
            UserError: if the checkpoint is of another class of optimizers or schedulers, or its scheduler has other settings.
        """
        if checkpoint.get("optimizer_states"):
            self._require_same_classes({"optimizer": "AdamW", "scheduler": "LambdaLR"} | checkpoint.get("optimization", {}))
        settings = settings_of_class(self._sample()[0])
        # A checkpoint of weights alone has neither state, and tests do not need them.
        states = zip(checkpoint.get("optimizer_states", ()), checkpoint.get("lr_schedulers", ()), strict=True)
        for optimizer, scheduler in states:
            # The position in the schedule shows in any group with a rate; a group with rate 0 does not tell.
            factors = [group["lr"] / group["initial_lr"] for group in optimizer["param_groups"] if group["initial_lr"]]
            for index, group in enumerate(optimizer["param_groups"]):
                configured = self._group(group["name"])
                if configured is None:
                    continue
                if configured.lr != group["initial_lr"]:  # else the rate stays as it is, to the bit
                    factor = group["lr"] / group["initial_lr"] if group["initial_lr"] else next(iter(factors), 0.0)
                    group.update(lr=configured.lr * factor, initial_lr=configured.lr)
                group.update(settings, weight_decay=configured.weight_decay)
                replace_base_rate(scheduler, index, configured.lr)

    def _require_same_classes(self, stored: dict[str, Any]) -> None:
        remedy = "resume with the same, or start a new run from its weights with --model.adapter_path"
        own = self.description()
        for kind in ("optimizer", "scheduler"):
            if stored[kind] != own[kind]:
                raise UserError(f"the checkpoint's {kind} is {stored[kind]}, this run's is {own[kind]}; {remedy}")
        before, now = stored.get("scheduler_settings", {}), own["scheduler_settings"]
        changed = [name for name in now if name in before and before[name] != now[name]]
        if changed:
            old, new = (", ".join(f"{name}={settings[name]}" for name in changed) for settings in (before, now))
            raise UserError(f"the checkpoint's schedule has {old}, this run's {new}; {remedy}")

    def _group(self, kind: str) -> ParameterGroup | None:
        return getattr(self, kind) or (self.experts if kind == "router" else None)


def _share_of_peak(step: int, schedule: str, warmup: int, num_steps: int) -> float:
    """Return the learning rate at a step as a share of its peak. transformers has the same, in a module slow to import."""
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    rest = max(1, num_steps - warmup)
    if schedule == "linear":
        return max(0.0, (num_steps - step) / rest)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / rest))))
