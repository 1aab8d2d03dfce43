"""Keep the rows of a resumed run's CSV files, which Lightning's CSVLogger deletes when it opens them again."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


def open_csv_files(trainer: L.Trainer) -> None:
    """Open the CSV files of the trainer's loggers and keep their rows.

    Call it before Lightning opens them, which it does right after `configure_callbacks`. Uses the private `_experiment` of
    CSVLogger, and `metrics_keys` of its writer.
    """
    for logger in _csv_loggers(trainer):
        path = _path(logger)
        aside = path.with_name(f".{path.name}.kept")
        if path.is_file() and logger._experiment is None:
            os.replace(path, aside)
        if aside.is_file():  # also if an earlier run was killed before it moved the file back
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
                writer = logger.experiment
            os.replace(aside, path)
            writer.metrics_keys = _read(path)[0]


def rows_in_csv_files(trainer: L.Trainer) -> list[int]:
    """Return the number of rows of each CSV file."""
    return [len(_read(_path(logger))[1]) if _path(logger).is_file() else 0 for logger in _csv_loggers(trainer)]


def cut_csv_files(trainer: L.Trainer, counts: list[int]) -> None:
    """Drop the rows of steps that a resumed run repeats.

    Args:
        counts: number of rows of each file when the checkpoint was written.
    """
    for logger, count in zip(_csv_loggers(trainer), counts, strict=False):
        path = _path(logger)
        if not path.is_file():
            continue
        keys, rows = _read(path)
        if len(rows) > count:
            aside = path.with_name(f".{path.name}.kept")
            with aside.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerows([keys, *rows[:count]])
            os.replace(aside, path)


def _csv_loggers(trainer: L.Trainer) -> list[CSVLogger]:
    """Return the loggers that write CSV files, none on processes that do not write."""
    main = getattr(rank_zero_only, "rank", 0) == 0
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)] if main else []


def _path(logger: CSVLogger) -> Path:
    return Path(logger.log_dir) / "metrics.csv"


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return (rows[0], rows[1:]) if rows else ([], [])
