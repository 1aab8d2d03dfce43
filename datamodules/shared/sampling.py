"""Which examples, in which order: resumable shuffling for training, every example once for evaluation."""

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DistributedSampler, Sampler

from fourier_moe.errors import UserError

BATCHES_PER_CHUNK = 50
_OTHER_STREAM = 0x5851F42D4C957F2D  # keeps the seeds of augmentation apart from the order


class ShuffledSampler(Sampler[Any]):
    """A new order every epoch, fixed by (seed, epoch), so that a resumed run goes on where the interrupted one stopped.

    For a `TrainLoader`, inside a `TrainShare`, which passes Lightning's `set_epoch` on.

    Args:
        dataset: what is sampled from.
        seed: decides the orders.
        lengths: length of each example, for batches of similar lengths, which need little padding: the shuffled examples
            are sorted within chunks of 50 batches, and then the batches are shuffled. Examples that fill no batch come last.
        batch_size: examples a step on all processes together (a loader's batch size times `num_shares`); needed with
            `lengths`.
        weights: how often each example comes in an epoch, on average: with 2.3, twice in every epoch and in 3 of 10 a third
            time. Every epoch has the same number of examples, the sum of the weights rounded down.
        with_seeds: give pairs of an index and a seed, from which the example's augmentation is to draw. The seeds are fixed by
            (seed, epoch, place in the order), so that neither workers nor an interruption change what is drawn.

    Attributes:
        generator: for the DataLoader, which would otherwise draw from the run's own.

    Raises:
        UserError: an argument does not fit the data set, or the weights add up to less than one example.
    """

    def __init__(
        self,
        dataset: Sized,
        seed: int,
        *,
        lengths: Sequence[int] | None = None,
        batch_size: int | None = None,
        weights: Sequence[float] | None = None,
        with_seeds: bool = False,
    ) -> None:
        self._seed = seed
        self._with_seeds = with_seeds
        if lengths is not None and len(lengths) != len(dataset):
            raise UserError(f"lengths has {len(lengths)} entries, but the data set has {len(dataset)} examples")
        if (lengths is None) != (batch_size is None) or (batch_size is not None and batch_size < 1):
            raise UserError(f"batch_size={batch_size} must be 1 or more with lengths, and None without")
        self._lengths = None if lengths is None else torch.tensor(lengths)
        self._batch_size = batch_size
        self._weights = None if weights is None else _check_weights(weights, len(dataset))
        self._length = len(dataset) if self._weights is None else sum(_split_counts(self._weights))
        self.generator, self._order, self._seeds = torch.Generator(), torch.Generator(), torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        seed = self._seed + 0x9E3779B1 * epoch
        for generator in (self.generator, self._order):
            generator.manual_seed(seed % 2**63)
        self._seeds.manual_seed((seed + _OTHER_STREAM) % 2**63)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        examples = None if self._weights is None else _repeat(self._weights, self._order)
        order = torch.randperm(self._length, generator=self._order)
        if examples is not None:
            order = examples[order]
        if self._lengths is not None:
            order = self._group(order, self._lengths[order])
        if not self._with_seeds:
            return iter(order.tolist())
        seeds = torch.randint(2**63 - 1, (self._length,), generator=self._seeds)
        return zip(order.tolist(), seeds.tolist(), strict=True)

    def _group(self, order: Tensor, lengths: Tensor) -> Tensor:
        """Put shuffled examples into batches of similar lengths."""
        assert self._batch_size is not None
        size = self._batch_size
        chunk = BATCHES_PER_CHUNK * size
        full, rest = order.split([len(order) // size * size, len(order) % size])
        by_length = [
            piece[of_piece.argsort(stable=True)]
            for piece, of_piece in zip(full.split(chunk), lengths[: len(full)].split(chunk), strict=True)
        ]
        batches = torch.cat(by_length).view(-1, size)
        batches = batches[torch.randperm(len(batches), generator=self._order)]
        return torch.cat([batches.flatten(), rest])


def _check_weights(weights: Sequence[float], num_examples: int) -> Tensor:
    values = torch.tensor(weights, dtype=torch.float64)
    if len(values) != num_examples:
        raise UserError(f"weights has {len(values)} entries, but the data set has {num_examples} examples")
    if not (values.isfinite() & (values >= 0)).all():
        raise UserError("weights has entries that are negative or not finite; 0 or more is expected")
    if not sum(_split_counts(values)):
        raise UserError(f"weights add up to {float(values.sum()):g}; at least 1 is needed")
    return values


def _split_counts(weights: Tensor) -> tuple[int, int]:
    """Return how many examples of an epoch are certain, by the weights' integer parts, and how many are drawn."""
    drawn = int(weights.frac().sum() + 1e-6)  # ten times 0.1 add up to a little less than 1
    return int(weights.floor().sum()), drawn


def _repeat(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return the examples of one epoch, as indices: each as often as its weight's integer part, and some once more.

    Those are drawn by systematic sampling: the fractions lie end to end, in random order, and equally spaced points fall on
    them from a random start. Points are at least 1 apart, so that no example gets two, and each gets one in proportion to
    its fraction.
    """
    certain = torch.arange(len(weights)).repeat_interleave(weights.floor().long())
    _, num_drawn = _split_counts(weights)
    if num_drawn == 0:
        return certain
    order = torch.randperm(len(weights), generator=generator)
    ends = weights.frac()[order].cumsum(0)
    start = torch.rand((), dtype=torch.float64, generator=generator)
    points = (start + torch.arange(num_drawn)) * (ends[-1] / num_drawn)
    hits = torch.searchsorted(ends, points, right=True).clamp(max=len(order) - 1)  # the last point may be rounded up to the end
    return torch.cat([certain, order[hits]])


def run_seed(trainer: Trainer | None) -> int:
    """Return the run's seed, the same on all processes even if none is set, so that they split one order."""
    seed = torch.initial_seed()
    return seed if trainer is None or trainer.world_size == 1 else trainer.strategy.broadcast(seed)


def num_shares(trainer: Trainer | None) -> int:
    """Return the number of processes that share the training examples."""
    return 1 if trainer is None else (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)


class TrainShare(DistributedSamplerWrapper):
    """A process's own examples of a training sampler, dealt out one by one in the sampler's order.

    A stretch of `batch_size * num_shares` examples of the sampler becomes one step of all processes. One process gets all.

    Attributes:
        first: place among its own examples where the next pass begins; the passes after that begin at 0.
    """

    def __init__(self, sampler: Sampler[Any], trainer: Trainer | None) -> None:
        division = (None if trainer is None else trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        super().__init__(sampler, shuffle=False, **division)
        self.first = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.first = self.first, 0
        return islice(super().__iter__(), first, None)


def evaluation_sampler(dataset: Sized, trainer: Trainer | None) -> Sampler[int] | None:
    """Return a share of the examples for each of several processes, without the usual repetition, which counts some twice.

    Where the model is sharded every forward needs all processes, so that they get equally many batches, repetition included.
    """
    if trainer is None or trainer.world_size == 1:
        return None
    repeats = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    sampler = DistributedSampler if repeats else UnrepeatedDistributedSampler
    return sampler(dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False)  # type: ignore[arg-type]


def hold_out(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide examples into train and validation, class by class.

    Each class gives its share of `fraction`. Shares are rounded so that the total is right: with few examples a class,
    the classes that give one more are drawn at random. Every class keeps at least one train example.

    Args:
        labels: class index of each example.
        fraction: share of the examples to hold out, between 0 and 1.
        seed: decides which examples are held out; the same seed gives the same division.

    Returns:
        Indices of the train examples and of the validation examples, both ascending, the latter at least one.

    Raises:
        UserError: no class has an example to spare.
    """
    generator = torch.Generator().manual_seed(seed)
    members: dict[int, list[int]] = {}
    for index in torch.randperm(len(labels), generator=generator).tolist():
        members.setdefault(labels[index], []).append(index)

    shares = {label: fraction * len(indices) for label, indices in members.items()}
    counts = {label: min(int(shares[label]), len(indices) - 1) for label, indices in members.items()}
    missing = max(1, round(fraction * len(labels))) - sum(counts.values())
    # Insertion order is random, so ties between equal remainders are broken at random, too.
    for label in sorted(members, key=lambda label: counts[label] - shares[label]):
        if missing > 0 and counts[label] < len(members[label]) - 1:
            counts[label] += 1
            missing -= 1
    if not any(counts.values()):
        raise UserError(
            "cannot hold out validation examples: every class of train has a single one; add examples or a validation split"
        )

    validation = sorted(index for label, indices in members.items() for index in indices[: counts[label]])
    train = sorted(index for label, indices in members.items() for index in indices[counts[label] :])
    return train, validation
