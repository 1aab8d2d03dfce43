"""InjectionReport: what an injection adapted, and how many parameters are trained, frozen and replaced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fourier_moe.adapter import ParameterKind, adapters
from fourier_moe.config import AdapterConfig
from fourier_moe.models.module_names import head_modules
from fourier_moe.models.quantization import num_scalars


@dataclass(frozen=True)
class AdaptedProjection:
    """One line of the report: `parameters` counts the trained scalars by kind (experts, router, adapter)."""

    name: str
    out_features: int
    in_features: int
    parameters: dict[ParameterKind, int]


@dataclass(frozen=True)
class InjectionReport:
    """What an injection did. Counts are numbers of scalars.

    Attributes:
        projections: the adapted projections, in the model's order.
        trained: trained parameters by kind: experts, router, head, backbone, and adapter for a method without experts.
        frozen: parameters that stay as they are.
        replaced: pretrained parameters that trained ones have replaced.
    """

    projections: tuple[AdaptedProjection, ...]
    trained: dict[ParameterKind, int]
    frozen: int
    replaced: int = 0

    @property
    def total(self) -> int:
        return sum(self.trained.values())

    @property
    def pretrained(self) -> int:
        """Parameters that the model had, without the head."""
        return self.frozen + self.trained.get("backbone", 0) + self.replaced

    @property
    def percent(self) -> float:
        """Trained parameters in percent of the pretrained model's."""
        return 100 * self.total / self.pretrained if self.pretrained else float("inf")

    def __str__(self) -> str:
        kinds = sorted({kind for projection in self.projections for kind in projection.parameters})
        groups: dict[tuple[str, str], list[AdaptedProjection]] = {}  # one line per kind of projection, not per layer
        for projection in self.projections:
            shape = f"{projection.out_features} x {projection.in_features}"
            groups.setdefault((projection.name.rpartition(".")[2], shape), []).append(projection)
        rows = [("adapted", "count", "out x in", *kinds)]
        for (name, shape), members in groups.items():
            counts = (f"{sum(member.parameters.get(kind, 0) for member in members):,}" for kind in kinds)
            rows.append((name, str(len(members)), shape, *counts))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows] if groups else []
        split = ", ".join(f"{kind} {count:,}" for kind, count in self.trained.items() if count) or "none"
        lines.append(f"trained parameters: {self.total:,} ({split}), {self.percent:.2f} % of the pretrained model's")
        lines.append(f"frozen parameters:  {self.frozen:,}")
        return "\n".join(lines)


def count_parameters(model: nn.Module, config: AdapterConfig) -> InjectionReport:
    """Count what is trained and what is frozen in an adapted model."""
    projections = []
    trained: dict[ParameterKind, int] = {"experts": 0, "router": 0}
    for name, adapter in adapters(model).items():
        counts = {kind: sum(p.numel() for p in group) for kind, group in adapter.parameter_groups().items()}
        projections.append(AdaptedProjection(name, adapter.out_features, adapter.in_features, counts))
        for kind, count in counts.items():
            trained[kind] = trained.get(kind, 0) + count
    head = {id(p): p for module in head_modules(model, config).values() for p in module.parameters()}
    trained["head"] = sum(parameter.numel() for parameter in head.values())
    total = sum(map(num_scalars, model.parameters()))
    rest = total - sum(trained.values())
    trained["backbone"] = rest if config.trains_backbone else 0
    replaced = sum(adapter.num_replaced() for adapter in adapters(model).values())
    return InjectionReport(tuple(projections), trained, rest - trained["backbone"], replaced)


def trained_parameters(model: nn.Module, config: AdapterConfig) -> dict[ParameterKind, list[nn.Parameter]]:
    """Return what an adapted model trains, by kind: what an optimizer's groups are made of. A kind may be empty."""
    kinds: dict[ParameterKind, list[nn.Parameter]] = {"experts": [], "router": [], "adapter": [], "head": [], "backbone": []}
    for adapter in adapters(model).values():
        for kind, parameters in adapter.parameter_groups().items():
            kinds[kind] += parameters
    for module in head_modules(model, config).values():
        kinds["head"] += module.parameters()
    known = {id(parameter) for parameters in kinds.values() for parameter in parameters}
    kinds["backbone"] = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return kinds
