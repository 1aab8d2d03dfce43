"""`--match-parameters`: the size at which an adapter comes nearest to a number of trained parameters."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fourier_moe import AdapterConfig, InjectionReport
from fourier_moe.errors import UserError
from lightning_modules.experiments.preflight import Variant

TOLERANCE = 0.2  # share of the budget by which an adapter may miss it
_NOT_COUNTED = ("head", "backbone")


@dataclass(frozen=True)
class Budget:
    """How many parameters the adapters may train, the head not counted.

    Args:
        amount: a number of parameters, or a percentage of the pretrained model's.
        is_percentage: which of the two.
    """

    amount: float
    is_percentage: bool

    @staticmethod
    def parse(text: str) -> Budget:
        """Parse `0.42%` or `150000`.

        Raises:
            UserError: if it is neither, or not positive.
        """
        number = text.removesuffix("%").replace("_", "").replace(",", "")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not 0 < amount < math.inf:
            raise UserError(f"--match-parameters {text!r} must be a positive number such as 150000, or a percentage: 0.42%")
        return Budget(amount, text.endswith("%"))

    def parameters(self, report: InjectionReport) -> float:
        """Return the budget as a number of parameters, for the model of `report`."""
        return self.amount / 100 * report.pretrained if self.is_percentage else self.amount


def adapter_parameters(report: InjectionReport) -> int:
    """Count the trained parameters of the adapters: experts, routers, or another method's own. The head does not count."""
    return sum(count for kind, count in report.trained.items() if kind not in _NOT_COUNTED)


def match(variant: Variant, budget: Budget) -> AdapterConfig:
    """Return the variant's adapter with the value of its `size_field` that comes nearest to the budget.

    A method without such a field stays as it is.

    Raises:
        UserError: if the adapter fits the model with no value at all, or nothing comes within TOLERANCE of the budget.
    """
    adapter = variant.adapter
    field, step = adapter.size_field, adapter.size_step
    if field is None:
        return adapter

    def sized(multiple: int) -> AdapterConfig:
        changes: dict[str, Any] = {field: multiple * step}
        return dataclasses.replace(adapter, **changes)

    with warnings.catch_warnings():  # of sizes that are only tried
        warnings.simplefilter("ignore")
        wanted = budget.parameters(variant.try_out(sized(1)))
        multiple, count = nearest(lambda number: adapter_parameters(variant.try_out(sized(number))), wanted)
    if abs(count - wanted) > TOLERANCE * wanted:
        raise UserError(
            f"--match-parameters asks for {wanted:,.0f} parameters, and {type(adapter).__name__} comes no nearer than "
            f"{count:,} ({field}={multiple * step}); give another budget"
        )
    return sized(multiple)


def nearest(count: Callable[[int], int], wanted: float) -> tuple[int, int]:
    """Find the number 1, 2, ... whose count is nearest to `wanted`.

    Args:
        count: rises with its argument, nearly in proportion beyond a constant, from 1 up to some largest argument above which
            it raises UserError. It is called a handful of times.
        wanted: the count to come near to.

    Returns:
        The number and its count.

    Raises:
        UserError: what `count(1)` raises.
    """
    low, low_count, slope = 1, count(1), 0.0
    high, high_count = math.inf, math.inf
    if low_count >= wanted:
        return low, low_count
    while high - low > 1:
        # Use the slope measured last; the first one is too steep, since it takes the count to have no constant.
        guess = low + max(1, int((wanted - low_count) / (slope or low_count)))
        if guess >= high:
            guess = (low + int(high)) // 2
        try:
            found = count(guess)
        except ValueError:  # larger than the model allows
            high, high_count = guess, math.inf
            continue
        if found <= wanted:
            slope = (found - low_count) / (guess - low)
            low, low_count = guess, found
        else:
            high, high_count = guess, found
    if high_count - wanted < wanted - low_count:
        return int(high), int(high_count)
    return low, low_count
