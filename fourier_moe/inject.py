"""Finding targets in a model, putting adapters in their place, freezing the rest, and finding the adapters again."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter, projection_shape
from fourier_moe.config import AdapterConfig, ProjectionAdapterConfig
from fourier_moe.errors import UserError
from fourier_moe.models.attention import FUSED_PROJECTIONS, fused_projection, is_fused_attention, split_attention
from fourier_moe.models.backbone import Fingerprint, keep_fingerprint, measure_backbone
from fourier_moe.models.fresh_heads import fresh_heads, warn_of_frozen
from fourier_moe.models.module_names import ModuleNames, keep_module_names, kept_module_names, names_by_config
from fourier_moe.models.pretrained_weight import check_is_called
from fourier_moe.models.quantization import is_quantized, num_scalars
from fourier_moe.models.saving_guard import guard_saving
from fourier_moe.models.snapshot import unchanged_on_error
from fourier_moe.routing.recording import NoTokensError
from fourier_moe.routing.reminders import attach_reminders, heed

_CONFIG_ATTRIBUTE = "fourier_moe_adapter_config"


@dataclass(frozen=True)
class AdaptedProjection:
    """One line of the report: `parameters` counts the trained scalars by kind (experts, router, adapter)."""

    name: str
    out_features: int
    in_features: int
    parameters: dict[str, int]


@dataclass(frozen=True)
class InjectionReport:
    """What an injection did. Counts are numbers of scalars.

    Attributes:
        projections: the adapted projections, in the model's order.
        trained: trained parameters by kind: experts, router, head, backbone, and adapter for a method without experts.
        frozen: parameters that stay as they are.
        replaced: pretrained parameters that others, trained ones, have taken the place of.
    """

    projections: tuple[AdaptedProjection, ...]
    trained: dict[str, int]
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


def inject(model: nn.Module, config: AdapterConfig, *, names: ModuleNames | None = None) -> InjectionReport:
    """Adapt `model` in place as `config` says: adapters at the targets, everything but adapters and head frozen.

    Args:
        model: any module; fused attention (torch.nn.MultiheadAttention, open_clip's Attention) is split into q_proj, k_proj,
            v_proj and out_proj where a target names one of these.
        config: for example `FourierMoEConfig(targets=["q_proj", "v_proj"], num_coefficients=3008)`.
        names: the modules to adapt and to train in full, in place of those that the config's `targets` and `head` match.

    The weights are measured before anything becomes of them: see `kept_fingerprint` in backbone.py. A head that looks new
    and is frozen, and later a training loop without the method's own losses, get a warning; `save_pretrained` is refused.

    Returns:
        A report that prints as a table.

    Raises:
        UserError: if the model is adapted already, a target or head matches nothing (near names are listed), or nothing would
            be trained. The model is then left as it was.
    """
    if is_adapted(model) or adapters(model):
        raise UserError("model is adapted already, or a part of it is; inject into a freshly loaded model")
    heads = fresh_heads(model)
    with unchanged_on_error(model):
        keep_module_names(model, names or names_by_config(model, config))
        report = config.inject(model)
        if report.total == 0:
            raise UserError(f"{type(config).__name__} would train nothing of this model; name a head, or another method")
    setattr(model, _CONFIG_ATTRIBUTE, config)
    keep_fingerprint(model, Fingerprint() if config.trains_backbone() else measure_backbone(model, _own(model, config)))
    guard_saving(model)
    attach_reminders(model)
    warn_of_frozen(heads)
    return report


def is_adapted(model: nn.Module) -> bool:
    """Whether `inject` has adapted this model."""
    return hasattr(model, _CONFIG_ATTRIBUTE)


def adapter_config(model: nn.Module) -> AdapterConfig:
    """The config that `inject` adapted this model with.

    Raises:
        UserError: if the model is not adapted.
    """
    if not is_adapted(model):
        raise UserError(f"{type(model).__name__} is not adapted; call inject(model, config) or load_adapter(model, path) first")
    return getattr(model, _CONFIG_ATTRIBUTE)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """All adapted projections of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def balance_loss(model: nn.Module) -> Tensor:
    """Sum of the load-balancing losses of all adapters, times their weights; 0 if none routes. Read it inside `recording`.

    Projections that the forward pass left out (LayerDrop, a branch that this batch does not take) add nothing.

    Raises:
        NoTokensError: if no adapter that routes was used inside the recording.
    """
    terms, unused = [], []
    for name, adapter in adapters(model).items():
        try:
            term = adapter.balance_loss()
        except NoTokensError:
            unused.append(name)
        else:
            terms += [] if term is None else [term]
    if unused and not terms:
        raise NoTokensError(
            f"the routers saw no tokens: no forward pass inside `with recording(model): ...` has used {', '.join(unused[:3])}"
            f"{f' or {len(unused) - 3} more' if len(unused) > 3 else ''}; read balance_loss inside `recording`, after the "
            "forward pass, and choose targets that it uses"
        )
    return torch.stack(terms).sum() if terms else torch.zeros(())


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the adapted projections that backward passes since the last `zero_grad` gave no gradient: not used so far."""
    return [
        name
        for name, adapter in adapters(model).items()
        if all(parameter.grad is None for group in adapter.parameter_groups().values() for parameter in group)
    ]


def regularization(model: nn.Module) -> Tensor:
    """Sum of the losses that adapters put on their own parameters (KaSA); 0 if none does. Part of the training loss."""
    terms = []
    for adapter in adapters(model).values():
        heed(adapter, "regularization")
        term = adapter.regularization()
        terms += [] if term is None else [term]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def after_step(model: nn.Module) -> None:
    """Let adapters do what their method does after every optimiser step (LoRA-Dash chooses its directions after some)."""
    for adapter in adapters(model).values():
        heed(adapter, "after_step")
        adapter.after_step()


def head_modules(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that are trained in full beside the adapters, by name.

    Raises:
        UserError: if an entry of config.head matches nothing.
    """
    names = kept_module_names(model) or names_by_config(model, AdapterConfig(head=config.head))
    return {name: model.get_submodule(name) for name in names.heads}


def _own(model: nn.Module, config: AdapterConfig) -> set[int]:
    """Ids of the parameters that are not the pretrained model's: of the adapters around their bases, and of the head."""
    own: set[int] = set()
    for adapter in adapters(model).values():
        own |= {id(p) for p in adapter.parameters()} - {id(p) for p in adapter.base.parameters()}
    return own | {id(p) for module in head_modules(model, config).values() for p in module.parameters()}


def replace_targets(model: nn.Module, config: ProjectionAdapterConfig) -> InjectionReport:
    """Replace every target by `config.build_layer(...)`, freeze the rest, keep the head trained; see `inject`."""
    head = head_modules(model, config)
    matches = set((kept_module_names(model) or names_by_config(model, config)).projections)
    split_fused(model, matches)
    _check_projections(model, matches, config)

    train_only(model, head.values())
    layers: dict[int, Adapter] = {}  # by identity of the base: a projection shared by two parents stays shared
    for name in (name for name, _ in list(model.named_modules(remove_duplicate=False)) if name in matches):
        base = model.get_submodule(name)
        if isinstance(base, Adapter):  # reached before by another name of a shared parent
            continue
        if id(base) not in layers:
            layers[id(base)] = layer = config.build_layer(base, name).train(base.training)
            layer.changes_base, layer.projection_name = layer.base is not base, name
        replace_module(model, name, layers[id(base)])
    return count_parameters(model, config)


def train_only(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Freeze the model but for some of its modules."""
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)


def split_fused(model: nn.Module, matches: Collection[str]) -> dict[nn.Module, nn.Module]:
    """Split every fused attention of which a projection is a target, at all places where the module stands.

    Also the one inside a torch.nn.TransformerEncoderLayer whose other projections are targets: with it whole, torch's fused
    evaluation kernel would read their weights and pass the adapters by without a word.

    Args:
        matches: names of projections to adapt.

    Returns:
        The split module of each fused one.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    fused = {name for name in names if name and is_fused_attention(model.get_submodule(name))}
    wanted = {name for name in fused if any(f"{name}.{projection}" in matches for projection in FUSED_PROJECTIONS)}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(match.startswith(f"{name}.") for match in matches):
            wanted |= {f"{name}.self_attn"} & fused
    split: dict[nn.Module, nn.Module] = {}
    for name in (name for name in names if name in wanted):
        module = model.get_submodule(name)
        if module not in split:
            split[module] = split_attention(module)
        replace_module(model, name, split[module])
    return split


def projection_sizes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of projections, also of those inside of a fused attention.

    Raises:
        UserError: naming what is no linear projection.
    """
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    sizes = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        try:
            split = model.get_submodule(name) if name in present else fused_projection(model.get_submodule(parent), last)
            sizes[name] = projection_shape(split)
        except ValueError as error:
            raise UserError(f"targets match {name!r}: {error}") from error
    return sizes


def count_parameters(model: nn.Module, config: AdapterConfig) -> InjectionReport:
    """Count what is trained and what is frozen in an adapted model."""
    projections = []
    trained = {"experts": 0, "router": 0}
    for name, adapter in adapters(model).items():
        counts = {kind: sum(p.numel() for p in group) for kind, group in adapter.parameter_groups().items()}
        projections.append(AdaptedProjection(name, adapter.out_features, adapter.in_features, counts))
        for kind, count in counts.items():
            trained[kind] = trained.get(kind, 0) + count
    head = {id(p): p for module in head_modules(model, config).values() for p in module.parameters()}
    trained["head"] = sum(parameter.numel() for parameter in head.values())
    total = sum(map(num_scalars, model.parameters()))
    rest = total - sum(trained.values())
    trained["backbone"] = rest if config.trains_backbone() else 0
    replaced = sum(adapter.num_replaced() for adapter in adapters(model).values())
    return InjectionReport(tuple(projections), trained, rest - trained["backbone"], replaced)


def _check_projections(model: nn.Module, names: Iterable[str], config: ProjectionAdapterConfig) -> None:
    for name in sorted(names):
        projection = model.get_submodule(name)
        try:
            in_features, out_features = projection_shape(projection)
        except ValueError as error:
            raise UserError(f"targets match {name!r}: {error}") from error
        if config.reads_weights and is_quantized(projection):
            raise UserError(
                f"{type(config).__name__} computes with the pretrained weights, and those of {name!r} are quantised; load the "
                "model without quantization, or take a method that only adds to the output (FourierMoEConfig, LoRAConfig)"
            )
        check_is_called(model, name)
        problem = config.check_fit(in_features, out_features)
        if problem:
            raise UserError(f"{name} is {out_features} x {in_features}: {problem}")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a name, and keep a torch.nn.TransformerEncoderLayer around it from reading past it."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, nn.TransformerEncoderLayer):
        owner.activation_relu_or_gelu = 0  # off: its fused kernel for evaluation reads linear1.weight past the adapter
    setattr(owner, child, module)
