"""Train, evaluate, use and compare adapters: python train.py {fit,validate,test,predict,compare,analyze,sweep,export} ..."""

from __future__ import annotations

import sys
from typing import Any

from fourier_moe.errors import printable
from lightning_modules.cli import AdaptationCLI, user_error
from lightning_modules.commands.analyze import analyze
from lightning_modules.commands.compare import compare
from lightning_modules.commands.export import export
from lightning_modules.commands.sweep import sweep


def main(args: list[str] | None = None) -> Any:
    """Run one subcommand; returns the AdaptationCLI or what another command found, for tests and scripts to look at."""
    words = sys.argv[1:] if args is None else args
    own = {"compare": compare, "analyze": analyze, "sweep": sweep, "export": export}
    return own[words[0]](words[1:]) if words and words[0] in own else AdaptationCLI(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        mistake = user_error(error)
        if mistake is None:
            raise
        sys.exit("\nerror: " + "\n".join(map(printable, str(mistake).split("\n"))))
