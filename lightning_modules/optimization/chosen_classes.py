"""Optimizers and schedulers of a user's choice, refused where they would not train as the parameter groups say."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fourier_moe.errors import UserError

_OWN_RATES = ("lr", "weight_decay")  # what every parameter group has
_PROGRESS = ("_step_count", "last_epoch", "_last_lr", "base_lrs", "_is_initial", "_get_lr_called_within_step", "verbose")
_TRIED_STEPS = 200
_BUILD_ERRORS = (TypeError, ValueError, RuntimeError, LookupError)


def new_optimizer(build: Callable[[Any], Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """Return what `build` makes of parameter groups.

    Raises:
        UserError: with the class's own words, if it does not take them.
    """
    return _built("optimizer", Optimizer, build, groups)


def new_scheduler(build: Callable[[Optimizer], LRScheduler], optimizer: Optimizer) -> LRScheduler:
    """Return what `build` makes of an optimizer.

    Raises:
        UserError: with the class's own words, if it does not take it.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler: LRScheduler = _built("schedule", LRScheduler, build, optimizer)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.setdefault("initial_lr", rate)  # all but ReduceLROnPlateau set it
    return scheduler


def sample_groups(rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return parameter groups of a few numbers, to try classes with before there is a model."""
    return [
        {"params": [nn.Parameter(torch.zeros(2, 2))], "name": name, "lr": rate, "weight_decay": 0.0}
        for name, rate in rates.items()
    ]


def check_optimizer(build: Callable[[Any], Optimizer], optimizer: Optimizer, decays: bool) -> None:
    """Refuse an optimizer that was given rates of its own, which would have no effect.

    Args:
        build: a class, a partial of it, or any function of the groups.
        optimizer: what `build` made of sample groups.
        decays: whether any group has a weight decay.

    Raises:
        UserError: naming the class and the setting.
    """
    name, known = type(optimizer).__name__, inspect.signature(type(optimizer)).parameters
    # The command line's partials are of a function, and hold the defaults too.
    given = build.keywords if isinstance(build, partial) and isinstance(build.func, type) else {}
    for setting in _OWN_RATES:
        default = known[setting].default if setting in known else inspect.Parameter.empty
        value = given.get(setting, optimizer.defaults.get(setting, default))
        if setting in given or (default is not inspect.Parameter.empty and value != default):
            raise UserError(
                f"optimization.optimizer sets {setting}={value} for {name}, but every group has its own; set "
                f"optimization.experts.{setting} and those of the other groups"
            )
    if decays and "weight_decay" not in optimizer.defaults:
        raise UserError(f"optimization.optimizer: {name} has no weight decay; set weight_decay of all groups to 0")


def check_scheduler(scheduler: LRScheduler, doubled: LRScheduler, rates: Sequence[float], interval: str) -> None:
    """Refuse a scheduler of sample groups that replaces their rates, and an interval without effect.

    A rate is scaled if it is twice as high for twice the peak rate. Rates may have a floor of their own, such as eta_min, below
    the peak rates. The first steps are tried.

    Args:
        scheduler: of sample groups.
        doubled: of the same groups with twice the rates.
        rates: peak rates of the groups.
        interval: schedule_interval.

    Raises:
        UserError: naming the class.
    """
    name = type(scheduler).__name__
    for group, rate in _replaced_rates(scheduler, doubled, rates):
        raise UserError(
            f"optimization.schedule: {name} replaces the learning rates of the groups by its own ({group['name']}: "
            f"{group['lr']:.3g}, not {rate:.3g}); choose a class that scales them, such as "
            "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts"
        )
    if isinstance(scheduler, ReduceLROnPlateau) and interval != "step":
        raise UserError(
            f"schedule_interval={interval!r} has no effect on {name}, which advances after validations; leave it out"
        )


def _replaced_rates(
    scheduler: LRScheduler, doubled: LRScheduler, rates: Sequence[float]
) -> Iterator[tuple[dict[str, Any], float]]:
    for _ in range(_TRIED_STEPS):
        for group, other, rate in zip(scheduler.optimizer.param_groups, doubled.optimizer.param_groups, rates, strict=True):
            scaled = math.isclose(other["lr"], 2 * group["lr"], rel_tol=1e-6)
            if group["initial_lr"] != rate or (not scaled and group["lr"] > rate * (1 + 1e-6)):
                yield group, rate
        if isinstance(scheduler, ReduceLROnPlateau):  # never raises a rate
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of steps without the optimizer's
                scheduler.step()
                doubled.step()
        except _BUILD_ERRORS:  # a schedule of fewer steps
            return


def check_direction(scheduler: LRScheduler, monitor: str, mode: str) -> None:
    """Refuse a ReduceLROnPlateau that waits for the wrong direction of what validation is judged by.

    Raises:
        UserError: naming the mode to set.
    """
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != mode:
        raise UserError(f"optimization.schedule: mode={scheduler.mode!r} must be {mode!r}, since it follows {monitor}")


def follow_validation(scheduler: LRScheduler, monitor: str, values: Mapping[str, Any]) -> None:
    """Advance a ReduceLROnPlateau by the results of a validation; do nothing for other schedulers.

    Raises:
        UserError: if the validation has not measured what the scheduler follows.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return
    if monitor not in values:
        raise UserError(f"optimization.schedule follows {monitor}, and validation measured {', '.join(values)}")
    scheduler.step(values[monitor])


def settings_of_class(optimizer: Optimizer) -> Mapping[str, Any]:
    """Return the settings that an optimizer was built with, without what it keeps in its groups while it trains."""
    known = inspect.signature(type(optimizer)).parameters
    return {name: value for name, value in optimizer.defaults.items() if name in known and name not in _OWN_RATES}


def settings_of_scheduler(scheduler: LRScheduler, prefix: str = "") -> dict[str, Any]:
    """Return what a new scheduler and those nested in it were built with, for a checkpoint: plain values without functions."""
    settings: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if name == "_schedulers":
            for index, nested in enumerate(value):
                settings[f"{prefix}schedulers.{index}"] = type(nested).__name__
                settings |= settings_of_scheduler(nested, f"{prefix}schedulers.{index}.")
        elif name not in _PROGRESS:
            plain = sorted(value.elements()) if isinstance(value, Counter) else value  # the milestones of MultiStepLR
            items = plain if isinstance(plain, list | tuple) else [plain]
            if all(item is None or isinstance(item, int | float | str) for item in items):
                settings[prefix + name.lstrip("_")] = plain
    return settings


def replace_base_rate(state: dict[str, Any], index: int, rate: float) -> None:
    """Write the peak rate of a parameter group into the state of a scheduler and of those nested in it."""
    if "base_lrs" in state:
        state["base_lrs"][index] = rate
    for nested in state.get("_schedulers", ()):
        replace_base_rate(nested, index, rate)


def _built(name: str, kind: type, build: Callable[[Any], Any], argument: Any) -> Any:
    try:
        built = build(argument)
    except _BUILD_ERRORS as error:
        raise UserError(f"optimization.{name} cannot be built: {' '.join(str(error).split())}") from error
    if not isinstance(built, kind):
        raise UserError(f"optimization.{name} makes a {type(built).__name__}, and has to make a {kind.__name__}")
    return built
