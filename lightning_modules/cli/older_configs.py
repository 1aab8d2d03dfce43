"""What the `config.yaml` of an older run is called today."""

from __future__ import annotations

import re

MOVED = {
    "datamodules.arithmetic.ArithmeticDataModule": "datamodules.instructions.arithmetic.ArithmeticDataModule",
    "lightning_modules.sharding.ShardedBaseStrategy": "lightning_modules.strategies.sharding.ShardedBaseStrategy",
}
WITHOUT_EFFECT = re.compile(r"^ *init_std: 0(\.0)?\n", re.MULTILINE)  # its default; another value is refused as an unknown key


def update(config: str) -> str:
    """Return the YAML text with today's class paths, and without removed options that are left at their default."""
    for old, new in MOVED.items():
        config = config.replace(old, new)
    return WITHOUT_EFFECT.sub("", config)
