"""The command line in a process: `main` for Python, `run` for a person."""

from __future__ import annotations

import sys
from typing import Any

from fourier_moe.errors import printable
from lightning_modules.cli import user_error
from lightning_modules.commands.front_door import COMMANDS, FrontDoor


def main(args: list[str] | None = None) -> Any:
    """Run one command; returns what a command of our own returns, and the CLI of Lightning's commands."""
    cli = FrontDoor(args)
    return cli.result if cli.subcommand in COMMANDS else cli


def run(args: list[str] | None = None) -> None:
    """Run one command for a person: what they did wrong is one line, and a fault of ours keeps its traceback."""
    try:
        main(args)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports it
    except Exception as error:
        mistake = user_error(error)
        if mistake is None:
            raise
        sys.exit("\nerror: " + "\n".join(map(printable, str(mistake).split("\n"))))
