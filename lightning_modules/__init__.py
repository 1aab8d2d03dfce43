"""The trainer: one LightningModule, tasks, optimization, callbacks."""

import logging

# Imported by peft, imported by transformers, bitsandbytes asks everybody for a kernel that tasks/quantization.py switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from lightning_modules.adaptation import AdaptationModule  # noqa: E402

__all__ = ["AdaptationModule"]
