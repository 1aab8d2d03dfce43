"""`fourier-moe` and `python -m fourier_moe`: the commands of train.py, in the installed package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "trainer"))  # before a package of the same name in the working directory

try:
    from lightning_modules.commands.main import run
except ModuleNotFoundError as error:  # the method alone works without the trainer's libraries
    sys.exit(f"error: {error}; the commands need: pip install 'fourier-moe[train]'")
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    run()
