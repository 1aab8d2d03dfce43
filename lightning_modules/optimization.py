"""AdamW with named parameter groups, each with its own learning rate, and warm-up schedules counted in steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fourier_moe import AdapterConfig
from fourier_moe.config import check_types
from fourier_moe.errors import UserError
from fourier_moe.inject import after_step
from fourier_moe.report import trained_parameters

_SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class ParameterGroup:
    """How to train one kind of parameters.

    Args:
        lr: peak learning rate; 0 does not change the parameters.
        weight_decay: AdamW's decoupled weight decay (per step, lr * weight_decay).
    """

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Optimization:
    """AdamW and its schedule. Every kind of trained parameters needs a group, and every group needs parameters.

    Args:
        experts: adapters' experts.
        router: adapters' routers; null for the learning rate and weight decay of the experts.
        adapter: adapters of methods without experts (LoRA and others).
        head: the head.
        backbone: the pretrained weights (full fine-tuning only).
        schedule: learning rate after warm-up: `linear` or `cosine` to 0 at the last step, or `constant`.
        warmup_ratio: share of all optimizer steps over which the rate rises from 0.
        betas: AdamW's moment decay rates.
    """

    experts: ParameterGroup | None = None
    router: ParameterGroup | None = None
    adapter: ParameterGroup | None = None
    head: ParameterGroup | None = None
    backbone: ParameterGroup | None = None
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        check_types(self)
        if self.schedule not in _SCHEDULES:
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

    def build_optimizer(self, model: nn.Module, config: AdapterConfig) -> AdamW:
        """Return AdamW over an adapted model's parameters in groups named experts, router, adapter, head and backbone.

        Raises:
            UserError: if trained parameters have no group, or a group no parameters.
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
        optimizer = AdamW(groups, betas=self.betas)
        optimizer.register_step_post_hook(lambda *_: after_step(model))
        return optimizer

    def build_scheduler(self, optimizer: AdamW, num_steps: int) -> LambdaLR:
        """Return the schedule over `num_steps` optimizer steps."""
        return LambdaLR(optimizer, self._share_of_peak(num_steps))

    def reschedule(self, scheduler: LambdaLR, num_steps: int) -> None:
        """Continue from the scheduler's current step with a schedule over another number of steps.

        Also sets the rates of the next step, since a checkpoint restores those of the former schedule, which are 0 at the end
        of a finished run.
        """
        share = self._share_of_peak(num_steps)
        scheduler.lr_lambdas = [share] * len(scheduler.base_lrs)
        rates = [base * share(scheduler.last_epoch) for base in scheduler.base_lrs]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates  # returned by get_last_lr

    def _share_of_peak(self, num_steps: int) -> Callable[[int], float]:
        warmup = math.ceil(self.warmup_ratio * num_steps)
        return partial(_share_of_peak, schedule=self.schedule, warmup=warmup, num_steps=num_steps)

    def override(self, checkpoint: dict[str, Any]) -> None:
        """Write these learning rates, weight decays and betas into a Lightning checkpoint's optimizer and scheduler states.

        Without this a resumed run would silently continue with the stored values. The position in the schedule is kept.
        """
        # A checkpoint of weights alone has neither state, and tests do not need them.
        states = zip(checkpoint.get("optimizer_states", ()), checkpoint.get("lr_schedulers", ()), strict=True)
        for optimizer, scheduler in states:
            # The position in the schedule shows in any group with a rate; a group with rate 0 does not tell.
            factors = [group["lr"] / group["initial_lr"] for group in optimizer["param_groups"] if group["initial_lr"]]
            progress = factors[0] if factors else 0.0
            for index, group in enumerate(optimizer["param_groups"]):
                configured = self._group(group["name"])
                if configured is None:
                    continue
                group.update(
                    lr=configured.lr * progress,
                    initial_lr=configured.lr,
                    weight_decay=configured.weight_decay,
                    betas=self.betas,
                )
                scheduler["base_lrs"][index] = configured.lr

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
