"""Doors into other trainers: an adapted model in `transformers.Trainer`, in TRL, or in a loop that cannot be changed."""

from fourier_moe.integrations.loss_hook import add_balance_loss
from fourier_moe.integrations.trainer_mixin import AdapterTrainerMixin

__all__ = ["AdapterTrainerMixin", "add_balance_loss"]
