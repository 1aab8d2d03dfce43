"""Which adapter of an AdapterBank each example gets, in every thread and asyncio task by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fourier_moe.errors import UserError


class Choice:
    """What one thread or task has chosen: an adapter for each example, or one for all (None: the plain model).

    Args:
        names: an adapter's name or None for each example; None if all examples get `everyone`.
        everyone: the adapter of all examples.

    Attributes:
        open: False after its body has ended. A task or thread that was started in the body may still see it then.
    """

    def __init__(self, names: Sequence[str | None] | None, everyone: str | None = None) -> None:
        self.names, self.everyone = None if names is None else tuple(names), everyone
        self.open = True
        self._rows: dict[torch.device, dict[str | None, Tensor | None]] = {}

    def used(self) -> set[str | None]:
        return {self.everyone} if self.names is None else set(self.names)

    def groups(self, x: Tensor, layer: str) -> dict[str | None, Tensor | None]:
        """See `Selection.groups`."""
        if self.names is None:
            return {self.everyone: None}
        if x.shape[0] != len(self.names):
            raise UserError(
                f"per_example names adapters for {len(self.names)} examples, but {layer} reads an input of shape "
                f"{tuple(x.shape)}, whose first dimension must count them; name each example as often as the model repeats it "
                "(generate: num_beams times), and leave projections out of targets that see no examples first"
            )
        if x.device not in self._rows:
            self._rows[x.device] = self._group(self.names, x.device)
        return self._rows[x.device]

    @staticmethod
    def _group(names: Sequence[str | None], device: torch.device) -> dict[str | None, Tensor | None]:
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        return {name: torch.tensor(own, device=device) if len(rows) > 1 else None for name, own in rows.items()}


# What this thread or task has chosen, of any bank, innermost last.
_CHOICES: ContextVar[tuple[tuple[Selection, Choice], ...]] = ContextVar("fourier_moe_bank_choices", default=())

# Guards `Selection.open_choices`, and that what is chosen is not unloaded. Of the module, so that a model can be copied.
CHOOSING = threading.RLock()


class Selection:
    """Which adapter each example gets. Shared by all layers of a bank.

    Attributes:
        active: the adapter of all examples where nothing else is chosen.
        open_choices: those of all threads and tasks.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self.open_choices: set[Choice] = set()
        self._passes: set[Choice] = set()  # of `active`, by forward passes that are running

    def used(self) -> set[str | None]:
        """Return the adapters that must not go."""
        return {self.active}.union(*(choice.used() for choice in (*self.open_choices, *self._passes)))

    def groups(self, x: Tensor, layer: str) -> dict[str | None, Tensor | None]:
        """Return the rows of each adapter in a layer's input (examples, ...), int64; None where one adapter has them all.

        Raises:
            UserError: if the input's first dimension does not count the examples, or it is unclear what this thread wants.
        """
        choice = self._own()
        if choice is None:
            self._check_clear()
            return {self.active: None}
        if not choice.open:
            raise UserError(
                "this task or thread was started inside `per_example`, `using` or `disabled`, which has ended; keep it open "
                "until the task is done, or choose in the task"
            )
        return choice.groups(x, layer)

    @contextmanager
    def chosen(self, choice: Choice) -> Iterator[None]:
        """Let this thread or task have it; `choice` is in `open_choices` already."""
        _CHOICES.set((*_CHOICES.get(), (self, choice)))
        try:
            yield
        finally:
            self._leave(choice)

    def begin_pass(self, *_: Any) -> None:
        """Before a forward pass of the whole model: what is active stays so to its end, whatever another thread activates."""
        own = self._own()
        if own is None:
            self._check_clear()
        elif own not in self._passes:
            return
        with CHOOSING:
            choice = Choice(None, own.everyone if own else self.active)
            self._passes.add(choice)
        _CHOICES.set((*_CHOICES.get(), (self, choice)))

    def end_pass(self, *_: Any) -> None:
        choice = self._own()
        if choice in self._passes:
            assert choice is not None
            self._leave(choice)

    def _own(self) -> Choice | None:
        return next((choice for selection, choice in reversed(_CHOICES.get()) if selection is self), None)

    def _check_clear(self) -> None:
        """Code that starts a thread inside `per_example` must not silently get the adapter that is active outside of it."""
        if self.open_choices:
            raise UserError(
                "this thread has chosen no adapter, while another one has: choose here, by `with bank.per_example(names)`, "
                "`bank.using(name)` or `bank.disabled()`; or start the thread with contextvars.copy_context().run, which hands "
                "over the choice of the thread that starts it"
            )

    def _leave(self, choice: Choice) -> None:
        choice.open = False
        with CHOOSING:
            self.open_choices.discard(choice)
            self._passes.discard(choice)
        _CHOICES.set(tuple(pair for pair in _CHOICES.get() if pair[1] is not choice))
