"""Checked values from untrusted files: unambiguous JSON, and values of the expected types."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from fourier_moe.errors import UserError

LARGEST = 2**63  # stored numbers stay below this; Python's integers are unbounded, and so may be arithmetic with them

_T = TypeVar("_T")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def parse_json(text: str | bytes) -> Any:
    """Parse JSON without duplicate keys and unpaired surrogates.

    Raises:
        UserError: in one line, for whatever is wrong.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    except UnicodeError as error:
        raise UserError("it holds text that is no Unicode") from error
    return value


def of_type(value: Any, *kinds: type[_T]) -> _T:
    """Return the value, if it is of one of these types itself: True is no int here.

    Raises:
        UserError: naming both.
    """
    if type(value) not in kinds or (type(value) is int and not -LARGEST < value < LARGEST):
        names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise UserError(f"{_short.repr(value)} where {names} was expected")
    return value


def mapping_of(value: Any, *kinds: type[_T]) -> dict[str, _T]:
    """Return a mapping of texts to values of these types.

    Raises:
        UserError: naming the first wrong one.
    """
    return {of_type(key, str): of_type(item, *kinds) for key, item in of_type(value, dict).items()}


def sequence_of(value: Any, kind: type[_T]) -> list[_T]:
    """Return a list of values of this type.

    Raises:
        UserError: naming the first wrong one.
    """
    return [of_type(item, kind) for item in of_type(value, list)]


def settings_of(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Return an object of a dataclass, of values that are checked against the types of its fields.

    Fields of types that are not known here are left to the class.

    Raises:
        UserError: for unknown and missing fields, wrong types, and whatever the class refuses.
    """
    hints = _hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{kind.__name__} has no setting {_short.repr(key)}")
        if not _fits(value, hints[key]):
            raise UserError(f"{kind.__name__}: {key}={_short.repr(value)} is no {_name(hints[key])}")
    try:
        return kind(**values)
    except (ArithmeticError, AttributeError, RecursionError, TypeError) as error:
        raise UserError(f"{kind.__name__}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"the key {_short.repr(twice)} is there twice")
    return result


def _hints(kind: type) -> dict[str, Any]:
    try:
        known = typing.get_type_hints(kind)
    except NameError:  # a plugin's, of a type that it imports for type checkers alone
        known = {}
    return {field.name: known.get(field.name, Any) for field in dataclasses.fields(kind) if field.init}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value)
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float) if hint is float else int):
            return False
        return -LARGEST < value < LARGEST if isinstance(value, int) else math.isfinite(value)
    if hint in (bool, str, types.NoneType):
        return isinstance(value, hint)
    return True


def _name(hint: Any) -> str:
    if hint is types.NoneType:
        return "null"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_name, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint).replace("typing.", "")
