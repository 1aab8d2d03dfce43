"""What an AdapterBank puts into a model: projections and heads that treat each example of a batch by its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter
from fourier_moe.errors import UserError
from fourier_moe.models.known_output import KnownOutput, known_output
from fourier_moe.models.pretrained_weight import PretrainedWeight
from fourier_moe.models.projection import projection_shape
from fourier_moe.serving.bank_selection import Selection

_Name = TypeVar("_Name", bound=str | None)
_Part = TypeVar("_Part", bound=nn.Module)


class BankLayer(nn.Module):
    """Base of both.

    Args:
        name: the replaced module's name in the model.
        base: the replaced module.
        selection: which adapter each example gets.
    """

    def __init__(self, name: str, base: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.name, self.base, self.selection = name, base, selection

    def _groups(self, x: Tensor, own: Callable[[], dict[_Name, _Part]]) -> tuple[Any, dict[_Name, _Part]]:
        """`Selection.groups`, and what this layer has for the adapters in it.

        Other threads may load an adapter and activate it, or activate another one and unload it, while the groups are asked
        for: an adapter of the groups is there before or after.
        """
        before = own()
        groups = self.selection.groups(x, self.name)
        after = own()
        return groups, before if before is after else {**before, **after}

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise UserError(
            "an AdapterBank serves in one process; torch.nn.DataParallel would separate the examples from their names"
        )


class BankProjection(BankLayer):
    """A frozen projection with any number of adapters: (examples, ..., in_features) -> (examples, ..., out_features).

    The projection is computed once for all examples, each adapter for its own. Adapters come and go while other threads are in
    `forward`: `adapters` is replaced and never changed.
    """

    def __init__(self, name: str, base: nn.Module, selection: Selection) -> None:
        super().__init__(name, base, selection)
        self.in_features, self.out_features = projection_shape(base)
        self._known = (KnownOutput(base),)
        self.keep({})

    def keep(self, adapters: Mapping[str, Adapter]) -> None:
        """Have these adapters from now on."""
        for adapter in adapters.values():
            adapter.rebase(self._known[0])
        self._children = nn.ModuleList(adapters.values()).eval()  # by name they could not be called `train` or `v1.0`
        self.adapters = dict(adapters)

    @property
    def weight(self) -> Tensor:
        return PretrainedWeight.of(self.base.weight, self.name)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        groups, adapters = self._groups(x, lambda: self.adapters)
        own = {name: rows for name, rows in groups.items() if name is not None and name in adapters}
        if not own:
            return y
        some = {name: rows for name, rows in own.items() if rows is not None}
        if not some:
            return _adapted(adapters[next(iter(own))], x, y)
        parts = [_adapted(adapters[name], x.index_select(0, rows), y.index_select(0, rows)) for name, rows in some.items()]
        return y.index_copy(0, torch.cat([*some.values()]), torch.cat(parts))


def _adapted(adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
    """Return the adapter's output for x, where the projection's is y."""
    with known_output(y):
        return adapter(x)


class BankHead(BankLayer):
    """A head of the model, or that of the adapter of each example; `heads` is replaced like `BankProjection.adapters`.

    Where heads of different widths meet in a batch, the narrow ones' outputs are filled up with -infinity, so that softmax and
    argmax see no class that is not there.
    """

    def __init__(self, name: str, base: nn.Module, selection: Selection) -> None:
        super().__init__(name, base, selection)
        self.keep({})

    def keep(self, heads: Mapping[str, nn.Module]) -> None:
        """Have these heads from now on."""
        self._children = nn.ModuleList(heads.values()).eval()
        self.heads: dict[str | None, nn.Module] = dict(heads.items())

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        groups, heads = self._groups(features, lambda: self.heads)
        if len(groups) == 1:
            return heads.get(next(iter(groups)), self.base)(features, *args, **kwargs)
        outputs = [
            (rows, heads.get(name, self.base)(features.index_select(0, rows), *args, **kwargs))
            for name, rows in groups.items()
            if rows is not None
        ]
        for rows, output in outputs:
            if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != len(rows):
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise UserError(
                    f"the head {self.name} gives {shape} for {len(rows)} examples; several adapters in one batch need a head "
                    "that gives a tensor (examples, ..., classes)"
                )
        width = max(output.shape[-1] for _, output in outputs)
        padded = [nn.functional.pad(output, (0, width - output.shape[-1]), value=-torch.inf) for _, output in outputs]
        order = torch.cat([rows for rows, _ in outputs])
        return torch.cat(padded).index_select(0, order.argsort())
