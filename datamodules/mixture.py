"""Several tasks at once, through one model with a head for each: what the mixtures of all families share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from datamodules.shared.arguments import require
from datamodules.shared.data_module import BaseDataModule
from datamodules.shared.splits import PREDICT, TEST, VALIDATION
from fourier_moe.errors import UserError


@dataclass(frozen=True)
class MixtureTask:
    """One task of a mixture.

    Args:
        dataset: as for the family's own DataModule (`custom` for data of one's own); None for what the task is called.
        directory: local data instead of the hub's; None for the mixture's.
        weight: how often each of its training examples comes in an epoch, on average.
    """

    dataset: str | None = None
    directory: str | None = None
    weight: float = 1.0


class TaskDataset(Dataset[dict[str, Any]]):
    """A set of one task among several, whose classes are numbered from `first_class`.

    An item is that of the set, with `task` str, `classes` int64 (2,) (the number of the task's first class, and of the one
    after its last), `label` so numbered, and the task's name in front of the `id`.

    Args:
        dataset: the task's set.
        task: the task's name.
        first_class: number of the task's first class.
        num_classes: number of its classes.
    """

    def __init__(self, dataset: Dataset[dict[str, Any]], task: str, first_class: int, num_classes: int) -> None:
        self.dataset, self.task = dataset, task
        self.first_class, self.end = first_class, first_class + num_classes

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch declares no length

    def __getitem__(self, item: Any) -> dict[str, Any]:
        example = self.dataset[item]
        if "label" in example:
            example["label"] += self.first_class
        classes = torch.tensor([self.first_class, self.end])
        return {**example, "id": f"{self.task}/{example['id']}", "task": self.task, "classes": classes}


class SeededConcatDataset(ConcatDataset[dict[str, Any]]):
    """Sets one after the other; an index may come with a seed, see `ShuffledSampler`."""

    def __getitem__(self, item: Any) -> dict[str, Any]:
        if isinstance(item, int):
            return super().__getitem__(item)  # type: ignore[no-untyped-call]
        place, seed = item
        number = bisect_right(self.cumulative_sizes, place)
        return self.datasets[number][place - (self.cumulative_sizes[number] - len(self.datasets[number])), seed]  # type: ignore[arg-type]


class MixtureDataModule(BaseDataModule):
    """Several tasks, trained together and tested one by one.

    A batch is that of the tasks' own DataModules with examples of all tasks: `task` names the task of each, `label` counts the
    classes of all tasks one after the other, and `classes` int64 (B, 2) has the first class of an example's task and the one
    after its last. The tasks of `lightning_modules` let an example choose among its own task's classes only: one output layer
    per task. Every task has evaluation sets of its own (`cola`; `mnli/matched` and `mnli/mismatched`).

    Args:
        tasks: the tasks by name, in the order of their classes.
        data_modules: the DataModule of each task.
        arguments: of BaseDataModule.

    Raises:
        UserError: if there are no tasks, a weight is not positive, or a revision is given where no task reads the hub.
    """

    evaluation_parts: ClassVar[tuple[str, str]] = (VALIDATION, TEST)  # what validation and test read of a task's DataModule

    def __init__(
        self, tasks: Mapping[str, MixtureTask], data_modules: Callable[[str, MixtureTask], BaseDataModule], **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        if not tasks:
            raise UserError("tasks is empty; give one or more, such as {first: {}, second: {weight: 2.0}}")
        for name, task in tasks.items():
            require(f"the weight of task '{name}'", task.weight, task.weight > 0, "positive")
        reads_hub = self._revision is None or any(task.directory is None for task in tasks.values())
        require("revision", self._revision, reads_hub, "null where every task has a directory of its own")
        self._tasks = {name: data_modules(name, task) for name, task in tasks.items()}
        self._weights = {name: task.weight for name, task in tasks.items()}

    @property
    def dataset_name(self) -> str:
        return ", ".join(self._tasks)

    @property
    def num_classes(self) -> int | None:
        """Classes of all tasks; None before they are known."""
        numbers = [task.num_classes for task in self._tasks.values()]
        known = [number for number in numbers if number is not None]
        return sum(known) if len(known) == len(numbers) else None

    @property
    def class_names(self) -> list[str]:
        """The classes of all tasks, one task after the other: `cola/acceptable`. Empty before those of every task are known."""
        known = all(task.class_names for task in self._tasks.values())
        return [f"{name}/{class_name}" for name, task in self._tasks.items() for class_name in task.class_names if known]

    @property
    def data_revision(self) -> str | None:
        """The commit of the hub's data set that was read, by any task; None for other data."""
        return next((task.data_revision for task in self._tasks.values() if task.data_revision), None)

    @property
    def evaluation_notes(self) -> dict[str, str]:
        """What a reader of the results has to know, by name of the test set."""
        return {
            name if set_name == "test" else f"{name}/{set_name}": note
            for name, task in self._tasks.items()
            for set_name, note in task.evaluation_notes.items()
        }

    @property
    def num_train_examples(self) -> int | None:
        """Examples of an epoch, weights included; None before they are known."""
        total = 0.0
        for name, task in self._tasks.items():
            if task.num_train_examples is None:
                return None
            total += self._weights[name] * task.num_train_examples
        return int(total)

    def prepare_data(self) -> None:
        for task in self._tasks.values():
            task.trainer = self.trainer
            task.prepare_data()

    def setup(self, stage: str) -> None:
        """Load what the stage needs, once; errors as for the tasks' DataModules."""
        for task in self._tasks.values():
            task.trainer = self.trainer
            task.setup(stage)

    def teardown(self, stage: str) -> None:
        for task in self._tasks.values():
            task.teardown(stage)

    @property
    def _any_task(self) -> BaseDataModule:
        """A task's DataModule, for what is the same for all of them."""
        return next(iter(self._tasks.values()))

    @property
    def batch_keys(self) -> tuple[str, ...]:
        return *self._any_task.batch_keys, "task", "classes"

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        return self._any_task.collate

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self._any_task.on_after_batch_transfer(batch, dataloader_idx)

    def val_dataloader(self) -> dict[str, DataLoader[dict[str, Any]]]:
        return self.evaluation_loaders(self.sets(self.evaluation_parts[0]))

    def test_dataloader(self) -> dict[str, DataLoader[dict[str, Any]]]:
        return self.evaluation_loaders(self.sets(self.evaluation_parts[1]))

    def predict_dataloader(self) -> dict[str, DataLoader[dict[str, Any]]]:
        return self.evaluation_loaders(self.sets(PREDICT))

    def sets(self, part: str) -> dict[str, TaskDataset]:
        """Return a part of all tasks; a task's set has its name, with the set's own behind it if the task has several."""
        sets, first_class = {}, 0
        for name, task in self._tasks.items():
            task_sets, num_classes = task.datasets(part), task.num_classes
            assert num_classes is not None
            for set_name, dataset in task_sets.items():
                full_name = name if len(task_sets) == 1 else f"{name}/{set_name}"
                sets[full_name] = TaskDataset(dataset, name, first_class, num_classes)
            first_class += num_classes
        return sets

    def train_weights(self, sets: Iterable[TaskDataset]) -> list[float]:
        """Return how often each example of these sets comes in an epoch, in their order."""
        return [self._weights[one.task] for one in sets for _ in range(len(one))]
