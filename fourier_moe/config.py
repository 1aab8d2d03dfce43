"""What is adapted and how: frozen dataclasses, validated when they are made. They hold values and build nothing."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from fourier_moe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Base of every way to fine-tune. `inject` adapts a model as a config says.

    A subclass adds its settings as fields and their checks to `problems`.

    Args:
        head: modules that are trained in full and stored with the adapter (PEFT calls them modules_to_save); each entry is a
            module's whole dotted name (`classifier`) or a regular expression for it. Tasks fill it in.

    Raises:
        UserError: for impossible values, naming each and what would be valid.
    """

    head: Sequence[str] = ()

    trains_backbone: ClassVar[bool] = False  # whether the pretrained weights themselves are trained and saved
    training_only: ClassVar[frozenset[str]] = frozenset({"dropout", "balance_weight", "seed"})  # no effect on a trained adapter
    size_field: ClassVar[str | None] = None  # the field that sets the number of parameters, if there is one

    def __post_init__(self) -> None:
        _set_names(self, "head")
        check_types(self)
        problems = [*_unknown_choices(self), *self.problems()]
        if problems:
            raise UserError(f"{type(self).__name__}: {'; '.join(problems)}")

    def problems(self) -> list[str]:
        """Impossible settings: each names the field, its value, and what would be valid."""
        return []

    @property
    def size_step(self) -> int:
        """The values of `size_field` are multiples of this; a larger value means more trained parameters."""
        return 1

    def describe_size(self) -> str | None:
        """`r=8`, or None for a method without such a field."""
        return self.size_field and f"{self.size_field}={getattr(self, self.size_field)}"

    def advice(self) -> str | None:
        """Return what is valid, but slow without need, and what to change; `inject` warns of it."""
        return None

    def ignores(self, key: str) -> bool:
        """Whether files of an earlier version hold a tensor of this name that the adapter does not have any more."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and checkpoints; `class` holds the class's name."""
        return {"class": type(self).__name__, **dataclasses.asdict(self)}

    def difference(self, other: AdapterConfig) -> str | None:
        """Return the first setting that makes the two adapters incompatible, as text, or None."""
        if type(self) is not type(other):
            return f"method: {type(other).__name__} against {type(self).__name__}"
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in self.training_only and mine != theirs:
                return f"{field.name}: {theirs!r} against {mine!r}"
        return None


class StoredProjection(NamedTuple):
    """A projection's tensors in a file, by their names inside the projection, and the size of the model's projection."""

    in_features: int
    out_features: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ProjectionAdapterConfig(AdapterConfig):
    """Base of every method that replaces projections by adapters; `layer_of` registers the layer beside its class.

    Args:
        targets: projections to adapt; each entry is the end of a module's dotted name (`q_proj`, `attention.self.query`) or a
            regular expression for the whole name.
        seed: seed of everything that is random when the adapters are made. None is the run's seed_everything on the command
            line, and 0 in Python.
        normalize_input: `moments`: the adapter reads each feature of its input less its mean, over its standard deviation,
            times one number that keeps the input's overall size; the frozen projection reads the input itself. `fit` measures
            them on 16 batches before the first step (in Python: `measure_inputs`), without padding, and they stay frozen.
            Methods that compute with more than their input do not take it.
    """

    targets: Sequence[str]
    seed: int | None = None
    normalize_input: Literal["none", "moments"] = "none"

    normalizes_input: ClassVar[bool] = False  # whether the method's layer passes its input through `Adapter.reads`
    reads_weights: ClassVar[bool] = False  # whether the method computes with pretrained weights, which then cannot be quantized

    def __post_init__(self) -> None:
        _set_names(self, "targets")
        if not self.targets:
            raise UserError("targets is empty; name at least one projection, for example [q_proj, v_proj]")
        super().__post_init__()

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.normalize_input == "moments" and not self.normalizes_input:
            problems.append(
                "normalize_input='moments' must be 'none' for this method, whose update does not depend on the "
                "projection's input alone; FourierMoEConfig, LoRAConfig and others take 'moments'"
            )
        return problems

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        """Return what is impossible for a projection of this size, or None. Asked for all targets before any layer is built."""
        return None

    def num_stored(self, in_features: int, out_features: int) -> int:
        """Return the least count of numbers that a file holds for a projection of this size: those of its trained tensors."""
        return 0

    def check_stored(self, projections: Mapping[str, StoredProjection]) -> list[str]:
        """Find what shows that a file's tensors are not those of this config.

        Asked before any layer is built, so that a file cannot ask for layers that are larger than itself.

        Args:
            projections: by name, all those to adapt; at least one has tensors.
        """
        problems = []
        for name, (in_features, out_features, tensors) in projections.items():
            stored, needed = sum(tensor.numel() for tensor in tensors.values()), self.num_stored(in_features, out_features)
            needed += 2 * in_features * (self.normalize_input != "none")
            if tensors and stored < needed:
                problems.append(f"{name} has {stored:,} numbers in the file and needs {needed:,}")
        return problems


