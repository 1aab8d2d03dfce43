"""Train, evaluate, use and compare adapters: python train.py {fit,validate,test,predict,compare} --config configs/NAME.yaml"""

from __future__ import annotations

import sys
from typing import Any

from lightning_modules.cli import AdaptationCLI, user_mistake
from lightning_modules.compare import compare


def main(args: list[str] | None = None) -> Any:
    """Run one subcommand; returns the AdaptationCLI or the comparison's results, for tests and scripts to look at."""
    words = sys.argv[1:] if args is None else args
    return compare(words[1:]) if words[:1] == ["compare"] else AdaptationCLI(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        mistake = user_mistake(error)
        if mistake is None:
            raise
        sys.exit(f"\nerror: {mistake}")
