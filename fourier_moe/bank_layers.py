"""What an AdapterBank puts into a model: projections and heads that treat each example of a batch by its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter, projection_shape


class Selection:
    """Which adapter each example gets: `active` all of them, unless `names` has one (or None, the plain model) for each.

    Shared by all layers of a bank.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self._names: tuple[str | None, ...] | None = None
        self._rows: dict[torch.device, dict[str | None, Tensor | None]] = {}

    @property
    def names(self) -> tuple[str | None, ...] | None:
        return self._names

    @names.setter
    def names(self, names: Sequence[str | None] | None) -> None:
        self._names, self._rows = None if names is None else tuple(names), {}

    def used(self) -> set[str | None]:
        return {self.active} | set(self._names or ())

    def groups(self, x: Tensor, layer: str) -> dict[str | None, Tensor | None]:
        """The rows of each adapter in a layer's input (examples, ...), int64; None where one adapter has them all.

        Raises:
            ValueError: if the input's first dimension does not count the examples.
        """
        if self._names is None:
            return {self.active: None}
        if x.shape[0] != len(self._names):
            raise ValueError(
                f"per_example names adapters for {len(self._names)} examples, but {layer} reads an input of shape "
                f"{tuple(x.shape)}, whose first dimension must count them; name each example as often as the model repeats it "
                "(generate: num_beams times), and leave projections out of targets that see no examples first"
            )
        if x.device not in self._rows:
            self._rows[x.device] = self._group(x.device)
        return self._rows[x.device]

    def _group(self, device: torch.device) -> dict[str | None, Tensor | None]:
        assert self._names is not None
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(self._names):
            rows.setdefault(name, []).append(row)
        return {name: torch.tensor(own, device=device) if len(rows) > 1 else None for name, own in rows.items()}


class KnownOutput(nn.Module):
    """Stands in for the frozen projection inside its adapters: hands out what that has computed, and else all it has."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple: no child, or the weight would be in the model once per adapter
        self.output: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._base[0], name)

    def forward(self, x: Tensor) -> Tensor:
        assert self.output is not None
        assert self.output.shape[:-1] == x.shape[:-1]
        return self.output


class BankProjection(nn.Module):
    """A frozen projection with any number of adapters: (examples, ..., in_features) -> (examples, ..., out_features).

    The projection is computed once for all examples, each adapter for its own.
    """

    def __init__(self, name: str, base: nn.Module, adapters: dict[str, Adapter], selection: Selection) -> None:
        super().__init__()
        self.name, self.selection = name, selection
        self.base = base
        self.in_features, self.out_features = projection_shape(base)
        self.adapters = adapters
        self._children = nn.ModuleList(adapters.values())  # by name they could not be called `train` or `v1.0`
        self._known = (KnownOutput(base),)
        for adapter in adapters.values():
            adapter.rebase(self._known[0])

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        groups = self.selection.groups(x, self.name)
        own = {name: rows for name, rows in groups.items() if name is not None and name in self.adapters}
        if not own:
            return y
        some = {name: rows for name, rows in own.items() if rows is not None}
        if not some:
            return self._adapt(next(iter(own)), x, y)
        adapted = [self._adapt(name, x.index_select(0, rows), y.index_select(0, rows)) for name, rows in some.items()]
        return y.index_copy(0, torch.cat([*some.values()]), torch.cat(adapted))

    def _adapt(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        self._known[0].output = y
        try:
            return self.adapters[name](x)
        finally:
            self._known[0].output = None


class BankHead(nn.Module):
    """A head of the model, or that of the adapter of each example.

    Where heads of different widths meet in a batch, the narrow ones' outputs are filled up with -infinity, so that softmax and
    argmax see no class that is not there.
    """

    def __init__(self, name: str, original: nn.Module, heads: dict[str, nn.Module], selection: Selection) -> None:
        super().__init__()
        self.name, self.selection = name, selection
        self.original = original
        self.heads = heads
        self._children = nn.ModuleList(heads.values())

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        groups = self.selection.groups(features, self.name)
        if len(groups) == 1:
            return self._head(next(iter(groups)))(features, *args, **kwargs)
        outputs = [
            (rows, self._head(name)(features.index_select(0, rows), *args, **kwargs))
            for name, rows in groups.items()
            if rows is not None
        ]
        for rows, output in outputs:
            if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != len(rows):
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"the head {self.name} gives {shape} for {len(rows)} examples; several adapters in one batch need a head "
                    "that gives a tensor (examples, ..., classes)"
                )
        width = max(output.shape[-1] for _, output in outputs)
        padded = [nn.functional.pad(output, (0, width - output.shape[-1]), value=-torch.inf) for _, output in outputs]
        order = torch.cat([rows for rows, _ in outputs])
        return torch.cat(padded).index_select(0, order.argsort())

    def _head(self, name: str | None) -> nn.Module:
        return self.original if name is None or name not in self.heads else self.heads[name]
