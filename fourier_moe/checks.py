"""What the configs of several methods check. Every check gives the problems that it finds: field, value, and what is valid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fourier_moe.errors import UserError


def refuse(config: Any, problems: Sequence[str]) -> None:
    """Raise one error for all problems of a config; none without problems.

    Raises:
        UserError: naming the config's class.
    """
    if problems:
        raise UserError(f"{type(config).__name__}: {'; '.join(problems)}")


def at_least_one(config: Any, field: str) -> list[str]:
    """Of a count."""
    value = getattr(config, field)
    return [] if value >= 1 else [f"{field}={value} must be at least 1"]


def positive(config: Any, field: str) -> list[str]:
    """Of a factor."""
    value = getattr(config, field)
    fits = value is not None and value > 0 and math.isfinite(value)
    return [] if fits else [f"{field}={value} must be a positive number"]


def not_negative(config: Any, field: str) -> list[str]:
    """Of a weight, or of a number of which there may be none."""
    value = getattr(config, field)
    return [] if value >= 0 and math.isfinite(value) else [f"{field}={value} must be 0 or more"]


def dropout(config: Any) -> list[str]:
    """Of a share of which something has to be left."""
    return [] if 0 <= config.dropout < 1 else [f"dropout={config.dropout} must be in [0, 1)"]


def top_k(config: Any, least: int = 1) -> list[str]:
    """Of the number of active experts."""
    fits = least <= config.top_k <= config.num_experts
    return [] if fits else [f"top_k={config.top_k} must be between {least} and num_experts={config.num_experts}"]


def low_rank(config: Any) -> list[str]:
    """Of r, alpha and dropout."""
    return [*at_least_one(config, "r"), *positive(config, "alpha"), *dropout(config)]


def rank_problem(r: int, largest: int) -> str | None:
    """What is wrong with a rank of which at most `largest` is possible, or None."""
    return f"r={r} must be at most {largest}" if r > largest else None
