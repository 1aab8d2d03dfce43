import re

import pytest

from fourier_moe.errors import UserError
from lightning_modules.experiments.preflight import for_each


def refuse_even(_, number):
    if number % 2 == 0:
        raise UserError("even")
    if number > 4:
        raise ValueError(f"{number} is too large")
    return 10 * number


def test_every_variant_is_checked_and_its_finding_returned_in_order():
    assert list(for_each({"b": 3, "a": 1}, refuse_even).items()) == [("b", 30), ("a", 10)]


def test_all_problems_come_in_one_message_and_equal_ones_once():
    message = "nothing was run; a, c: even; d: 5 is too large"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        for_each({"a": 2, "b": 1, "c": 4, "d": 5}, refuse_even)


def test_an_error_that_is_no_mistake_of_the_user_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        for_each({"a": 0}, lambda _, number: 1 / number)
