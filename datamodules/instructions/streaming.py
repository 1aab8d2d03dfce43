"""Training sets that fit neither in memory nor on the disk: read once, from front to back, while training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import Dataset

from datamodules.instructions.dataset import Example, TrainDataset
from datamodules.instructions.mixture.loading import ExampleMaker
from datamodules.instructions.mixture.mixing import Source
from datamodules.instructions.reading.records import parse_record
from datamodules.instructions.reading.rows import Row, stream_rows
from datamodules.instructions.tokenizing.text import ExampleTokenizer
from datamodules.shared.sampling import TrainShare
from fourier_moe.errors import UserError

SHUFFLED = 10_000  # rows that are held for shuffling


class Stream:
    """Examples of a source, in an order that is fixed by a seed; the source begins again, in another order, when it ends.

    Args:
        source: custom data.
        columns: what its fields are called, where they have other names.
    """

    def __init__(self, source: Source, columns: Mapping[str, str] | None) -> None:
        self.source, self._columns = source, columns
        self._make = ExampleMaker(source, is_train=True)
        self._num_held_out = 0  # rows

    def hold_out(self, size: int) -> list[Example]:
        """Return the first examples, which are not among the others then.

        Raises:
            UserError: there are not so many, or a row is no record.
        """
        found: list[Example] = []
        for row in stream_rows(self.source.file):
            example = self._example(row)
            found += [example] if example else []
            if len(found) == size:
                self._num_held_out = row.number + 1
                return found
        if not found:
            raise self._nothing()
        raise UserError(f"validation_size={size} would hold out all {len(found)} training examples; give a smaller number")

    def examples(self, seed: int) -> Iterator[Example]:
        """Yield examples without end.

        Raises:
            UserError: a row is no record, or none of them has a response to learn.
        """
        found = False
        for number in count():
            rows = islice(stream_rows(self.source.file), self._num_held_out, None)
            for row in _shuffled(rows, random.Random(f"{seed} {number}")):
                example = self._example(row)
                if example is not None:
                    found = True
                    yield example
            if not found:
                raise self._nothing()

    def _nothing(self) -> UserError:
        """Return what to say where no example is left."""
        rows = sum(1 for _ in stream_rows(self.source.file))
        if self._num_held_out:
            reason = f"the first {self._num_held_out} of its {rows} records are held out; give a smaller validation_size"
        else:
            reason = "no record that has a response to learn" if rows else "it has no records"
        return UserError(f"'{self.source.file}' has nothing to train on: {reason}")

    def _example(self, row: Row) -> Example | None:
        record = parse_record(row.item(), row.where, False, self._columns)
        return None if record is None else self._make(row.number, record, row.where)


def _shuffled(rows: Iterator[Row], rng: random.Random) -> Iterator[Row]:
    """Yield each row at random among the next `SHUFFLED`."""
    held = list(islice(rows, SHUFFLED))
    rng.shuffle(held)
    for row in rows:
        place = rng.randrange(SHUFFLED)
        held[place], row = row, held[place]
        yield row
    yield from held


class StreamedDataset(Dataset[dict[str, Any]]):
    """The examples of a stream by place; items as in TrainDataset.

    Places are asked for in ascending order, some by each loading process of each training process, which all read the whole
    stream and tokenize their own examples. An earlier place begins again.

    Args:
        stream: the examples.
        tokenizer: makes token ids of them.
        seed: decides the order.
        length: number of places.
        train_on_prompt: whether the prompt's tokens have labels, too.
    """

    def __init__(self, stream: Stream, tokenizer: ExampleTokenizer, *, seed: int, length: int, train_on_prompt: bool) -> None:
        self._stream, self._tokenizer, self._seed, self._length = stream, tokenizer, seed, length
        self._train_on_prompt = train_on_prompt
        self._examples: Iterator[Example] = iter(())
        self._next: int | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> dict[str, Any]:
        if self._next is None or place < self._next:
            self._examples, self._next = self._stream.examples(self._seed), 0
        example = next(islice(self._examples, place - self._next, None))
        self._next = place + 1
        return TrainDataset([example], self._tokenizer, train_on_prompt=self._train_on_prompt)[0]


class StreamShare(TrainShare):
    """A process's own places of a stream, in their order: every `num_replicas`-th.

    An epoch begins behind the last example of the one before it, so that a limited epoch, and a finished run that is
    extended, see new examples.

    Args:
        length: of an epoch, a multiple of the number of processes.
        batch_size: examples a batch and process.
        trainer: counts the batches of the run.
    """

    def __init__(self, length: int, batch_size: int, trainer: L.Trainer) -> None:
        super().__init__(cast(Any, range(length)), trainer)
        self._length, self._batch_size, self._trainer = length, batch_size, trainer

    def __iter__(self) -> Iterator[int]:
        first, self.first = self.first, 0
        batches = self._trainer.fit_loop.epoch_loop.batch_progress
        earlier = max(0, batches.total.ready - batches.current.ready) * self._batch_size * self.num_replicas
        return iter(range(earlier + self.rank + first * self.num_replicas, earlier + self._length, self.num_replicas))


def num_batches(trainer: L.Trainer) -> int:
    """Return the batches that a process needs for all optimizer steps of a run.

    Raises:
        UserError: if the number of steps is not set, or all are to train on the same batches.
    """
    if limit := trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError(f"streaming and trainer.overfit_batches={limit} cannot be used together")
    if trainer.max_steps < 1:
        raise UserError(
            f"streaming has no end, and trainer.max_steps is {trainer.max_steps}; set it to the number of optimizer steps"
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    planned = [one.scheduling.values() for one in callbacks if isinstance(one, GradientAccumulationScheduler)]
    return trainer.max_steps * max([trainer.accumulate_grad_batches, *(n for values in planned for n in values)])
