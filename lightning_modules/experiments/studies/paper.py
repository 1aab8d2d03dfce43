"""The studies of the paper's analysis, a row each: which settings of a FourierMoE config a study compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fourier_moe import FourierMoEConfig
from fourier_moe.errors import UserError
from lightning_modules.cli.config_files import CONFIGS
from lightning_modules.experiments.studies.study import Setting, Study

ABLATIONS = CONFIGS / "ablations"
FULL = "full"  # the ablations' baseline: the config as it is


@dataclass(frozen=True)
class AdapterSetting(Setting):
    """A setting of FourierMoE.

    Attributes:
        fields: what it changes in the config's adapter.
    """

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def adapter(self, own: FourierMoEConfig) -> FourierMoEConfig:
        """Return the config's adapter with the change.

        Raises:
            UserError: from FourierMoEConfig, if the change does not fit the rest of it.
        """
        return dataclasses.replace(own, **self.fields)


@dataclass(frozen=True)
class PaperStudy(Study):
    """A study of FourierMoE.

    Attributes:
        kind: int or float for a number of the adapter; Path for overlays in `ABLATIONS`.
        defaults: values for a config.
        changes: fields that a value changes in the config's adapter, for each line of the plot by its name.
    """

    kind: type[int] | type[float] | type[Path]
    defaults: Callable[[FourierMoEConfig], Iterable[Any]]
    changes: Callable[[Any, FourierMoEConfig], Mapping[str, Mapping[str, Any]]]

    @property
    def numeric(self) -> bool:
        return self.kind is not Path

    def default_values(self, own: FourierMoEConfig) -> list[str]:
        values = list(dict.fromkeys(self.defaults(own)))
        return [f"{value}" for value in (sorted(values) if self.numeric else values)]

    def settings(self, text: str, own: FourierMoEConfig) -> list[AdapterSetting]:
        """Return the settings of one value, one for each line of the plot.

        Raises:
            UserError: if the text is no value of this study.
        """
        value = self._parse(text, own)
        if not self.numeric:
            name, words = Path(text).stem, [] if text == FULL else ["--config", str(value)]
            return [AdapterSetting(name, name.replace("_", " "), words, fields=self.changes(value, own)[""])]
        label = f"{value}" if self.kind is int else f"{value:g}"
        return [
            AdapterSetting("_".join(filter(None, (*self.axis.split(), label, series))), label, _words(fields), series, fields)
            for series, fields in self.changes(value, own).items()
        ]

    def _parse(self, text: str, own: FourierMoEConfig) -> Any:
        if not self.numeric:
            path = Path(text) if text.endswith(".yaml") else ABLATIONS / f"{text}.yaml"
            if text != FULL and not path.is_file():
                known = ", ".join(self.default_values(own))
                raise UserError(f"{self.axis}: {text!r} is not one of {known} or the path of an overlay")
            return path
        try:
            return self.kind(text)
        except ValueError as error:
            raise UserError(f"{self.axis}: {text!r} is not {'a whole number' if self.kind is int else 'a number'}") from error


def _words(fields: Mapping[str, Any]) -> list[str]:
    """Return a change in the adapter as arguments of `fit`."""
    return [word for name, value in fields.items() for word in (f"--model.adapter.init_args.{name}", str(value))]


def _nearest_coefficients(wanted: float, step: int) -> int:
    """Return the number of coefficients nearest to `wanted` that the experts can share, a multiple of `step`."""
    return max(1, round(wanted / step)) * step


def _overlay_fields(path: Path) -> dict[str, Any]:
    """Return what an overlay changes in the adapter; nothing for the config as it is."""
    overlay = yaml.safe_load(path.read_text(encoding="utf-8")) if path.stem != FULL else {}
    return overlay.get("model", {}).get("adapter", {}).get("init_args", {})


STUDIES: dict[str, PaperStudy] = {
    "coefficients": PaperStudy(
        "Coefficients (the paper's Figure 4, left)",
        "coefficients",
        int,
        lambda own: [_nearest_coefficients(own.num_coefficients * 2.0**power, own.size_step) for power in range(-3, 3)],
        lambda value, own: {"": {"num_coefficients": value}},
    ),
    "experts": PaperStudy(
        "Experts (the paper's Figure 4, center)",
        "experts",
        int,
        lambda own: [2, 4, 8, 16, 32, own.num_experts],
        lambda value, own: {
            "": {"num_experts": value, "num_coefficients": _nearest_coefficients(own.num_coefficients, 2 * max(value, 1))}
        },
    ),
    "active_experts": PaperStudy(
        "Active experts (the paper's Figure 4, right)",
        "active experts",
        int,
        lambda own: [*(2**power for power in range(own.num_experts.bit_length())), own.top_k, own.num_experts],
        lambda value, own: {"": {"top_k": value}},
    ),
    "bandwidth": PaperStudy(
        "Bandwidth (the paper's Table 5 and Figure 6)",
        "bandwidth",
        float,
        lambda own: [0.06, 0.12, 0.24, 0.48, 0.96, *([] if isinstance(own.bandwidth, Sequence) else [own.bandwidth])],
        lambda value, own: {layout: {"bandwidth": value, "band_layout": layout} for layout in ("cover", "stack")},
    ),
    "balance_weight": PaperStudy(
        "Weight of the balance loss (the paper's Table 6)",
        "balance weight",
        float,
        lambda own: [0, 0.001, 0.005, 0.01, 0.05, 0.1, own.balance_weight],
        lambda value, own: {"": {"balance_weight": value}},
    ),
    "ablations": PaperStudy(
        "Ablations (the paper's Figure 3)",
        "variant",
        Path,
        lambda own: [FULL, *(path.stem for path in sorted(ABLATIONS.glob("*.yaml")))],
        lambda path, own: {"": _overlay_fields(path)},
    ),
}


def choose_settings(
    study: PaperStudy, values: Sequence[str] | None, own: FourierMoEConfig, try_out: Callable[[FourierMoEConfig], None]
) -> tuple[list[AdapterSetting], list[str]]:
    """Choose the settings of a study that fit config and model.

    A default value that does not fit is left out, and so is one line's setting of a value that fits another line.

    Args:
        study: what is varied.
        values: None for the study's own.
        own: the config's adapter.
        try_out: raises UserError for an adapter that does not fit the model.

    Returns:
        The settings, and one line for each that was left out.

    Raises:
        UserError: if one of `values` does not fit at all, or nothing remains.
    """
    chosen: dict[str, AdapterSetting] = {}
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
