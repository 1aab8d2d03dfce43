"""GLUE from the Hugging Face hub."""

from __future__ import annotations

from datamodules.glue.benchmarks import GlueTask
from datamodules.glue.source import Examples, GlueSource
from datamodules.glue.tables import ParquetFiles
from datamodules.shared.hub import HubDataset

HUB_ID = "nyu-mll/glue"


class HubFiles(GlueSource):
    """One task's parquet files on the hub, each split fetched when it is first loaded.

    Args:
        name: The task's name here and on the hub.
        task: Its row of the table.
        revision: Branch, tag or commit; None for the newest commit.
    """

    def __init__(self, name: str, task: GlueTask, revision: str | None = None) -> None:
        self.splits = frozenset(task.all_splits)
        self._task = task
        self._dataset = HubDataset(
            name,
            HUB_ID,
            [name],
            revision,
            f"Without access to the hub, fetch `hf download {HUB_ID} --repo-type dataset --include '{name}/*' --local-dir DIR` "
            f"elsewhere and give --data.directory DIR: the hub's parquet files, or GLUE's {task.folder}/train.tsv and "
            f"{task.folder}/dev*.tsv",
        )

    @property
    def origin(self) -> str:  # type: ignore[override]
        return self._dataset.origin

    @property
    def revision(self) -> str | None:  # type: ignore[override]
        return self._dataset.commit

    def look_up(self) -> None:
        self._dataset.look_up()

    def load(self, split: str) -> Examples:
        files = self._dataset.files([split])
        return ParquetFiles(self._task, files, files[split][0].parent).load(split)

    def missing(self, split: str) -> str:
        return "the hub's version has changed"
