"""The trainer: one LightningModule, tasks, optimisation, callbacks."""

from lightning_modules.adaptation import AdaptationModule

__all__ = ["AdaptationModule"]
