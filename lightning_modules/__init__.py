"""The trainer: the LightningModule, tasks, optimization, callbacks."""

import logging

# bitsandbytes, which peft imports, recommends a kernel that tasks/backbones/quantization.py switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from lightning_modules.adaptation import AdaptationModule  # noqa: E402

__all__ = ["AdaptationModule"]
