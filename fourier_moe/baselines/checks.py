"""What the configs of several methods check."""

from __future__ import annotations

import math
from typing import Any


def check_at_least_one(config: Any, field: str) -> None:
    """Refuse a count below 1.

    Raises:
        ValueError: naming the field and its value.
    """
    value = getattr(config, field)
    if value < 1:
        raise ValueError(f"{field}={value} must be at least 1")


def check_positive(config: Any, field: str) -> None:
    """Refuse a factor that is no positive number.

    Raises:
        ValueError: naming the field and its value.
    """
    value = getattr(config, field)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{field}={value} must be a positive number")


def check_not_negative(config: Any, field: str) -> None:
    """Refuse a weight that is negative or no number.

    Raises:
        ValueError: naming the field and its value.
    """
    value = getattr(config, field)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{field}={value} must be 0 or more")


def check_low_rank(config: Any) -> None:
    """Refuse an impossible r, alpha or dropout.

    Raises:
        ValueError: naming the field and its value.
    """
    check_at_least_one(config, "r")
    check_positive(config, "alpha")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout={config.dropout} must be in [0, 1)")


def rank_problem(r: int, largest: int) -> str | None:
    """What is wrong with a rank of which at most `largest` is possible, or None."""
    return f"r={r} must be at most {largest}" if r > largest else None
