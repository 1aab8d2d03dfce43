"""Several text classification tasks at once, through one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch.utils.data import ConcatDataset, DataLoader

from datamodules.glue.data_module import SELECTION, TESTED, GlueDataModule
from datamodules.mixture import MixtureDataModule, MixtureTask
from datamodules.shared.splits import TRAIN


class GlueMixtureDataModule(MixtureDataModule):
    """Several tasks of GLUE, or of one's own, trained together and tested one by one; see MixtureDataModule.

    Args:
        tasks: the tasks by name, in the order of their classes.
        tokenizer: as for GlueDataModule, like all that follow.
        directory: local directory with a folder for every task that names no directory of its own; None for the hub.
        revision: branch, tag or commit of the hub's data set; None for the newest commit.
        max_length: most tokens of an example; longer ones are cut.
        batch_size: examples a batch and process.
        num_workers: loading processes of each loader; 0 loads in the main process.
        selection: what the validation loaders go through: train (a part held out of it) or validation (what is tested).
        selection_fraction: share of each task's train that is held out, at most 5,000 examples.
        seed: decides which examples are held out.
        cache_directory: where token ids are kept from run to run; None for the cache of the `datasets` library.
        predict_split: test or validation; None for test where a task has one, else validation.
        synthetic: generate tiny data sets and read those. Not for `custom`.

    Raises:
        UserError: an argument is invalid, or a directory holds nothing of its task.
    """

    def __init__(
        self,
        tasks: Mapping[str, MixtureTask],
        tokenizer: str | None = None,
        directory: str | None = None,
        revision: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        selection: Literal["train", "validation"] = "train",
        selection_fraction: float = 0.1,
        seed: int = 0,
        cache_directory: str | None = None,
        predict_split: Literal["test", "validation"] | None = None,
        synthetic: bool = False,
    ) -> None:
        def task_module(name: str, task: MixtureTask) -> GlueDataModule:
            return GlueDataModule(
                task.dataset or name,
                tokenizer,
                directory=task.directory or directory,
                revision=None if task.directory else revision,
                max_length=max_length,
                batch_size=batch_size,
                selection=selection,
                selection_fraction=selection_fraction,
                seed=seed,
                cache_directory=cache_directory,
                predict_split=predict_split,
                synthetic=synthetic,
            )

        super().__init__(tasks, task_module, batch_size=batch_size, num_workers=num_workers, seed=seed, revision=revision)

    evaluation_parts = (SELECTION, TESTED)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        sets = self.sets(TRAIN)
        lengths = [length for one in sets.values() for length in one.dataset.lengths]  # type: ignore[attr-defined]
        return self.train_loader(ConcatDataset(sets.values()), lengths=lengths, weights=self.train_weights(sets.values()))
