"""A local directory of GLUE data, in whichever layout it has."""

from __future__ import annotations

from pathlib import Path

from datamodules.glue.benchmarks import GlueTask
from datamodules.glue.parquet import ParquetFiles, find_parquet_files
from datamodules.glue.source import GlueSource
from datamodules.glue.tsv import TsvFiles, find_tsv_files
from fourier_moe.errors import UserError


def open_directory(directory: Path, name: str, task: GlueTask) -> GlueSource:
    """Open a task's official TSV files or, where there are none, the hub's parquet files.

    Args:
        directory: the task's folder, or the parent of a folder called like the task (CoLA, cola).
        name: the task's name here and on the hub.
        task: its row of the table.

    Raises:
        UserError: the directory is missing or holds nothing of this task.
    """
    layouts = (
        f"{task.folder}'s files train.tsv and dev*.tsv, or the hub's train-*.parquet and validation*.parquet, there or in a "
        f"folder {task.folder} or {name}"
    )
    if not directory.is_dir():
        raise UserError(f"directory '{directory}' does not exist; expected a directory with {layouts}")
    names = {task.folder.lower(), name}
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and path.name.lower() in names)
    for folder in (*folders, directory):
        if files := find_tsv_files(folder, task):
            return TsvFiles(task, files, folder)
        if parquet_files := find_parquet_files(folder, task):
            return ParquetFiles(task, parquet_files, folder)
    raise UserError(f"directory '{directory}' has no data of {name}; expected {layouts}")
