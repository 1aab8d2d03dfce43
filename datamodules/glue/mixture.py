"""Several text classification tasks at once, through one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import ConcatDataset, DataLoader

from datamodules.glue.data_module import PREDICT, SELECTION, TESTED, GlueDataModule
from datamodules.glue.dataset import PadBatch, TaskDataset
from datamodules.shared.arguments import require
from datamodules.shared.data_module import BaseDataModule
from datamodules.shared.splits import TRAIN
from fourier_moe.errors import UserError


@dataclass(frozen=True)
class MixtureTask:
    """One task of a mixture.

    Args:
        dataset: as for GlueDataModule (`custom` for sentences of one's own); None for what the task is called.
        directory: as for GlueDataModule: local data instead of the hub's; None for the mixture's.
        weight: how often each of its training examples comes in an epoch, on average.
    """

    dataset: str | None = None
    directory: str | None = None
    weight: float = 1.0


class GlueMixtureDataModule(BaseDataModule):
    """Several tasks of GLUE, or of one's own, trained together and tested one by one.

    A batch is that of GlueDataModule with examples of all tasks: `task` names the task of each, `label` counts the classes
    of all tasks one after the other, and `classes` int64 (B, 2) has the first class of an example's task and the one after
    its last. `SequenceClassification` lets an example choose among its own task's classes only: one output layer per task.

    Every task has evaluation sets of its own (`cola`; `mnli/matched` and `mnli/mismatched`).

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
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if not tasks:
            raise UserError("tasks is empty; give one or more, such as {cola: {}, rte: {}}")
        for name, task in tasks.items():
            require(f"the weight of task '{name}'", task.weight, task.weight > 0, "positive")
        reads_hub = any(task.directory is None for task in tasks.values())
        require("revision", revision, revision is None or reads_hub, "null where every task has a directory of its own")
        self._tasks = {
            name: GlueDataModule(
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
            for name, task in tasks.items()
        }
        self._weights = {name: task.weight for name, task in tasks.items()}

    @property
    def class_names(self) -> list[str]:
        """The classes of all tasks, one task after the other: `cola/acceptable`."""
        return [f"{name}/{class_name}" for name, task in self._tasks.items() for class_name in task.class_names]

    @property
    def data_revision(self) -> str | None:
        """The commit of the hub's data set that was read, by any task; None for other data."""
        return next((task.data_revision for task in self._tasks.values() if task.data_revision), None)

    @property
    def evaluation_notes(self) -> dict[str, str]:
        """What a reader of the results has to know, by name of the test set."""
        return {
            name if of_set == "test" else f"{name}/{of_set}": note
            for name, task in self._tasks.items()
            for of_set, note in task.evaluation_notes.items()
        }

    def prepare_data(self) -> None:
        for task in self._tasks.values():
            task.trainer = self.trainer
            task.prepare_data()

    def setup(self, stage: str) -> None:
        """Loads what the stage needs, once; errors as for GlueDataModule."""
        for task in self._tasks.values():
            task.trainer = self.trainer
            task.setup(stage)

    def teardown(self, stage: str) -> None:
        for task in self._tasks.values():
            task.teardown(stage)

    @property
    def collate(self) -> PadBatch:
        return next(iter(self._tasks.values())).collate

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        sets = self._sets(TRAIN)
        lengths = [length for dataset in sets.values() for length in dataset.lengths]
        weights = [self._weights[name] for name, dataset in sets.items() for _ in range(len(dataset))]
        return self.train_loader(ConcatDataset(sets.values()), lengths=lengths, weights=weights)

    def val_dataloader(self) -> dict[str, DataLoader[dict[str, Any]]]:
        return self.evaluation_loaders(self._sets(SELECTION))

    def test_dataloader(self) -> dict[str, DataLoader[dict[str, Any]]]:
        return self.evaluation_loaders(self._sets(TESTED))

    def predict_dataloader(self) -> dict[str, DataLoader[dict[str, Any]]]:
        return self.evaluation_loaders(self._sets(PREDICT))

    def _sets(self, part: str) -> dict[str, TaskDataset]:
        """A part of all tasks; a task's set has its name, with the set's own behind it if the task has several."""
        sets, first_class = {}, 0
        for name, task in self._tasks.items():
            of_task = task.datasets(part)
            for set_name, dataset in of_task.items():
                full_name = name if len(of_task) == 1 else f"{name}/{set_name}"
                sets[full_name] = TaskDataset(dataset, name, first_class, len(task.class_names))
            first_class += len(task.class_names)
        return sets
