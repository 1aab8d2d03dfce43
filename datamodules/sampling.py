"""Which examples, in which order: resumable shuffling for training, every example once for evaluation."""

from collections.abc import Iterator, Sized

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.data import Sampler


class ShuffledSampler(Sampler[int]):
    """A new order every epoch, fixed by (seed, epoch), so that a resumed run goes on where the interrupted one stopped.

    Lightning calls ``set_epoch``; on several processes its wrapper, which gives each a share, passes the call on.

    Attributes:
        generator: For the DataLoader, whose workers' augmentation it seeds. The order does not depend on what is drawn from it.
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        self._length = len(dataset)
        self._seed = seed
        self.generator, self._order = torch.Generator(), torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        for generator in (self.generator, self._order):
            generator.manual_seed((self._seed + 0x9E3779B1 * epoch) % 2**63)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self._length, generator=self._order).tolist())


def evaluation_sampler(dataset: Sized, trainer: Trainer | None) -> Sampler[int] | None:
    """On several processes, a share of the examples for each without the usual repetition, which would count some twice."""
    if trainer is None or trainer.world_size == 1:
        return None
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        return None  # every forward is a collective there: all processes need equally many batches, repetition included
    return UnrepeatedDistributedSampler(dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False)
