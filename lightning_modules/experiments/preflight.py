"""Checks before the first run: does every variant parse and fit its model, and how large is it?"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fourier_moe import AdapterConfig, InjectionReport, inject
from fourier_moe.errors import UserError
from lightning_modules.cli import AdaptationCLI, user_error
from lightning_modules.experiments.grid import require_named_logger, resolved_config
from lightning_modules.experiments.provenance import without_logger
from lightning_modules.optimization import Optimization
from lightning_modules.tasks.backbones.quiet import quiet
from lightning_modules.tasks.base import Task, task_data

_Given = TypeVar("_Given")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Variant:
    """The parsed arguments of `fit` of one variant.

    Attributes:
        adapter: the method and its settings.
        optimization: learning rates and schedule.
        outline: the pretrained model and its head on the meta device: shapes without weights.
        head_names: modules of the outline that are trained in full.
        config: every setting, for seed 0.
    """

    adapter: AdapterConfig
    optimization: Optimization
    outline: nn.Module
    head_names: Sequence[str]
    config: Mapping[str, Any]

    def try_out(self, adapter: AdapterConfig) -> InjectionReport:
        """Inject an adapter into a copy of the outline, which needs no memory and little time, and group the parameters.

        Raises:
            UserError: if the adapter does not fit the model, or the optimization does not fit the adapter.
        """
        model, adapter = copy.deepcopy(self.outline), dataclasses.replace(adapter, head=self.head_names)
        report = inject(model, adapter)
        self.optimization.build_optimizer(model, adapter)
        return report


def parse_grid(grid: Mapping[str, Sequence[str]], metric: str | None = None) -> dict[str, Variant]:
    """Parse every variant and load every pretrained model, usually one, once.

    Weights are needed only for their shapes and then dropped: the runs load them again, one run at a time.

    Args:
        grid: arguments of `fit` by variant.
        metric: test metric that every task must have.

    Raises:
        UserError: one message with all problems of all variants.
    """
    outlines: dict[str, tuple[nn.Module, list[str]]] = {}
    return for_each(grid, lambda _, words: _parse(words, metric, outlines))


def for_each(variants: Mapping[str, _Given], check: Callable[[str, _Given], _Found]) -> dict[str, _Found]:
    """Return what a check finds for every variant.

    Args:
        variants: what is checked, by variant.
        check: takes a variant's name and what stands for it, and raises ValueError if that cannot be run.

    Raises:
        UserError: one message with all problems; equal ones once.
    """
    found: dict[str, _Found] = {}
    names: dict[str, list[str]] = {}
    for name, given in variants.items():
        try:
            found[name] = check(name, given)
        except ValueError as error:
            names.setdefault(f"{user_error(error) or error}", []).append(name)
    if names:
        raise UserError("nothing was run; " + "; ".join(f"{', '.join(own)}: {problem}" for problem, own in names.items()))
    return found


def require_metric(task: Task, metric: str | None) -> None:
    """Refuse a test metric that the task does not have.

    Raises:
        UserError: naming those it has.
    """
    known = [*task.new_metrics(), "loss"]
    if metric and (metric.rpartition("/")[2] not in known or metric.startswith("test/")):
        raise UserError(f"--metric {metric!r} is not a metric of the task; known: {', '.join(map(str, known))}")


def parse_run(words: Sequence[str]) -> AdaptationCLI:
    """Parse the arguments of `fit` for seed 0.

    Raises:
        UserError: if they do not parse.
    """
    errors = io.StringIO()
    try:
        # Lightning prints the devices and the seed; the runs print them again.
        with contextlib.redirect_stderr(errors), quiet(logging.INFO):
            return AdaptationCLI([*words, "--seed_everything", "0"], run=False)
    except SystemExit as error:
        message = errors.getvalue().partition("error: ")[2].strip()
        raise UserError(message or "the config does not parse") from error


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting of a resolved config by its dotted name, without its files and its logger, which runs replace."""
    return dict(_flatten("", {**without_logger(config), "config": None}))


def _parse(words: Sequence[str], metric: str | None, outlines: dict[str, tuple[nn.Module, list[str]]]) -> Variant:
    cli = parse_run(words)
    model, config = cli.model, resolved_config(cli)
    require_named_logger(config)
    if model.optimization is None:
        raise UserError("optimization is missing; fit needs learning rates")
    names: list[str] = [*task_data(cli.datamodule).class_names]
    num_classes = len(names) or model.num_classes
    key = json.dumps([config["model"]["task"], num_classes], sort_keys=True)
    if key not in outlines:
        built = model.task.build(num_classes, names or [f"class {index}" for index in range(num_classes or 0)])
        require_metric(model.task, metric)
        outlines[key] = outline(built), [*model.task.head_names]
    return Variant(model.adapter, model.optimization, *outlines[key], config)


def outline(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device, made without copying its weights first."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def unfair_differences(variants: Mapping[str, Variant]) -> list[str]:
    """Find settings other than adapter and optimization in which variants differ, and differences in the adapters' targets.

    Returns:
        One line for each setting in which a variant differs from the first.
    """
    (first, reference), *others = variants.items()
    settings = _common_settings(reference)
    notes = []
    for name, variant in others:
        own = _common_settings(variant)
        for key in sorted(settings.keys() | own.keys()):
            if settings.get(key) != own.get(key):
                notes.append(f"{key} is {own.get(key)!r} for {name} and {settings.get(key)!r} for {first}")
        targets: list[Any] = [getattr(config, "targets", None) for config in (reference.adapter, variant.adapter)]
        if None not in targets and targets[0] != targets[1]:
            notes.append(f"targets are {list(targets[1])} for {name} and {list(targets[0])} for {first}")
    return notes


def _common_settings(variant: Variant) -> dict[str, Any]:
    """Return every setting that all variants should share, by its dotted name."""
    model = {key: value for key, value in variant.config["model"].items() if key not in ("adapter", "optimization")}
    return dict(_flatten("", {**variant.config, "model": model, "config": None}))


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
