"""Interruption: checked checkpoints, exact resumption, a graceful stop, and an early end of runs that cannot succeed."""

from lightning_modules.interruption.checkpoints import (
    CheckedCheckpointIO,
    newest_intact,
    read_checkpoint,
    require_new,
    require_writable,
)
from lightning_modules.interruption.csv_rows import open_csv_files
from lightning_modules.interruption.exact_resume import ExactResume
from lightning_modules.interruption.finite import require_finite_loss, require_finite_weights
from lightning_modules.interruption.graceful_stop import GracefulStop
from lightning_modules.interruption.newest_state import NewestState
from lightning_modules.interruption.search import (
    checkpoint_directories,
    find_checkpoint,
    last_checkpoint,
    require_nothing_ahead,
    require_own_checkpoint,
)
from lightning_modules.interruption.start_command import start_command
from lightning_modules.interruption.write_errors import write_error

__all__ = [
    "CheckedCheckpointIO",
    "ExactResume",
    "GracefulStop",
    "NewestState",
    "checkpoint_directories",
    "find_checkpoint",
    "last_checkpoint",
    "newest_intact",
    "open_csv_files",
    "read_checkpoint",
    "require_finite_loss",
    "require_finite_weights",
    "require_new",
    "require_nothing_ahead",
    "require_own_checkpoint",
    "require_writable",
    "start_command",
    "write_error",
]
