"""What is adapted and how: frozen dataclasses, validated when they are made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from fourier_moe.checks import at_least_one, dropout, not_negative, refuse, top_k
from fourier_moe.errors import UserError
from fourier_moe.files.stored_values import settings_of

if TYPE_CHECKING:
    from fourier_moe.adapter import Adapter
    from fourier_moe.inject import InjectionReport


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Base of every way to fine-tune: a way to turn a pretrained model into one with few trained parameters.

    Args:
        head: modules that are trained in full and stored with the adapter (PEFT calls them modules_to_save); each entry is a
            module's whole dotted name (`classifier`) or a regular expression for it. Tasks fill it in.
    """

    head: Sequence[str] = ()

    _training_only: ClassVar[frozenset[str]] = frozenset()  # fields without effect on a trained adapter's output
    size_field: ClassVar[str | None] = None  # the field that says how many parameters there are, if one does

    def __post_init__(self) -> None:
        _set_names(self, "head")

    @property
    def size_step(self) -> int:
        """The values of `size_field` are multiples of this; more of it are more trained parameters."""
        return 1

    def describe_size(self) -> str | None:
        """`r=8`, or None for a method without such a field."""
        return self.size_field and f"{self.size_field}={getattr(self, self.size_field)}"

    def inject(self, model: nn.Module) -> InjectionReport:
        """Adapt `model` in place and freeze everything else.

        Raises:
            UserError: if a head matches nothing, or the model cannot be adapted this way.
        """
        raise NotImplementedError

    def trains_backbone(self) -> bool:
        """True if the pretrained weights themselves are trained and belong to what is saved."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and checkpoints; `class` holds the class's name."""
        return {"class": type(self).__name__, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> AdapterConfig:
        """Inverse of `to_dict`; the class is looked up among those imported, so that a file never makes us import code.

        Raises:
            UserError: for an unknown class, or values that it refuses.
        """
        known: dict[str, type[AdapterConfig]] = {kind.__name__: kind for kind in _subclasses(AdapterConfig)}
        name = values.get("class") if isinstance(values, Mapping) else None
        if not isinstance(name, str) or name not in known:
            raise UserError(f"config class {name!r} is unknown; known: {', '.join(known)}; import the package that defines it")
        return settings_of(known[name], {key: value for key, value in values.items() if key != "class"})

    def difference(self, other: AdapterConfig) -> str | None:
        """The first setting that makes the two adapters incompatible, as text, or None."""
        if type(self) is not type(other):
            return f"method: {type(other).__name__} against {type(self).__name__}"
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in self._training_only and mine != theirs:
                return f"{field.name}: {theirs!r} against {mine!r}"
        return None


class StoredProjection(NamedTuple):
    """A projection's tensors in a file, by their names inside the projection, and the size of that of the model."""

    in_features: int
    out_features: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ProjectionAdapterConfig(AdapterConfig):
    """Base of every method that puts an adapter in the place of each of some projections: a subclass implements `build_layer`.

    Args:
        targets: projections to adapt; each entry is the end of a module's dotted name (`q_proj`, `attention.self.query`) or a
            regular expression for the whole name.
    """

    targets: Sequence[str]

    reads_weights: ClassVar[bool] = False  # whether the method computes with pretrained weights, which then cannot be quantised

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_names(self, "targets")
        if not self.targets:
            raise UserError("targets is empty; name at least one projection, for example [q_proj, v_proj]")

    def inject(self, model: nn.Module) -> InjectionReport:
        from fourier_moe.inject import replace_targets

        return replace_targets(model, self)

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        """What is impossible for a projection of this size, or None. Asked for all targets before any layer is built."""
        return None

    def num_stored(self, in_features: int, out_features: int) -> int:
        """How many numbers a file holds at least for a projection of this size: what its trained tensors have."""
        return 0

    def check_stored(self, projections: Mapping[str, StoredProjection]) -> list[str]:
        """What shows that a file's tensors are not those of this config; asked before any layer is built.

        So a file cannot ask for layers that are larger than itself.

        Args:
            projections: by name, all those to adapt; at least one has tensors.
        """
        problems = []
        for name, (in_features, out_features, tensors) in projections.items():
            stored, needed = sum(tensor.numel() for tensor in tensors.values()), self.num_stored(in_features, out_features)
            if tensors and stored < needed:
                problems.append(f"{name} has {stored:,} numbers in the file and needs {needed:,}")
        return problems

    def build_layer(self, base: nn.Module, name: str) -> Adapter:
        """The adapter that takes the place of projection `base`, known in the model as `name`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FourierMoEConfig(ProjectionAdapterConfig):
    """FourierMoE (arXiv 2604.01762): per projection a token router and experts in separate frequency bands of the update.

    Args:
        num_coefficients: n, trained spectral scalars of one projection, summed over its experts. Each expert gets
            P = n / (2 num_experts) conjugate pairs, a complex coefficient (two scalars) each.
        num_experts: E.
        top_k: K, experts active per token.
        bandwidth: B, width of an expert's band in units of the normalised radius (0 = DC, 1 = corner of the plane).
        band_layout: where the bands lie. `cover`: centres (e + 1/2)/E, spread over all frequencies. `stack`: centres
            (e + 1/2) B, side by side from DC outwards (the paper's bandwidth sweep). A list: the centres of the num_experts
            bands, as `train.py analyze` suggests them.
        scaling: alpha, the factor of the update. A number is the paper's. `relative` sets it from each projection's shape and
            pair count such that coefficients of root mean square modulus 1 give an update of Frobenius norm
            sqrt(out_features), the norm of a typical pretrained weight: one learning rate then serves all widths, models and
            coefficient counts.
        dropout: dropout on the experts' input.
        balance_weight: lambda, weight of the load-balancing loss, which is summed over the adapted projections.
        router_scope: `projection`: every projection has its own router. `input`: projections that read the same input (q, k
            and v; gate and up) share one. `block`: the adapted projections of a transformer block share one for each width
            of input.
        normalize_gates: divide the K gates of a token by their sum (always off for top_k = 1).
        init_std: standard deviation of the initial coefficients; 0 starts exactly at the pretrained model.
        seed: seed of positions and of the router's start; together with a projection's name it fixes both. None is the run's
            seed_everything on the command line, and 0 in Python.
        coefficients: `complex`, or an ablation: `real` or `imaginary` trains that part only (n/2 scalars, same positions).
        frequency_bias: draw positions by band; off (ablation): uniformly over the plane.
        conjugate_symmetry: every position implies its conjugate partner; off (ablation): free single positions drawn from the
            full plane, of whose inverse transform the real part is taken.
        permute: a control that the paper lacks: rows and columns of the update are put in a fixed random order, so that near
            in frequency no longer means near in the weight.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    num_coefficients: int
    num_experts: int = 8
    top_k: int = 2
    bandwidth: float = 0.12
    band_layout: Literal["cover", "stack"] | Sequence[float] = "cover"
    scaling: float | Literal["relative"] = "relative"
    dropout: float = 0.0
    balance_weight: float = 1e-3
    router_scope: Literal["projection", "input", "block"] = "projection"
    normalize_gates: bool = True
    init_std: float = 0.0
    seed: int | None = None
    coefficients: Literal["complex", "real", "imaginary"] = "complex"
    frequency_bias: bool = True
    conjugate_symmetry: bool = True
    permute: bool = False

    _training_only = frozenset({"dropout", "balance_weight", "init_std", "seed"})
    size_field = "num_coefficients"

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [*at_least_one(self, "num_experts"), *top_k(self)]
        if self.num_coefficients < 1 or (self.num_experts >= 1 and self.num_coefficients % (2 * self.num_experts)):
            problems.append(self._indivisible())
        if not (self.bandwidth > 0 and math.isfinite(self.bandwidth)):
            problems.append(f"bandwidth={self.bandwidth} must be a positive number, 0.12 in the paper")
        if isinstance(self.scaling, str):
            if self.scaling != "relative":
                problems.append(f"scaling={self.scaling!r} must be a positive number or 'relative'")
        elif not (self.scaling > 0 and math.isfinite(self.scaling)):
            problems.append(f"scaling={self.scaling} must be a positive number or 'relative'")
        problems += [*dropout(self), *not_negative(self, "balance_weight"), *not_negative(self, "init_std")]
        for field, choices in (
            ("coefficients", ("complex", "real", "imaginary")),
            ("router_scope", ("projection", "input", "block")),
        ):
            if getattr(self, field) not in choices:
                problems.append(f"{field}={getattr(self, field)!r} must be one of {', '.join(choices)}")
        refuse(self, [*problems, *self._check_layout()])

    def _check_layout(self) -> list[str]:
        if self.band_layout in ("cover", "stack"):
            return []
        if isinstance(self.band_layout, (list, tuple)) and all(isinstance(c, (int, float)) for c in self.band_layout):
            object.__setattr__(self, "band_layout", tuple(map(float, self.band_layout)))
            inside = all(0 <= center <= 1 for center in self.band_layout)
            if inside and len(set(self.band_layout)) == self.num_experts and sorted(self.band_layout) == [*self.band_layout]:
                return []
        return [
            f"band_layout={self.band_layout!r} must be one of cover, stack, or a list of num_experts={self.num_experts} "
            "increasing centres between 0 and 1"
        ]

    def _indivisible(self) -> str:
        message = f"num_coefficients={self.num_coefficients} must be a positive multiple of 2 * num_experts"
        if self.num_experts < 1:
            return message
        step = 2 * self.num_experts
        lower = max(step, self.num_coefficients // step * step)
        nearest = f"{lower}" if lower >= self.num_coefficients else f"{lower} or {lower + step}"
        return f"{message} = {step}; nearest valid: {nearest}"

    @property
    def size_step(self) -> int:
        return 2 * self.num_experts

    @property
    def pairs_per_expert(self) -> int:
        """P, frequency positions of one expert."""
        return self.num_coefficients // (2 * self.num_experts)

    def check_stored(self, projections: Mapping[str, StoredProjection]) -> list[str]:
        from fourier_moe.spectral.stored_experts import check_stored

        return check_stored(self, projections)

    def build_layer(self, base: nn.Module, name: str) -> Adapter:
        from fourier_moe.spectral.layer import FourierMoELinear

        return FourierMoELinear(base, self, name)

    def inject(self, model: nn.Module) -> InjectionReport:
        from fourier_moe.inject import count_parameters
        from fourier_moe.routing.sharing import share_routers

        report = super().inject(model)
        if self.router_scope == "projection":
            return report
        share_routers(model, self.router_scope)
        return count_parameters(model, self)


_MOST_NAMES, _LONGEST_NAME = 100_000, 1000  # beyond any model; compiling what a stranger's file holds has to end


def _set_names(config: AdapterConfig, field: str) -> None:
    """Check a list of module names or regular expressions and make it a tuple."""
    value = getattr(config, field)
    if isinstance(value, str) or not all(isinstance(entry, str) and entry for entry in value):
        raise UserError(f"{field} must be a list of names, got {value!r}; write {field}: [q_proj, v_proj]")
    if len(value) > _MOST_NAMES or any(len(entry) > _LONGEST_NAME for entry in value):
        raise UserError(f"{field} must have at most {_MOST_NAMES} entries of at most {_LONGEST_NAME} characters")
    for entry in value:
        try:
            re.compile(entry)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{field} holds {entry!r}, which is no valid regular expression: {error}") from error
    object.__setattr__(config, field, tuple(value))


def _subclasses(root: type[AdapterConfig]) -> Iterator[type[AdapterConfig]]:
    for child in root.__subclasses__():
        yield child
        yield from _subclasses(child)
