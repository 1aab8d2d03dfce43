"""The command line's parser: full option names only, checked config files, and errors of one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from fourier_moe.errors import UserError, printable
from lightning_modules.cli.config_files import find_config, prefer_torch, update
from lightning_modules.cli.parse_errors import one_line


class ArgumentParser(LightningArgumentParser):
    """Lightning's parser, without abbreviated options; an error is one line instead of the usage and a tree of types."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._files = [Path(file) for file in kwargs.get("default_config_files") or ()]
        self._directory = Path.cwd()
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config file.

        Raises:
            UserError: naming the file, if it is no YAML mapping or has a key twice.
        """
        check_config_file(Path(path))
        self._files.append(Path(path).absolute())
        self._directory = Path.cwd()  # jsonargparse changes to that of the file
        return super().parse_path(path, *args, **kwargs)

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parse the text of a config, an older run's too."""
        return super().parse_string(update(content, self._directory), *args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line, in which shipped configs may go by their names."""
        words = list(sys.argv[1:] if args is None else args)
        option = ""  # whose value the next word is
        for place, word in enumerate(words):
            name, equals, value = word.partition("=")
            if word.startswith("-") and equals:
                words[place] = f"{name}={_in_full(name, value)}"
            elif option:
                words[place] = _in_full(option, word)
            option = word if word.startswith("-") and not equals else ""
        return super().parse_args(words, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and exit with status 2. Parsers of single classes raise it, for the whole parser to print."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {printable(one_line(message, parser, parser._files))}\n")
        self.exit(2)


def _in_full(option: str, value: str) -> str:
    """Return an option's value with a shipped config's path, or the path of torch's class, in place of a bare name."""
    if option in ("--config", "-c"):
        return find_config(value)
    return prefer_torch(f"{option}={value}").partition("=")[2]


def check_config_file(path: Path) -> None:
    """Read a config file.

    Raises:
        UserError: if it is no YAML mapping, or has a key twice: the first would be ignored.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except ValueError:  # of the encoding
        raise UserError(f"--config {path}: not a text file; a YAML file is needed") from None
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        line = f", line {place.line + 1}" if place else ""
        raise UserError(f"--config {path}{line}: {error.problem or error.context}; it is not valid YAML") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}; it is not valid YAML") from error
    if not isinstance(node, yaml.MappingNode):
        found = "is empty" if node is None else "is no mapping"
        raise UserError(f"--config {path} {found}; a YAML mapping with keys such as trainer, model and data is needed")
    _require_keys_once(node, path)


def _require_keys_once(node: yaml.Node, path: Path) -> None:
    seen: dict[str, int] = {}
    for entry in node.value if isinstance(node, yaml.CollectionNode) else []:
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        if key is not None:
            line = key.start_mark.line + 1
            if str(key.value) in seen:
                raise UserError(f"--config {path}, line {line}: {key.value} is given in line {seen[str(key.value)]} already")
            seen[str(key.value)] = line
        _require_keys_once(value, path)
