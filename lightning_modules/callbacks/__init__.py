"""What a run writes beside logs and checkpoints."""

from lightning_modules.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_modules.callbacks.predictions import PredictionsWriter

__all__ = ["AdapterCheckpoint", "PredictionsWriter"]
