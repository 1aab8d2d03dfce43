"""Where this package keeps files of its own from run to run."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_directory() -> Path:
    """Return `fourier_moe` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fourier_moe"
