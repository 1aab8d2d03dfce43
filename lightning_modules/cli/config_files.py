"""Where the shipped config files are, by name or path, and what the `config.yaml` of an older run is called today."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

SHIPPED = Path(__file__).parents[2]  # has configs/ and examples/: a checkout, or fourier_moe/trainer of an installed package
CONFIGS = SHIPPED / "configs"
ON_DEFAULTS = {"default_config_files": [glob.escape(str(CONFIGS / "defaults.yaml"))]}

MOVED = {
    "datamodules.arithmetic.ArithmeticDataModule": "datamodules.instructions.arithmetic.ArithmeticDataModule",
    "lightning_modules.sharding.ShardedBaseStrategy": "lightning_modules.strategies.sharding.ShardedBaseStrategy",
}
WITHOUT_EFFECT = re.compile(r"^ *init_std: 0(\.0)?\n", re.MULTILINE)  # its default; another value is refused as an unknown key
EXAMPLES = re.compile(r"(?<=: )examples/[\w./-]+")


def find_config(name: str) -> str:
    """Return the path of a config.

    Args:
        name: a path, or the name of a shipped config: `clip_cars`, `adapters/lora`, `configs/clip_cars.yaml`. An existing file
            comes first. Other text is returned as it is.
    """
    if "\n" in name or Path(name).is_file():
        return name
    here = Path.cwd()
    name_in_configs = name.removeprefix("configs/").removesuffix(".yaml")
    return shipped(f"configs/{name_in_configs}.yaml", here) or shipped(name, here) or name


def shipped(path: str, directory: Path) -> str | None:
    """Return where a file or directory of `configs/` or `examples/` is, relative to `directory` if it is below it."""
    place = SHIPPED / path
    if not place.exists():
        return None
    return os.path.relpath(place, directory) if place.is_relative_to(directory) else str(place)


def update(config: str, directory: Path) -> str:
    """Return the YAML text with today's class paths and the examples' places, without removed options at their default."""
    for old, new in MOVED.items():
        config = config.replace(old, new)
    config = WITHOUT_EFFECT.sub("", config)
    return EXAMPLES.sub(
        lambda found: found[0] if (directory / found[0]).exists() else shipped(found[0], directory) or found[0], config
    )
