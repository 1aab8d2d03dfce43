"""The studies of the paper's analysis: which settings of a FourierMoE config each of them compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fourier_moe import FourierMoEConfig
from fourier_moe.errors import UserError

ABLATIONS = Path("configs/ablations")
FULL = "full"  # the ablations' baseline: the config as it is


@dataclass(frozen=True)
class Setting:
    """One setting of a study.

    Attributes:
        name: of its runs' directory.
        label: as tables and plots show it.
        fields: what it changes of the config's adapter.
        series: line of the plot that it lies on; "" where the study has one line.
        overlay: config file that makes the change; None makes it with `fields`.
    """

    name: str
    label: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    series: str = ""
    overlay: Path | None = None

    @property
    def words(self) -> list[str]:
        """The change on the command line of `fit`."""
        if self.overlay is not None:
            return ["--config", str(self.overlay)]
        return [word for name, value in self.fields.items() for word in (f"--model.adapter.init_args.{name}", str(value))]

    def adapter(self, own: FourierMoEConfig) -> FourierMoEConfig:
        """The config's adapter with the change.

        Raises:
            UserError: from FourierMoEConfig, if the change does not fit the rest of it.
        """
        return dataclasses.replace(own, **self.fields)


class Study:
    """What is varied, and over which values unless `--values` gives others.

    Attributes:
        title: heading of table and plot.
        axis: what the values are.
    """

    title: str
    axis: str

    def default_values(self, own: FourierMoEConfig) -> list[str]:
        raise NotImplementedError

    def settings(self, value: str, own: FourierMoEConfig) -> list[Setting]:
        """The settings of one value, which may be several: a value that is no such value at all raises UserError."""
        raise NotImplementedError


class NumericStudy(Study):
    """One number of the adapter takes several values.

    Args:
        fields: what a value changes of the config's adapter: one dictionary for each line of the plot, by its name.
        defaults: values for a config.
        number: int or float.
    """

    def __init__(
        self,
        title: str,
        axis: str,
        number: type[int] | type[float],
        defaults: Callable[[FourierMoEConfig], Iterable[float]],
        fields: Callable[[Any, FourierMoEConfig], Mapping[str, dict[str, Any]]],
    ) -> None:
        self.title, self.axis = title, axis
        self._number, self._defaults, self._fields = number, defaults, fields

    def default_values(self, own: FourierMoEConfig) -> list[str]:
        return [f"{value}" for value in sorted(set(self._defaults(own)))]

    def settings(self, value: str, own: FourierMoEConfig) -> list[Setting]:
        try:
            number = self._number(value)
        except ValueError as error:
            kind = "a whole number" if self._number is int else "a number"
            raise UserError(f"{self.axis}: {value!r} is not {kind}") from error
        label = f"{number}" if self._number is int else f"{number:g}"
        return [
            Setting("_".join(filter(None, (*self.axis.split(), label, series))), label, fields, series)
            for series, fields in self._fields(number, own).items()
        ]


class Ablations(Study):
    """The config as it is, and with each overlay of configs/ablations."""

    title = "Ablations (the paper's Figure 3)"
    axis = "variant"

    def default_values(self, own: FourierMoEConfig) -> list[str]:
        return [FULL, *(path.stem for path in sorted(ABLATIONS.glob("*.yaml")))]

    def settings(self, value: str, own: FourierMoEConfig) -> list[Setting]:
        if value == FULL:
            return [Setting(FULL, FULL)]
        path = Path(value) if value.endswith(".yaml") else ABLATIONS / f"{value}.yaml"
        if not path.is_file():
            raise UserError(f"variant: {value!r} is not one of {', '.join(self.default_values(own))} or the path of an overlay")
        overlay = yaml.safe_load(path.read_text(encoding="utf-8"))
        fields = overlay.get("model", {}).get("adapter", {}).get("init_args", {})
        return [Setting(path.stem, path.stem.replace("_", " "), fields, overlay=path)]


def _nearest_coefficients(wanted: float, num_experts: int) -> int:
    """The number of coefficients nearest to `wanted` that the experts can share."""
    step = 2 * num_experts
    return max(1, round(wanted / step)) * step


def _powers_of_two(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length()) if 2**exponent <= most]


def _coefficients(own: FourierMoEConfig) -> list[float]:
    factors = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
    return [_nearest_coefficients(factor * own.num_coefficients, own.num_experts) for factor in factors]


STUDIES: dict[str, Study] = {
    "coefficients": NumericStudy(
        "Coefficients (the paper's Figure 4, left)",
        "coefficients",
        int,
        _coefficients,
        lambda value, own: {"": {"num_coefficients": value}},
    ),
    "experts": NumericStudy(
        "Experts (the paper's Figure 4, centre)",
        "experts",
        int,
        lambda own: [2, 4, 8, 16, 32, own.num_experts],
        lambda value, own: {
            "": {"num_experts": value, "num_coefficients": _nearest_coefficients(own.num_coefficients, max(value, 1))}
        },
    ),
    "active_experts": NumericStudy(
        "Active experts (the paper's Figure 4, right)",
        "active experts",
        int,
        lambda own: [*_powers_of_two(own.num_experts), own.top_k, own.num_experts],
        lambda value, own: {"": {"top_k": value}},
    ),
    "bandwidth": NumericStudy(
        "Bandwidth (the paper's Table 5 and Figure 6)",
        "bandwidth",
        float,
        lambda own: [0.06, 0.12, 0.24, 0.48, 0.96, own.bandwidth],
        lambda value, own: {layout: {"bandwidth": value, "band_layout": layout} for layout in ("cover", "stack")},
    ),
    "balance_weight": NumericStudy(
        "Weight of the balance loss (the paper's Table 6)",
        "balance weight",
        float,
        lambda own: [0, 0.001, 0.005, 0.01, 0.05, 0.1, own.balance_weight],
        lambda value, own: {"": {"balance_weight": value}},
    ),
    "ablations": Ablations(),
}


def choose_settings(
    study: Study, values: Sequence[str] | None, own: FourierMoEConfig, try_out: Callable[[FourierMoEConfig], None]
) -> tuple[list[Setting], list[str]]:
    """The settings of a study that fit config and model.

    A default value that does not fit is left out, and so is one line's setting of a value that fits another line.

    Args:
        values: None for the study's own.
        try_out: raises UserError for an adapter that the model cannot have.

    Returns:
        The settings, and one line for each that was left out.

    Raises:
        UserError: if one of `values` does not fit at all, or nothing remains.
    """
    chosen: dict[str, Setting] = {}
    left_out: list[str] = []
    for value in study.default_values(own) if values is None else values:
        fitting, problems = [], []
        for setting in study.settings(value, own):
            try:
                try_out(setting.adapter(own))
            except ValueError as error:
                problems.append(f"{setting.label}{setting.series and f' ({setting.series})'}: {error}")
            else:
                fitting.append(setting)
        if values is not None and not fitting:
            raise UserError(f"--values {value!r} does not fit {study.axis} {'; '.join(problems)}")
        left_out += [f"{study.axis} {problem}" for problem in problems]
        chosen |= {setting.name: setting for setting in fitting}
    if not chosen:
        raise UserError(f"no value of the study fits this config, give --values: {'; '.join(left_out)}")
    return list(chosen.values()), left_out
