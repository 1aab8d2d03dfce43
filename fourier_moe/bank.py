"""AdapterBank: several adapters on one frozen model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fourier_moe.adapter import Adapter
from fourier_moe.adapter_format import AdapterDescription, read, tensors
from fourier_moe.attention import fuse_attention
from fourier_moe.bank_layers import BankHead, BankProjection, Selection
from fourier_moe.files import load_adapter
from fourier_moe.hub import local_directory
from fourier_moe.inject import adapters, head_modules, is_adapted, replace_module, split_fused
from fourier_moe.merge import swap
from fourier_moe.undo import snapshot


@dataclass(frozen=True)
class _Loaded:
    """One adapter: its layers and heads by the name of the module that each belongs to."""

    adapters: Mapping[str, Adapter]
    heads: Mapping[str, nn.Module]


class AdapterBank:
    """Adapters that share one frozen model: load, switch, disable, unload, or a different one for each example of a batch.

        bank = AdapterBank(model)
        bank.load("cars", "runs/clip_cars/version_0/adapter")
        bank.load("dtd", "runs/clip_dtd/version_0/adapter")
        bank.activate("cars")
        with bank.per_example(["cars", "dtd", None]):  # None: the model without adapter
            logits = model(images)

    Adapters may differ in method, config and targets, and in the number of classes of their heads: narrower outputs are filled
    up with -infinity. The model is frozen and in eval mode, for serving: dropout is off, and nothing is trained. Not safe for
    threads: what is active belongs to the model, not to the caller.

    Args:
        model: the pretrained model, without adapters; its modules are replaced in place, and put back by `unload`.

    Raises:
        ValueError: if the model is adapted already.
    """

    def __init__(self, model: nn.Module) -> None:
        if is_adapted(model) or adapters(model):
            raise ValueError("model is adapted already; make the bank of a freshly loaded model")
        self.model = model.requires_grad_(False).eval()
        self._loaded: dict[str, _Loaded] = {}
        self._selection = Selection()
        self._replaced: dict[nn.Module, nn.Module] = {}  # bank layer -> what stood there
        self._split: dict[nn.Module, nn.Module] = {}  # split attention -> the fused one, without its weights
        self._fused_kernels: dict[nn.TransformerEncoderLayer, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, oldest first."""
        return tuple(self._loaded)

    @property
    def active(self) -> str | None:
        """The adapter that all examples get outside of `per_example`; None is the plain model."""
        return self._selection.active

    def load(self, name: str, path: str | os.PathLike[str]) -> AdapterDescription:
        """Add an adapter, `path` as in `load_adapter`, under a name of your choice; it does nothing before it is chosen.

        Raises:
            ValueError: for an empty name or one in use, a path that `load_adapter` refuses, or an adapter that changes the
                pretrained weights (full fine-tuning, PiSSA), which the others share.
        """
        if not name or name in self._loaded:
            raise ValueError(f"name={name!r} must be new and not empty; loaded: {', '.join(self.names) or 'none'}")
        directory = local_directory(path)
        description, data = read(directory)
        if description.config.trains_backbone():
            raise _changes_base(path, description)
        shapes = {key: tensor.shape for key, tensor in tensors(data, directory).items()}
        with self._bare():
            loaded = self._adapt(directory, description, shapes)
            if any(adapter.changes_base for adapter in loaded.adapters.values()):
                raise _changes_base(path, description)
            self._check_nesting(name, loaded)
            self._loaded[name] = loaded
        return description

    def unload(self, name: str) -> None:
        """Forget an adapter. After the last one the model is as it was given, frozen.

        Raises:
            ValueError: if it is not loaded, or chosen at the moment.
        """
        self._check_known([name])
        if name in self._selection.used():
            raise ValueError(f"{name!r} is active; activate another adapter, or None, first")
        with self._bare():
            del self._loaded[name]

    def activate(self, name: str | None) -> None:
        """Give all examples this adapter from now on; None gives none.

        Raises:
            ValueError: if it is not loaded.
        """
        self._check_known([name])
        self._selection.active = name

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain model, while open."""
        active, names = self._selection.active, self._selection.names
        self._selection.active, self._selection.names = None, None
        try:
            yield
        finally:
            self._selection.active, self._selection.names = active, names

    @contextmanager
    def per_example(self, names: Sequence[str | None]) -> Iterator[None]:
        """While open, example i of every batch gets adapter names[i], None the plain model.

        Examples are the first dimension of what projections and heads read. A model that repeats its examples needs the names
        as often: `generate` with beams reads each example num_beams times in a row.

        Raises:
            ValueError: if one is not loaded; in the forward pass, if a layer reads another number of examples.
        """
        self._check_known(names)
        before = self._selection.names
        self._selection.names = names
        try:
            yield
        finally:
            self._selection.names = before

    def _check_known(self, names: Sequence[str | None]) -> None:
        if isinstance(names, str):
            raise ValueError(f"names={names!r} must be a list with an adapter's name or None for each example")
        unknown = [name for name in names if name is not None and name not in self._loaded]
        if unknown:
            raise ValueError(f"no adapter {unknown[0]!r} is loaded; loaded: {', '.join(self.names) or 'none'}")

    def _adapt(self, directory: Path, description: AdapterDescription, shapes: Mapping[str, torch.Size]) -> _Loaded:
        """Adapt the bare model with one adapter, take what was put into it, and put the model back."""
        put_back = snapshot(self.model)
        try:
            for name, head in head_modules(self.model, description.config).items():
                replace_module(self.model, name, _head_like(head, name, shapes))
            load_adapter(self.model, directory)
            loaded = _Loaded(adapters(self.model), head_modules(self.model, description.config))
        finally:
            put_back()
        for module in (*loaded.adapters.values(), *loaded.heads.values()):
            module.requires_grad_(False)
        return loaded

    def _check_nesting(self, name: str, new: _Loaded) -> None:
        """A head that is trained in full must not hold a projection that another adapter adapts, or another's head."""
        for other, old in self._loaded.items():
            for (owner, one), (guest, two) in (((name, new), (other, old)), ((other, old), (name, new))):
                for head in one.heads:
                    inside = [part for part in (*two.adapters, *two.heads) if part.startswith(f"{head}.")]
                    inside += [head] * (head in two.adapters)
                    if inside:
                        raise ValueError(
                            f"{owner!r} brings a {head} of its own, of which {guest!r} changes {inside[0]}; keep them apart"
                        )

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The model as it was given, while open."""
        self._take_out()
        try:
            yield
        finally:
            self._put_in()

    def _put_in(self) -> None:
        if not self._loaded:
            return
        layers = [module for module in self.model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
        self._fused_kernels = {layer: layer.activation_relu_or_gelu for layer in layers}  # split_fused switches them off
        projections = dict.fromkeys(part for loaded in self._loaded.values() for part in loaded.adapters)
        self._split = {split: fused for fused, split in split_fused(self.model, projections).items()}
        for fused in self._split.values():
            _drop_weights(fused)
        for part in projections:
            own = {name: loaded.adapters[part] for name, loaded in self._loaded.items() if part in loaded.adapters}
            base = self.model.get_submodule(part)
            self._replaced[BankProjection(part, base, own, self._selection)] = base
        for part in dict.fromkeys(part for loaded in self._loaded.values() for part in loaded.heads):
            heads = {name: loaded.heads[part] for name, loaded in self._loaded.items() if part in loaded.heads}
            original = self.model.get_submodule(part)
            self._replaced[BankHead(part, original, heads, self._selection)] = original
        swap(self.model, {original: layer.eval() for layer, original in self._replaced.items()})

    def _take_out(self) -> None:
        swap(self.model, self._replaced)
        for split, fused in self._split.items():
            fuse_attention(split, fused)
        swap(self.model, self._split)
        for layer, kernel in self._fused_kernels.items():
            layer.activation_relu_or_gelu = kernel
        self._replaced, self._split, self._fused_kernels = {}, {}, {}


def _changes_base(path: str | os.PathLike[str], description: AdapterDescription) -> ValueError:
    method = type(description.config).__name__
    return ValueError(f"adapter {path} is {method}, which changes the pretrained weights that all adapters of a bank share")


def _head_like(head: nn.Module, name: str, shapes: Mapping[str, torch.Size]) -> nn.Module:
    """A copy of a head with as many classes as the adapter's; other differences are left for load_adapter to refuse."""
    head = copy.deepcopy(head)
    for key, parameter in list(head.named_parameters()):
        stored = shapes.get(f"{name}.{key}", parameter.shape)
        if stored != parameter.shape and stored[1:] == parameter.shape[1:]:
            owner, last = head.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
            setattr(owner, last, nn.Parameter(parameter.new_empty(stored)))
            if isinstance(owner, nn.Linear):
                owner.out_features = stored[0]
    return head


def _drop_weights(fused: nn.Module) -> None:
    """Free what a split attention has copies of; `fuse_attention` puts them back."""
    for name in ("in_proj_weight", "in_proj_bias"):
        if getattr(fused, name) is not None:
            setattr(fused, name, nn.Parameter(torch.empty(0), requires_grad=False))
