"""Where a run's files go."""

from __future__ import annotations

from pathlib import Path

import lightning as L


def run_directory(trainer: L.Trainer) -> Path:
    """The logger's directory, else the trainer's root directory; the same on every rank."""
    return Path(trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir))
