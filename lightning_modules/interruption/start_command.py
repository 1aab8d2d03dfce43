"""How the commands that a run prints begin."""

from __future__ import annotations

import sys
from pathlib import Path


def start_command(torchrun: bool = False) -> str:
    """Return the words before `fit`: `python train.py` in a checkout, `fourier-moe` if the package is installed.

    Args:
        torchrun: whether torchrun starts the processes.
    """
    installed = Path(sys.argv[0]).name == "fourier-moe" or Path(sys.argv[0]).parts[-2:] == ("fourier_moe", "__main__.py")
    if torchrun:
        return f"torchrun YOUR_OPTIONS {'-m fourier_moe' if installed else 'train.py'}"
    return "fourier-moe" if installed else "python train.py"
