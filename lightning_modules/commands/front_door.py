"""All commands of train.py, Lightning's four and our own, as subcommands of one LightningCLI."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_modules.cli import AdaptationCLI
from lightning_modules.cli.config_files import ON_DEFAULTS
from lightning_modules.commands.analyze import analyze
from lightning_modules.commands.command_line import CommandLine, split_command_line
from lightning_modules.commands.compare import compare
from lightning_modules.commands.export import export
from lightning_modules.commands.language.chat import chat
from lightning_modules.commands.language.evaluate import evaluate
from lightning_modules.commands.language.generate import generate
from lightning_modules.commands.sweep import sweep

# Those with a parameter `line` start from a config, as fit does; the others from a trained adapter.
COMMANDS: dict[str, Callable[..., Any]] = {
    "compare": compare,
    "sweep": sweep,
    "analyze": analyze,
    "export": export,
    "generate": generate,
    "chat": chat,
    "evaluate": evaluate,
}


class FrontDoor(AdaptationCLI):
    """`python train.py {fit,validate,test,predict,compare,sweep,analyze,export,generate,chat,evaluate}`.

    A function of `COMMANDS` gets its own options, which are parsed here. One with a parameter `line` also gets the CommandLine,
    which each of its runs parses on its own (adapters differ). Overrides these private methods of LightningCLI:
    `_add_subcommands`, `_prepare_subcommand_parser`, `_set_seed`, `_run_subcommand`.

    Args:
        args: the command line; None takes the process's own.

    Attributes:
        result: what a function of `COMMANDS` has returned.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        self._words = sys.argv[1:] if args is None else args
        self._asks = any(word.partition("=")[0].endswith(("-h", "help", "--print_config")) for word in self._words)
        self._line = CommandLine([], [], [])
        self.result: Any = None
        super().__init__(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), **{name: {"line"} for name in COMMANDS}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(
            **{"description": "Adapt pretrained models, and evaluate, compare and export the adapters.", **kwargs}
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Build the parser of the chosen command; the others only have to be listed."""
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        first = self._words[0] if self._words else ""
        added = parser.add_subcommands()
        for name in self.subcommands():
            text = inspect.getdoc(COMMANDS.get(name) or getattr(L.Trainer, name)) or ""
            summary = " ".join(text.partition("\n\n")[0].split())
            chosen = first == name or first.startswith(("-c", "--config"))
            prepare = self._prepare_subcommand_parser if chosen else lambda *_, **options: self.init_parser(**options)
            self._subcommand_parsers[name] = prepare(L.Trainer, name, description=summary)
            added.add_subcommand(name, self._subcommand_parsers[name], help=summary)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand not in COMMANDS:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        function = COMMANDS[subcommand]
        shows_fit = self._asks and _starts_from_config(function)
        parser = self.init_parser(**(ON_DEFAULTS if shows_fit else {}), **kwargs)
        own = parser.add_function_arguments(function, skip={"line"}, as_positional=subcommand == "sweep")
        self._subcommand_method_arguments[subcommand] = own
        if shows_fit:
            self._add_arguments(parser)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse Lightning's commands as usual; of the others, only their own options."""
        if self._words and self._words[0] in COMMANDS:
            name, *words = self._words
            own_parser = self._subcommand_parsers[name]
            self._line, own = split_command_line(words, self._subcommand_method_arguments[name])
            if not _starts_from_config(COMMANDS[name]):
                if any(rest != "{}\n" for rest in self._line.configs[1::2]):
                    own_parser.error(
                        f"--config {', '.join(self._line.files)} is not for {name}, which reads that of --adapter RUN"
                    )
                super().parse_arguments(parser, [name, *own, *self._line.arguments])
                return
            if not self._line.files and not self._asks:
                own_parser.error("--config is missing: give a config, as for fit")
            known = {"model", "data", "trainer", "seed_everything"}
            for word in self._line.arguments:
                if word.startswith("--") and "." not in word and word[2:].partition("=")[0].rstrip("+") not in known:
                    own_parser.error(f"unrecognized arguments: {word}")
            args = [name, *(self._line.words if self._asks else []), *own]
        super().parse_arguments(parser, args)

    def _set_seed(self) -> None:
        if self.subcommand not in COMMANDS:  # their runs do
            super()._set_seed()

    def before_instantiate_classes(self) -> None:
        if self.subcommand not in COMMANDS:
            super().before_instantiate_classes()

    def instantiate_classes(self) -> None:
        if self.subcommand not in COMMANDS:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in COMMANDS:
            super()._run_subcommand(subcommand)
            return
        options = {name: self.config[subcommand][name] for name in self._subcommand_method_arguments[subcommand]}
        function = COMMANDS[subcommand]
        self.result = function(self._line, **options) if _starts_from_config(function) else function(**options)


def _starts_from_config(command: Callable[..., Any]) -> bool:
    return "line" in inspect.signature(command).parameters
