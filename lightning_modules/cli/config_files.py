"""Where the shipped config files are, by name or path, and what the `config.yaml` of an older run is called today."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

import torch

SHIPPED = Path(__file__).parents[2]  # has configs/ and examples/: a checkout, or fourier_moe/trainer of an installed package
CONFIGS = SHIPPED / "configs"
ON_DEFAULTS = {"default_config_files": [glob.escape(str(CONFIGS / "defaults.yaml"))]}

MOVED = {
    "datamodules.arithmetic.ArithmeticDataModule": "datamodules.instructions.arithmetic.ArithmeticDataModule",
    "lightning_modules.sharding.ShardedBaseStrategy": "lightning_modules.strategies.sharding.ShardedBaseStrategy",
}
# Of FourierMoEConfig, at its default; another value is refused as an unknown key.
WITHOUT_EFFECT = re.compile(
    r"(class_path: fourier_moe\.FourierMoEConfig\n *init_args:\n(?: +\w+:.*\n(?: +- .*\n)*)*?) *init_std: 0(?:\.0)?\n"
)
EXAMPLES = re.compile(r"(?<=: )examples/[\w./-]+")
# An optimizer or a schedule by a bare name, in YAML or in `KEY=VALUE`.
BARE = re.compile(r"\b(optimizer|schedule)(\.class_path=|=|:\s+(?:class_path:\s+)?)([A-Z]\w*)[ \t]*$", re.MULTILINE)
NAME = re.compile(r"[\w./-]{1,200}")


def find_config(name: str) -> str:
    """Return the path of a config.

    Args:
        name: a path, or the name of a shipped config: `clip_cars`, `adapters/lora`, `configs/clip_cars.yaml`. An existing file
            comes first. Other text is returned as it is.
    """
    if not NAME.fullmatch(name) or Path(name).is_file():
        return name
    name_in_configs = name.removeprefix("configs/").removesuffix(".yaml")
    path = name if name.startswith("examples/") else f"configs/{name_in_configs}.yaml"
    return shipped(path, Path.cwd()) or name


def shipped(path: str, directory: Path) -> str | None:
    """Return where a file or directory of `configs/` or `examples/` is, relative to `directory` if it is below it."""
    place = SHIPPED / path
    if not place.exists():
        return None
    return os.path.relpath(place, directory) if place.is_relative_to(directory) else str(place)


def prefer_torch(text: str) -> str:
    """Return the text with the paths of torch's optimizers and schedulers in place of bare names.

    Other libraries have classes of the same names, and a name of two classes is an error.
    """

    def path(found: re.Match[str]) -> str:
        module = torch.optim if found[1] == "optimizer" else torch.optim.lr_scheduler
        return f"{found[1]}{found[2]}{module.__name__}.{found[3]}" if hasattr(module, found[3]) else found[0]

    return BARE.sub(path, text)


def update(config: str, directory: Path) -> str:
    """Return the YAML text with today's full class paths and the examples' places, without removed options at their default."""
    for old, new in MOVED.items():
        config = config.replace(f"class_path: {old}\n", f"class_path: {new}\n")
    config = prefer_torch(WITHOUT_EFFECT.sub(r"\1", config))
    return EXAMPLES.sub(
        lambda found: found[0] if (directory / found[0]).exists() else shipped(found[0], directory) or found[0], config
    )
