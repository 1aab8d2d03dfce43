"""Words of the command line, and where a run is."""

from pathlib import Path

DEMO = ("--config", "configs/demo.yaml")
SMOKE = ("--config", "configs/smoke.yaml")
HEAD_ONLY = ("--config", "configs/adapters/head_only.yaml")
FULL = ("--config", "examples/digits_tower/full_fine_tuning.yaml")


class ParsedError(Exception):
    """Raised where a run would begin, by tests of the parser."""


def run_directory(cli):
    return Path(cli.trainer.log_dir)
