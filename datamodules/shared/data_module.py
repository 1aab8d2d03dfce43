"""What all DataModules share: loaders that resume, checks of arguments, and what a run is told about its data."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from datamodules.shared.arguments import require, require_one_origin
from datamodules.shared.loading import TrainLoader, leave_signals_to_main_process
from datamodules.shared.sampling import ShuffledSampler, TrainShare, evaluation_sampler, num_shares, run_seed
from datamodules.shared.tokenizers import check_max_length, load_tokenizer
from fourier_moe.errors import UserError


class BaseDataModule(L.LightningDataModule):
    """The base of every DataModule here, and of one's own.

    A subclass reads its sets in `setup` and returns loaders made by `train_loader` and `evaluation_loaders`: training then
    follows the run's seed, resumes within an epoch and is divided among processes; evaluation sees every example once. A batch
    is a mapping with `id`, a list of B strings unique in their set, beside what the task reads. The properties are what
    `lightning_modules.tasks.TaskData` asks for; a subclass overrides those that it knows.

    Args:
        batch_size: examples per batch and process.
        num_workers: loading processes of each loader; 0 loads in the main process.
        seed: of what is drawn once, such as held-out examples. The order in training follows the run's seed.
        directory: local data.
        synthetic: whether the data is generated.
        revision: of the hub's data set.

    Attributes:
        keeps_workers: whether loading processes live from epoch to epoch.
        data_revision: commit of the hub's data set that was read, None for other data.
        num_train_examples: examples per epoch, None where that is not known before `setup`.

    Raises:
        UserError: if an argument is invalid.
    """

    keeps_workers: ClassVar[bool] = True

    def __init__(
        self,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        directory: str | None = None,
        synthetic: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        require("batch_size", batch_size, batch_size >= 1, "1 or more")
        require("num_workers", num_workers, num_workers >= 0, "0 or more")
        require("seed", seed, seed >= 0, "0 or more")
        require_one_origin(directory, synthetic, revision)
        self.batch_size, self.num_workers, self.seed, self.synthetic = batch_size, num_workers, seed, synthetic
        self._directory = None if directory is None else Path(directory).expanduser()
        self._revision = revision
        self._remove_generated: Callable[[], object] | None = None

    @property
    def dataset_name(self) -> str:
        """What model cards call the data."""
        return type(self).__name__

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None where there are none, or before they are known."""
        return len(self.class_names) or None

    @property
    def class_names(self) -> list[str]:
        """Name of each class, by label; empty where there are none, or before they are known."""
        return []

    @property
    def data_revision(self) -> str | None:
        return None

    @property
    def evaluation_notes(self) -> dict[str, str]:
        """What a reader of the results has to know, by name of the test set; a single set is called `test`."""
        return {}

    @property
    def num_train_examples(self) -> int | None:
        return None

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """What a training batch holds beside `id`, so that a task of another kind is refused early; empty if unknown."""
        return ()

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        """Makes a batch of examples; None for torch's."""
        return None

    def datasets(self, part: str) -> Mapping[str, Dataset[Any]]:
        """After `setup`: the sets of a part of the data by name, for mixtures of several tasks.

        Raises:
            UserError: if this DataModule is not made for mixtures.
        """
        raise UserError(f"{type(self).__name__} cannot be a part of a mixture; implement its method datasets")

    def teardown(self, stage: str) -> None:
        """Remove generated files; a later `setup` writes the same ones again."""
        if self._remove_generated is not None:
            self._remove_generated()
            self._remove_generated = None
            self.forget()

    def forget(self) -> None:
        """Drop what was read from generated files."""

    def generated_directory(self) -> Path:
        """Return a new directory for generated data, which is removed at teardown, with this object or with the process.

        A copy of the object in another process does not remove it.
        """
        root = Path(tempfile.mkdtemp(prefix="synthetic_data_"))
        self._remove_generated = weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        return root

    def train_loader(
        self,
        dataset: Dataset[Any],
        *,
        lengths: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        with_seeds: bool = False,
    ) -> DataLoader[Any]:
        """Return shuffled batches of the training set; for `lengths`, `weights` and `with_seeds` see `ShuffledSampler`."""
        sampler = ShuffledSampler(
            dataset,  # type: ignore[arg-type]  # torch declares no length
            run_seed(self.trainer),  # not what a model has drawn before: all methods see one order under one seed
            lengths=lengths,
            batch_size=None if lengths is None else self.batch_size * num_shares(self.trainer),
            weights=weights,
            with_seeds=with_seeds,
        )
        options = self._loader_options(dataset, self.batch_size)
        return TrainLoader(sampler=TrainShare(sampler, self.trainer), generator=sampler.generator, **options)

    def evaluation_loaders(self, sets: Mapping[str, Dataset[Any]], batch_size: int | None = None) -> dict[str, DataLoader[Any]]:
        """Return a loader by name of the set, in the set's order; every example is read by one process."""
        return {
            name: DataLoader(
                sampler=evaluation_sampler(dataset, self.trainer),  # type: ignore[arg-type]
                **self._loader_options(dataset, batch_size or self.batch_size),
            )
            for name, dataset in sets.items()
        }

    def _loader_options(self, dataset: Dataset[Any], batch_size: int) -> dict[str, Any]:
        return {
            "dataset": dataset,
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.keeps_workers and self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": self.collate,
            "worker_init_fn": leave_signals_to_main_process,
        }


class TextDataModule(BaseDataModule):
    """The base of DataModules that tokenize.

    Args:
        tokenizer: name or directory of a Hugging Face model whose tokenizer is used, or `bytes` (a token per byte).
        max_length: maximum tokens per example.
        arguments: of BaseDataModule.

    Raises:
        UserError: if an argument is invalid.
    """

    def __init__(self, tokenizer: str | None, max_length: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        if tokenizer is None:
            raise UserError("tokenizer is missing; give the name or directory of a Hugging Face model, or bytes")
        self.tokenizer, self.max_length = tokenizer, max_length
        self._loaded_tokenizer: PreTrainedTokenizerBase | None = None

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, read once.

        Raises:
            UserError: if it cannot be loaded, or its model does not take `max_length` tokens.
        """
        if self._loaded_tokenizer is None:
            tokenizer = load_tokenizer(self.tokenizer)
            check_max_length(self.max_length, tokenizer, self.tokenizer)
            self._loaded_tokenizer = tokenizer
        return self._loaded_tokenizer


def one_or_all(loaders: Mapping[str, DataLoader[Any]]) -> Any:
    """Return a single loader without its name, or all of them."""
    return next(iter(loaders.values())) if len(loaders) == 1 else dict(loaders)


def incomplete(count: int | None, official: int | None, unit: str) -> str:
    """Return a note on a set with fewer or more than its official number of examples; empty for a complete or unknown one."""
    return "" if None in (count, official) or count == official else f"{count:,} of the complete set's {official:,} {unit}"
