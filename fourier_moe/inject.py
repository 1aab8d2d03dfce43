"""Injection: finding projections in a model, replacing them by adapters, and freezing the rest; then what training reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter, adapters, build_layer, layer_class
from fourier_moe.config import AdapterConfig, ProjectionAdapterConfig
from fourier_moe.errors import UserError
from fourier_moe.models.backbone import Fingerprint, keep_fingerprint, measure_backbone
from fourier_moe.models.fresh_heads import fresh_heads, warn_of_frozen
from fourier_moe.models.module_names import ModuleNames, head_modules, keep_module_names, names_by_config
from fourier_moe.models.pretrained_weight import check_is_called
from fourier_moe.models.projection import projection_shape
from fourier_moe.models.quantization import is_quantized
from fourier_moe.models.replacing import replace_module, split_fused
from fourier_moe.models.saving_guard import guard_saving
from fourier_moe.models.snapshot import unchanged_on_error
from fourier_moe.report import InjectionReport, count_parameters
from fourier_moe.routing.record import NoTokensError
from fourier_moe.routing.reminders import attach_reminders, heed

_CONFIG_ATTRIBUTE = "fourier_moe_adapter_config"


def inject(model: nn.Module, config: AdapterConfig, *, names: ModuleNames | None = None) -> InjectionReport:
    """Adapt `model` in place as `config` says: adapters at the targets, everything but adapters and head frozen.

    Args:
        model: any module; fused attention (torch.nn.MultiheadAttention, open_clip's Attention) is split into q_proj, k_proj,
            v_proj and out_proj where a target names one of these.
        config: for example `FourierMoEConfig(targets=["q_proj", "v_proj"], num_coefficients=3008)`.
        names: the modules to adapt and to train in full, in place of those that the config's `targets` and `head` match.

    The pretrained weights are measured here, before training changes them; see `kept_fingerprint` in models/backbone.py. A
    warning says if a head that looks new is frozen or the config is slow without need, and later if a training loop leaves out
    the method's own losses. `save_pretrained` is refused.

    Returns:
        A report that prints as a table.

    Raises:
        UserError: if the model is adapted already, a target or head matches nothing (near names are listed), or nothing would
            be trained. The model is then left as it was.
    """
    _check_model(model, config)
    heads = fresh_heads(model)
    with unchanged_on_error(model):
        chosen = names or names_by_config(model, config)
        keep_module_names(model, chosen)
        model.requires_grad_(False)
        if isinstance(config, ProjectionAdapterConfig):
            replace_projections(model, config, chosen.projections)
        for module in [model.float()] if config.trains_backbone else head_modules(model, config).values():
            module.requires_grad_(True)
        report = count_parameters(model, config)
        if report.total == 0:
            raise UserError(f"{type(config).__name__} would train nothing of this model; name a head, or another method")
    setattr(model, _CONFIG_ATTRIBUTE, config)
    keep_fingerprint(model, Fingerprint() if config.trains_backbone else measure_backbone(model, _own(model, config)))
    guard_saving(model, Adapter)
    attach_reminders(model)
    warn_of_frozen(heads)
    if names is None and (advice := config.advice()):
        warnings.warn(advice, stacklevel=2)
    return report


def _check_model(model: nn.Module, config: AdapterConfig) -> None:
    if is_adapted(model) or adapters(model):
        raise UserError("model is adapted already, or a part of it is; inject into a freshly loaded model")
    if config.trains_backbone and is_quantized(model):
        raise UserError(
            f"{type(config).__name__} trains the pretrained weights, and these are quantized; load the model without "
            "quantization"
        )


def replace_projections(model: nn.Module, config: ProjectionAdapterConfig, names: Iterable[str]) -> None:
    """Replace the projections of these names by the layers that are registered for the config."""
    names = set(names)
    split_fused(model, names)
    check_projections(model, names, config)
    layers: dict[int, Adapter] = {}  # by identity of the base: a projection shared by two parents stays shared
    with nullcontext() if layer_class(config).named_generator else _seeded(config.seed or 0):
        for name in (name for name, _ in list(model.named_modules(remove_duplicate=False)) if name in names):
            base = model.get_submodule(name)
            if isinstance(base, Adapter):  # reached before by another name of a shared parent
                continue
            if id(base) not in layers:
                layers[id(base)] = layer = build_layer(base, config, name).train(base.training)
                layer.changes_base, layer.projection_name = layer.base is not base, name
            replace_module(model, name, layers[id(base)])
    layer_class(config).connect(adapters(model), config)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU generator, and restore it afterwards: dropout and data must not depend on the layers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def check_projections(model: nn.Module, names: Iterable[str], config: ProjectionAdapterConfig) -> None:
    """Refuse projections that a config's layer cannot stand in for.

    Raises:
        UserError: naming the projection, and what is wrong with it.
    """
    for name in sorted(names):
        projection = model.get_submodule(name)
        try:
            in_features, out_features = projection_shape(projection)
        except ValueError as error:
            raise UserError(f"targets match {name!r}: {error}") from error
        if config.reads_weights and is_quantized(projection):
            raise UserError(
                f"{type(config).__name__} computes with the pretrained weights, and those of {name!r} are quantized; load the "
                "model without quantization, or take a method that only adds to the output (FourierMoEConfig, LoRAConfig)"
            )
        check_is_called(model, name)
        problem = config.check_fit(in_features, out_features)
        if problem:
            raise UserError(f"{name} is {out_features} x {in_features}: {problem}")


def _own(model: nn.Module, config: AdapterConfig) -> set[int]:
    """Ids of the parameters that are not the pretrained model's: of the adapters around their bases, and of the head."""
    own: set[int] = set()
    for adapter in adapters(model).values():
        own |= {id(p) for p in adapter.parameters()} - {id(p) for p in adapter.base.parameters()}
    return own | {id(p) for module in head_modules(model, config).values() for p in module.parameters()}


def is_adapted(model: nn.Module) -> bool:
    """Return whether `inject` has adapted this model."""
    return hasattr(model, _CONFIG_ATTRIBUTE)


def adapter_config(model: nn.Module) -> AdapterConfig:
    """Return the config that `inject` adapted this model with.

    Raises:
        UserError: if the model is not adapted.
    """
    if not is_adapted(model):
        raise UserError(f"{type(model).__name__} is not adapted; call inject(model, config) or load_adapter(model, path) first")
    return getattr(model, _CONFIG_ATTRIBUTE)


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
    """Return the names of adapted projections without a gradient since the last `zero_grad`: not used so far."""
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
    """Let adapters do what their method does after every optimizer step (LoRA-Dash chooses its directions after some)."""
    for adapter in adapters(model).values():
        heed(adapter, "after_step")
        adapter.after_step()
