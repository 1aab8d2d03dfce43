"""The hyperparameters of a run as a flat table, by the names of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from fourier_moe import AdapterConfig
from lightning_modules.adaptation import AdaptationModule

TRAINER = (
    "max_epochs",
    "max_steps",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
)  # settings that affect the result


def hyperparameters(
    trainer: L.Trainer, module: AdaptationModule | None, adapter: AdapterConfig
) -> dict[str, bool | int | float | str]:
    """Return `adapter.num_experts`, `optimization.experts.lr`, `task.model`, ..., without null and empty values.

    Task, data, trainer and seed are known only if the command line started the run. Without `module`, for a LightningModule of
    another class, there are the values of `adapter` only; Lightning logs those of its `save_hyperparameters`.
    """
    values: dict[str, Any] = {"adapter": adapter.to_dict()}
    if module is None:
        return dict(_flat("", values))
    if module.optimization is not None:
        values["optimization"] = asdict(module.optimization)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            config = callback.config.as_dict()
            values["optimization"] = config["model"]["optimization"]  # names classes
            values |= {"task": config["model"]["task"], "data": config["data"], "seed": config["seed_everything"]}
            values["trainer"] = {name: config["trainer"][name] for name in TRAINER}
    return dict(_flat("", values))


def _flat(name: str, value: Any) -> list[tuple[str, bool | int | float | str]]:
    if value is None or value in ((), [], ""):
        return []
    if isinstance(value, Mapping):
        return [item for key, inner in value.items() for item in _flat(_joined(name, key), inner)]
    if name.endswith("class_path"):
        return [(name.removesuffix("_path"), str(value).rpartition(".")[2])]
    if isinstance(value, (list, tuple)):
        return [(name, ", ".join(map(str, value)))]
    return [(name, value if isinstance(value, (bool, int, float)) else str(value))]


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}".removeprefix(".") if key != "init_args" else name
