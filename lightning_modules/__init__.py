"""The trainer: the LightningModule, tasks, optimization, callbacks."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.adaptation import AdaptationModule

__all__ = ["AdaptationModule"]

# bitsandbytes, which peft imports, recommends a kernel that tasks/backbones/quantization.py switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import AdaptationModule on first use: tables and strategies work without the libraries of all tasks and data."""
    if name == "AdaptationModule":
        from lightning_modules.adaptation import AdaptationModule

        return AdaptationModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
