"""Arguments of Lightning's Trainer that cannot be right, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from fourier_moe.errors import UserError

MAX_SEED = 2**32 - 1

_REFUSED = (MisconfigurationException, ValueError, TypeError, ImportError)  # what Lightning raises of arguments
_HARDWARE = ("accelerator", "devices", "strategy")


def check_trainer_arguments(config: Mapping[str, Any], trains: bool) -> None:
    """Refuse what Lightning takes and stumbles over later, or does not notice.

    Args:
        config: the Trainer's arguments.
        trains: whether the command trains.

    Raises:
        UserError: naming the argument and its value.
    """
    at_least = {"accumulate_grad_batches": 1, "log_every_n_steps": 0, "gradient_clip_val": 0, "check_val_every_n_epoch": 1}
    for name, least in at_least.items():
        value = config.get(name)
        if value is not None and value < least:
            raise UserError(f"trainer.{name}={value} must be {least} or more")
    if config.get("val_check_interval") == 0:
        raise UserError("trainer.val_check_interval=0 must be above 0; trainer.limit_val_batches=0 switches validation off")
    for name in ("max_epochs", "max_steps", "limit_train_batches") if trains else ():
        if config.get(name) == 0:
            raise UserError(f"trainer.{name}=0 would train nothing; it must be above 0")


@contextmanager
def refused_by_lightning(config: Mapping[str, Any]) -> Iterator[None]:
    """Turn Lightning's refusal of the Trainer's arguments into one line that names them.

    Raises:
        UserError: for any error about arguments.
    """
    try:
        yield
    except UserError:
        raise
    except _REFUSED as error:
        text = re.sub(r"\s*HINT:.*", "", " ".join(str(error).split()))
        named = {name for name in config if re.search(rf"\b{name}\b", text)}
        if not named or named & {*_HARDWARE}:
            named |= {*_HARDWARE}
        values = ", ".join(f"{name}={value}" for name, value in config.items() if name in named and value is not None)
        raise UserError(f"trainer ({values}): {text}") from error