MAX_NAMES, MAX_LENGTH = 100_000, 1000  # beyond any model; compiling a stranger's expressions must end


def _set_names(config: AdapterConfig, field: str) -> None:
    """Check a list of module names or regular expressions and make it a tuple."""
    value = getattr(config, field)
    if isinstance(value, str) or not all(isinstance(entry, str) and entry for entry in value):
        raise UserError(f"{field} must be a list of names, got {value!r}; write {field}: [q_proj, v_proj]")
    if len(value) > MAX_NAMES or any(len(entry) > MAX_LENGTH for entry in value):
        raise UserError(f"{field} must have at most {MAX_NAMES} entries of at most {MAX_LENGTH} characters")
    for entry in value:
        try:
            re.compile(entry)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{field} holds {entry!r}, which is no valid regular expression: {error}") from error
    object.__setattr__(config, field, tuple(value))


_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    NoneType: (NoneType, "null"),
}


def check_types(config: Any) -> None:
    """Refuse values of another type than a dataclass's annotations say; numbers are no strings, and true is no number.

    Checks numbers, strings, booleans, choices (Literal) and lists of these; a whole number also fits `float`.

    Raises:
        UserError: naming each field, its value, and what would be valid.
    """
    problems = []
    for name, value, options in _annotated(config):
        if all(map(_is_known, options)) and not any(_fits(value, option) for option in options):
            expected = " or ".join(map(_description, options))
            problems.append(f"{name}={value!r} must be {expected}")
    if problems:
        raise UserError(f"{type(config).__name__}: {'; '.join(problems)}")


def _annotated(config: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield name, value and possible types of every field."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        yield field.name, getattr(config, field.name), get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_known(option: Any) -> bool:
    return option in _KINDS or get_origin(option) in (Literal, Sequence)


def _description(option: Any) -> str:
    if get_origin(option) is Sequence:
        return f"a list, each of it {_description(get_args(option)[0])}"
    return _KINDS[option][1] if option in _KINDS else _choices(option)


def _fits(value: Any, option: Any) -> bool:
    if get_origin(option) is Literal:
        return isinstance(value, str)  # `_unknown_choices` and a config's own checks look at which
    if get_origin(option) is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(entry, get_args(option)[0]) for entry in value)
    return isinstance(value, _KINDS[option][0]) and (option is bool or not isinstance(value, bool))


def _choices(option: Any) -> str:
    names = get_args(option)
    return f"one of {', '.join(names)}" if len(names) > 1 else repr(names[0])


def _unknown_choices(config: Any) -> list[str]:
    """Return the problems of fields that are one of several words."""
    return [
        f"{name}={value!r} must be {_choices(options[0])}"
        for name, value, options in _annotated(config)
        if len(options) == 1 and get_origin(options[0]) is Literal and value not in get_args(options[0])
    ]


# Checks that several methods share, for `problems`.


def at_least_one(config: Any, field: str) -> list[str]:
    """Check a count."""
    value = getattr(config, field)
    return [] if value >= 1 else [f"{field}={value} must be at least 1"]


def positive(config: Any, field: str) -> list[str]:
    """Check a factor."""
    value = getattr(config, field)
    fits = value is not None and value > 0 and math.isfinite(value)
    return [] if fits else [f"{field}={value} must be a positive number"]


def not_negative(config: Any, field: str) -> list[str]:
    """Check a weight or a count that may be zero."""
    value = getattr(config, field)
    return [] if value >= 0 and math.isfinite(value) else [f"{field}={value} must be 0 or more"]


def dropout(config: Any) -> list[str]:
    """Check a dropout rate: some of the input has to remain."""
    return [] if 0 <= config.dropout < 1 else [f"dropout={config.dropout} must be in [0, 1)"]


def top_k(config: Any, least: int = 1) -> list[str]:
    """Check the number of active experts."""
    fits = least <= config.top_k <= config.num_experts
    return [] if fits else [f"top_k={config.top_k} must be between {least} and num_experts={config.num_experts}"]


def multiple(config: Any, field: str, step: int, meaning: str) -> list[str]:
    """Check a count that is shared out evenly: a positive multiple of `step`, which is what `meaning` names."""
    value = getattr(config, field)
    if step < 1 or (value >= 1 and value % step == 0):
        return []
    lower = max(step, value // step * step)
    nearest = f"{lower}" if lower >= value else f"{lower} or {lower + step}"
    return [f"{field}={value} must be a positive multiple of {meaning} = {step}; nearest valid: {nearest}"]


def rank_problem(r: int, largest: int) -> str | None:
    """Return what is wrong with a rank above the largest possible one, or None."""
    return f"r={r} must be at most {largest}" if r > largest else None
