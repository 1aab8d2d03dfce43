"""The command line of our own commands: their options, and for most of them a command line of fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_modules.cli.config_files import find_config

_OPTIONS_OF_FIT = ("ckpt_path", "weights_only")


@dataclass(frozen=True)
class CommandLine:
    """The part of a command line that fit understands.

    Attributes:
        files: the config files, as the user named them.
        configs: `--config` and a file, or its content without the command's own options, for each of them.
        arguments: all others, for example `--trainer.max_epochs 5`.
    """

    files: list[str]
    configs: list[str]
    arguments: list[str]

    @property
    def words(self) -> list[str]:
        return [*self.configs, *self.arguments]

    @property
    def name(self) -> str:
        """The first config's name without its ending; results go to a directory of this name."""
        return Path(self.files[0]).stem

    @property
    def names(self) -> str:
        """The names of all configs, as in `demo+lora`."""
        return "+".join(Path(file).stem for file in self.files)


def split_command_line(words: Sequence[str], options: Collection[str]) -> tuple[CommandLine, list[str]]:
    """Separate a command's own options from what fit understands.

    Config files apply in their order, before all arguments. Own options may stand in config files too; there they apply first.

    Args:
        words: the words behind the command.
        options: names of the own options, with underscores; on the command line dashes are accepted too.

    Returns:
        What fit understands, and the words of the own options, of `--help` and of `--print_config`.
    """
    line, in_files, own = CommandLine([], [], []), [], []
    rest = iter(words)
    if words and not words[0].startswith("-"):
        own.append(next(rest))  # the study of a sweep
    for word in rest:
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if name in ("--config", "-c"):
            file = find_config(value if equals else next(rest, ""))
            config, found = _divide(file, options)
            line.files.append(file)
            line.configs.extend(["--config", config])
            in_files += ["--config", found] if found else []
        elif name.startswith("--") and key in options:
            given = value if equals else next(rest, None)
            own.append(f"--{key}" if given is None else f"--{key}={given}")  # jsonargparse reports a missing value
        elif name in ("-h", "--help", "--print_config"):
            own.append(word)
        else:
            line.arguments.append(word)
    return line, [*in_files, *own]


def _divide(file: str, options: Collection[str]) -> tuple[str, str]:
    """Return a config without own options, and these, as YAML; the file's name if it has none or is not readable.

    A run's own config.yaml also has what only `fit` takes; that is left out.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return file, ""  # fit raises the error
    if not isinstance(content, dict) or not content.keys() & {*options, *_OPTIONS_OF_FIT}:
        return file, ""
    own = {name: content.pop(name) for name in options if name in content}
    rest = {name: value for name, value in content.items() if name not in _OPTIONS_OF_FIT}
    return yaml.safe_dump(rest), yaml.safe_dump(own) if own else ""
