"""AdapterBank: several adapters on one frozen model."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter, adapters
from fourier_moe.errors import UserError
from fourier_moe.files.adapter_files import put_on, stored_names
from fourier_moe.files.format import AdapterDescription, read, tensors
from fourier_moe.files.hub import local_directory
from fourier_moe.inject import is_adapted
from fourier_moe.models.attention import fuse_attention
from fourier_moe.models.module_names import head_modules
from fourier_moe.models.replacing import replace_module, split_fused
from fourier_moe.models.snapshot import structure_copy
from fourier_moe.serving.bank_layers import BankHead, BankLayer, BankProjection
from fourier_moe.serving.bank_selection import CHOOSING, Choice, Selection
from fourier_moe.serving.merge import swap

_BankLayer = TypeVar("_BankLayer", bound=BankLayer)


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
    up with -infinity. The model is frozen and in eval mode, for serving: dropout is off, and nothing is trained.

    Threads and asyncio tasks may share a bank. `per_example`, `using` and `disabled` hold in the thread or task that opens
    them; while one is open, a thread that has chosen nothing is refused, since it may have been started to serve that very
    choice. `load` and `unload` may run while other threads serve, and change nothing for them.

    Args:
        model: the pretrained model, without adapters; its modules are replaced in place, and put back by `unload`.

    Raises:
        UserError: if the model is adapted already.
    """

    def __init__(self, model: nn.Module) -> None:
        if is_adapted(model) or adapters(model):
            raise UserError("model is adapted already; make the bank of a freshly loaded model")
        self.model = model.requires_grad_(False).eval()
        self._loaded: dict[str, _Loaded] = {}
        self._selection = Selection()
        self._layers: dict[str, BankLayer] = {}
        self._split: dict[nn.Module, nn.Module] = {}  # split attention -> the fused one, without its weights
        self._fused_kernels: dict[nn.TransformerEncoderLayer, int] = {}  # as they were
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._changing = threading.RLock()  # one load or unload at a time

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, oldest first."""
        return tuple(self._loaded)

    @property
    def active(self) -> str | None:
        """The adapter that all examples get where nothing else is chosen; None is the plain model."""
        return self._selection.active

    def load(self, name: str, path: str | os.PathLike[str]) -> AdapterDescription:
        """Add an adapter, `path` as in `load_adapter`, under a name of your choice; it does nothing before it is chosen.

        Raises:
            UserError: for an empty name or one in use, a path that `load_adapter` refuses, or an adapter that changes the
                pretrained weights (full fine-tuning, PiSSA), which the others share.
        """
        self._check_new(name)
        directory = local_directory(path)
        description, data = read(directory)
        if description.config.trains_backbone:
            raise _changes_base(path, description)
        state = tensors(data, directory)
        with self._changing:
            self._check_new(name)
            self._set_fused_kernels(None)  # long before the first module is replaced: passes that are in one end meanwhile
            try:
                loaded = self._adapt_aside(path, description, state)
                if any(adapter.changes_base for adapter in loaded.adapters.values()):
                    raise _changes_base(path, description)
                self._check_nesting(name, loaded)
                self._put_in({**self._loaded, name: loaded})
                self._loaded = {**self._loaded, name: loaded}  # it can be chosen now
            finally:
                self._set_fused_kernels([*self._layers])
        return description

    def unload(self, name: str) -> None:
        """Forget an adapter. After the last one the model is as it was given, frozen.

        Raises:
            UserError: if it is not loaded, or chosen at the moment.
        """
        with self._changing:
            with CHOOSING:
                self._check_known([name])
                if name in self._selection.used():
                    raise UserError(f"{name!r} is active; activate another adapter, or None, first")
                self._loaded = {other: loaded for other, loaded in self._loaded.items() if other != name}
            self._put_in(self._loaded)
            self._set_fused_kernels([*self._layers])

    def activate(self, name: str | None) -> None:
        """Give all examples this adapter from now on, in all threads; None gives none.

        A forward pass of the model that is running keeps the adapter that it began with. Passes through parts of the model
        (`encode_image`) and generation, which is many passes, change over: choose by `using` where threads serve.

        Raises:
            UserError: if it is not loaded.
        """
        with CHOOSING:
            self._check_known([name])
            self._selection.active = name

    def disabled(self) -> AbstractContextManager[None]:
        """Return the plain model, while open."""
        return self.using(None)

    def using(self, name: str | None) -> AbstractContextManager[None]:
        """While open, all examples get this adapter, None the plain model, in this thread or task alone.

        Raises:
            UserError: if it is not loaded.
        """
        return self._choose(None, name)

    def per_example(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """While open, example i of every batch of this thread or task gets adapter names[i], None the plain model.

        Examples are the first dimension of what projections and heads read. A model that repeats its examples needs the names
        as often: `generate` with beams reads each example num_beams times in a row.

        Raises:
            UserError: if one is not loaded; in the forward pass, if a layer reads another number of examples.
        """
        return self._choose(names)

    @contextmanager
    def _choose(self, names: Sequence[str | None] | None, everyone: str | None = None) -> Iterator[None]:
        with CHOOSING:
            self._check_known([everyone] if names is None else names)
            choice = Choice(names, everyone)
            self._selection.open_choices.add(choice)
        with self._selection.chosen(choice):
            yield

    def _check_new(self, name: str) -> None:
        if not name or name in self._loaded:
            raise UserError(f"name={name!r} must be new and not empty; loaded: {', '.join(self.names) or 'none'}")

    def _check_known(self, names: Sequence[str | None]) -> None:
        if isinstance(names, str):
            raise UserError(f"names={names!r} must be a list with an adapter's name or None for each example")
        unknown = [name for name in names if name is not None and name not in self._loaded]
        if unknown:
            raise UserError(f"no adapter {unknown[0]!r} is loaded; loaded: {', '.join(self.names) or 'none'}")

    def _adapt_aside(
        self, path: str | os.PathLike[str], description: AdapterDescription, state: Mapping[str, Tensor]
    ) -> _Loaded:
        """Adapt a copy of the bare model's structure, and take what was put into it."""
        model = structure_copy(self.model, self._originals())
        shapes = {key: tensor.shape for key, tensor in state.items()}
        for name in stored_names(model, f"adapter {path}", description, state).heads:
            replace_module(model, name, _head_like(model.get_submodule(name), name, shapes))
        put_on(model, f"adapter {path}", description, state)
        loaded = _Loaded(adapters(model), head_modules(model, description.config))
        for module in (*loaded.adapters.values(), *loaded.heads.values()):
            module.requires_grad_(False)
        return loaded

    def _originals(self) -> dict[nn.Module, nn.Module]:
        """Return what stood where the model has something else now, with its weights."""
        originals: dict[nn.Module, nn.Module] = {layer: layer.base for layer in self._layers.values()}
        for split, fused in self._split.items():
            originals[split] = structure_copy(fused)
            fuse_attention(split, originals[split])
        return originals

    def _check_nesting(self, name: str, new: _Loaded) -> None:
        """Refuse a head trained in full that contains a projection or a head of another adapter."""
        for other, old in self._loaded.items():
            for (owner, one), (guest, two) in (((name, new), (other, old)), ((other, old), (name, new))):
                for head in one.heads:
                    inside = [part for part in (*two.adapters, *two.heads) if part.startswith(f"{head}.")]
                    inside += [head] * (head in two.adapters)
                    if inside:
                        raise UserError(
                            f"{owner!r} brings a {head} of its own, of which {guest!r} changes {inside[0]}; keep them apart"
                        )

    def _put_in(self, loaded: Mapping[str, _Loaded]) -> None:
        """Bring the model's layers to these adapters. No step changes what an adapter gives that is there before and after."""
        projections = list(dict.fromkeys(part for one in loaded.values() for part in one.adapters))
        heads = list(dict.fromkeys(part for one in loaded.values() for part in one.heads))
        for fused, split in split_fused(self.model, projections).items():
            self._split[split] = structure_copy(fused)  # other threads may be in the fused one
            _drop_weights(self._split[split])
        new: dict[nn.Module, nn.Module] = {}
        for part in projections:
            layer = self._layer(BankProjection, part, new)
            layer.keep({name: one.adapters[part] for name, one in loaded.items() if part in one.adapters})
        for part in heads:
            head = self._layer(BankHead, part, new)
            head.keep({name: one.heads[part] for name, one in loaded.items() if part in one.heads})
        swap(self.model, new)
        unused = [part for part in self._layers if part not in projections and part not in heads]
        swap(self.model, {layer: layer.base for layer in map(self._layers.pop, unused)})
        if loaded and not self._hooks:
            begin, end = self._selection.begin_pass, self._selection.end_pass
            self._hooks.append(self.model.register_forward_pre_hook(begin, prepend=True))
            self._hooks.append(self.model.register_forward_hook(end, always_call=True))
        if not loaded:
            for split, fused in self._split.items():
                fuse_attention(split, fused)
            swap(self.model, self._split)
            while self._hooks:
                self._hooks.pop().remove()
            self._split = {}

    def _layer(self, kind: type[_BankLayer], part: str, new: dict[nn.Module, nn.Module]) -> _BankLayer:
        """Return the layer of this name; where there is none, a new one, which `new` says what to put it in the place of."""
        if part not in self._layers:
            base = self.model.get_submodule(part)
            self._layers[part] = new[base] = kind(part, base, self._selection).eval()
        layer = self._layers[part]
        assert isinstance(layer, kind)
        return layer

    def _set_fused_kernels(self, adapted: Sequence[str] | None) -> None:
        """Switch torch's fused evaluation kernels off in the encoder layers with adapted projections; None takes them all."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, nn.TransformerEncoderLayer):
                inside = f"{name}." if name else ""
                off = adapted is None or any(part.startswith(inside) for part in adapted)
                value = self._fused_kernels.setdefault(layer, layer.activation_relu_or_gelu)
                layer.activation_relu_or_gelu = 0 if off else value
        if not adapted and adapted is not None:
            self._fused_kernels = {}


def _changes_base(path: str | os.PathLike[str], description: AdapterDescription) -> UserError:
    method = type(description.config).__name__
    return UserError(f"adapter {path} is {method}, which changes the pretrained weights that all adapters of a bank share")


def _head_like(head: nn.Module, name: str, shapes: Mapping[str, torch.Size]) -> nn.Module:
    """Return a copy of a head with as many classes as the adapter's; other differences are left for load_adapter to refuse."""
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
    for name in ("weight", "bias") if isinstance(fused, nn.Linear) else ("in_proj_weight", "in_proj_bias"):
        if getattr(fused, name) is not None:
            setattr(fused, name, nn.Parameter(torch.empty(0), requires_grad=False))
