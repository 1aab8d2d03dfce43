"""A place for generated data."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path


def generated_directory(owner: object, prefix: str) -> tuple[Path, Callable[[], object]]:
    """A new directory, and what removes it: once, when called, or with its owner, or with the process.

    A copy of the owner in another process does not remove it: not its files.
    """
    root = Path(tempfile.mkdtemp(prefix=prefix))
    return root, weakref.finalize(owner, shutil.rmtree, root, ignore_errors=True)
