"""Which modules of a model are adapted, and which are trained in full: from a config's entries, or from an adapter file.

What a user writes may be a regular expression. What a file says may not: a stranger's expression can run for years. A file
lists its modules by name. Where an older one does not, the names of its tensors tell them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from fourier_moe.config import AdapterConfig
from fourier_moe.errors import UserError
from fourier_moe.models.attention import fused_modules

_ATTRIBUTE = "fourier_moe_module_names"


@dataclass(frozen=True)
class ModuleNames:
    """Names of modules, all names of one that stands at several places.

    Attributes:
        projections: what adapters take the place of, also those that a fused attention has once it is split.
        heads: what is trained in full.
    """

    projections: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


def keep_module_names(model: nn.Module, names: ModuleNames) -> None:
    """Store the names on the model, as `inject` does."""
    setattr(model, _ATTRIBUTE, names)


def kept_module_names(model: nn.Module) -> ModuleNames | None:
    """Return the names that the model was adapted with, or None."""
    return getattr(model, _ATTRIBUTE, None)


def head_modules(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """Return the modules that are trained in full beside the adapters, by name.

    Raises:
        UserError: if an entry of config.head matches nothing.
    """
    names = kept_module_names(model) or names_by_config(model, AdapterConfig(head=config.head))
    return {name: model.get_submodule(name) for name in names.heads}


def names_by_config(model: nn.Module, config: AdapterConfig) -> ModuleNames:
    """Return what a config's `targets` and `head` match.

    Raises:
        UserError: if an entry matches nothing (near names are listed), or targets match nothing outside of the head.
    """
    heads = _match(config.head, _module_names(model), "head", by_suffix=False)
    targets: Sequence[str] = getattr(config, "targets", ())
    projections = _match(targets, _projection_names(model), "targets")
    outside = _outside(projections, heads)
    if projections and not outside:
        raise UserError(
            f"targets match only {', '.join(sorted(projections)[:5])}, which head={list(config.head)} trains in full; "
            "name projections outside of the head"
        )
    return _ordered(model, outside, heads)


def names_by_file(model: nn.Module, config: AdapterConfig, stored: ModuleNames | None, keys: Collection[str]) -> ModuleNames:
    """Return what a file was made of; no entry of its config is read as a regular expression.

    A module that an entry names plainly belongs to it in any case, so that a file without its tensors is noticed.

    Args:
        config: the file's.
        stored: the names that the file lists, None if it does not.
        keys: the names of its tensors.

    Raises:
        UserError: if the model has no such modules.
    """
    known = _projection_names(model)
    targets: Sequence[str] = getattr(config, "targets", ())
    heads = {name for entry in config.head for name in _named(entry, _module_names(model), by_suffix=False)}
    projections = {name for entry in targets for name in _named(entry, known, by_suffix=True)}
    if stored is None:
        heads |= _heads_of(model, keys) if any(entry not in heads for entry in config.head) else set()
        stored = ModuleNames(tuple(_projections_of(model, keys, known)))
    missing = [name for name in (*stored.projections, *stored.heads) if name not in known]
    if missing:
        raise UserError(f"it adapts {missing[0]!r}, which this model does not have")
    heads |= set(stored.heads)
    projections |= set(stored.projections)
    for argument, entries, found in (("head", config.head, heads), ("targets", targets, projections)):
        if entries and not found:
            raise _no_match(argument, entries[0], list(known))
    return _ordered(model, _outside(projections, heads), heads)


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]


def _projection_names(model: nn.Module) -> dict[str, int]:
    """Return all names of modules and of projections inside fused attention; names of the same module have the same number."""
    names: dict[str, int] = {}
    places: dict[tuple[int, str], int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names[name] = places.setdefault((id(module), ""), len(places))
    for name, inside in fused_modules(model).items():
        for projection in inside:
            place = (id(model.get_submodule(name)), projection)
            names.setdefault(f"{name}.{projection}", places.setdefault(place, len(places)))
    return names


def _match(entries: Iterable[str], names: Iterable[str], argument: str, *, by_suffix: bool = True) -> set[str]:
    """Return names that equal an entry, end in it at a dot (`by_suffix`) or match it as a pattern; every entry must match."""
    names = list(names)
    found: set[str] = set()
    for entry in entries:
        matched = _named(entry, names, by_suffix=by_suffix) | {name for name in names if re.fullmatch(entry, name)}
        if not matched:
            raise _no_match(argument, entry, names)
        found |= matched
    return found


def _named(entry: str, names: Iterable[str], *, by_suffix: bool) -> set[str]:
    end = f".{entry}"
    return {name for name in names if name == entry or (by_suffix and name.endswith(end))}


def _no_match(argument: str, entry: str, names: Sequence[str]) -> UserError:
    last_parts = sorted({part for name in names if not (part := name.rpartition(".")[2]).isdigit()})
    near = difflib.get_close_matches(entry, [*last_parts, *names], n=5, cutoff=0.5)
    meant = f"near names: {', '.join(near)}; " if near else ""
    meant += f"its modules are called: {', '.join(last_parts[:30])}"
    return UserError(f"{argument} entry {entry!r} matches no module of the model; {meant}")


def _projections_of(model: nn.Module, keys: Iterable[str], known: dict[str, int]) -> set[str]:
    """Return the modules whose tensors the bare model does not have."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    found: set[int] = set()
    for key in set(keys) - own:
        end = len(key)
        while (end := key.rfind(".", 0, end)) > 0:
            if key[:end] in known:
                is_weight = key[end + 1 :] in ("weight", "bias")  # of a projection that a split left without adapter
                found |= set() if is_weight else {known[key[:end]]}
                break
    return {name for name, place in known.items() if place in found}


def _heads_of(model: nn.Module, keys: Collection[str]) -> set[str]:
    """Return the largest modules of which all tensors are there."""
    keys, heads = set(keys), set[str]()
    for name, module in model.named_modules():  # a parent comes before its children
        inside = [f"{name}.{key}" for key in module.state_dict()]
        if name and inside and keys.issuperset(inside) and not any(name.startswith(f"{head}.") for head in heads):
            heads.add(name)
    return heads


def _outside(projections: Iterable[str], heads: Collection[str]) -> set[str]:
    return {name for name in projections if not any(name == head or name.startswith(f"{head}.") for head in heads)}


def _ordered(model: nn.Module, projections: Collection[str], heads: Collection[str]) -> ModuleNames:
    names = _projection_names(model)
    return ModuleNames(tuple(n for n in names if n in projections), tuple(n for n in names if n in heads))
