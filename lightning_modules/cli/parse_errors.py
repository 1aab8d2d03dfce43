"""What jsonargparse says in a tree of types, in one line: key, value, and what is valid."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from fourier_moe import AdapterConfig

_INDENT = re.compile(r"[ -]*")
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a finite number", "str": "text", "NoneType": "null"}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the tree an error stands.

    Attributes:
        key: dotted name of the setting that the line is about, without what the line itself names.
        owner: innermost class that was being parsed; None outside of classes.
        lines: the error's line and all below it.
        before: the line above.
    """

    key: str
    owner: type | None
    lines: Sequence[str]
    before: str = ""

    @classmethod
    def of(cls, tree: Sequence[str], index: int) -> _Place:
        keys: list[str] = []
        owner, indent = None, len(_INDENT.match(tree[index])[0])  # type: ignore[index]
        for line in reversed(tree[:index]):
            width = len(_INDENT.match(line)[0])  # type: ignore[index]
            if not line.strip() or (width >= indent and "Parser key" not in line):
                continue
            indent = min(indent, width)
            if key := re.search(r'Parser key "([^"]+)"', line):
                keys.insert(0, key[1])
            elif path := re.search(r"class_path '([^']+)'", line):
                found = _imported(path[1])
                owner = owner or found
                if not dataclasses.is_dataclass(found) or (isinstance(found, type) and issubclass(found, AdapterConfig)):
                    keys.insert(0, "init_args")
        own = re.search(r'Parser key "([^"]+)":', tree[index])
        return cls(".".join([*keys, *([own[1]] if own else [])]), owner, tree[index:], tree[index - 1] if index else "")

    @property
    def value(self) -> str:
        """`=` and the value that was given; empty if the tree does not tell."""
        for line in self.lines:
            found = re.search(r"(?:Given value|Got value): (.*)", line)
            if found:
                nested = re.search(r"val='?(.*?)'?\)$", found[1])
                text = (nested[1] if nested else found[1]).replace("None", "null")
                return "" if text.startswith(("Namespace(", "{")) else f"={text}"
        return ""

    @property
    def callable_class(self) -> Any:
        """The class that a function of its instances was to be made of, such as an optimizer; None if there is none."""
        path = re.search(r"callable class: .*class_path='([^']+)'", self.lines[0])
        return _imported(path[1]) if path else None

    def join(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name


def one_line(message: str, parser: ArgumentParser, files: Iterable[Path] = ()) -> str:
    """Say an error of jsonargparse in one line.

    Args:
        message: jsonargparse's.
        parser: the parser, which knows all options.
        files: config files that were read; the line names the one that holds an unknown key.
    """
    tree = message.split("\n")
    for pattern, say in _RULES:
        for index, line in enumerate(tree):
            if found := pattern.search(line):
                place = _Place.of(tree, index)
                return say(found, place, parser, files)
    return re.sub(r'^Parser key "([^"]+)": ', r"--\1: ", " ".join(message.split()))


def _unknown_in_class(found: re.Match[str], place: _Place, parser: ArgumentParser, files: Iterable[Path]) -> str:
    name = found[1].lstrip("-").partition("=")[0]
    owner = place.callable_class or place.owner
    if owner is None:
        return _unknown_option(found, place, parser, files)
    section = place.key.removesuffix(".init_args")
    if owner.__name__ in ("LightningDataModule", "Task", "AdapterConfig"):
        return (
            f"{place.join(name)} belongs to no class: {section}.class_path is not given; name a config that gives it before "
            f"overlays such as configs/smoke.yaml{_in_file(place.join(name), files)}"
        )
    known = [*inspect.signature(owner).parameters]
    first, dot, rest = name.partition(".")
    near = _nearest(first, known)
    advice = f"did you mean {place.join(near)}{dot}{rest}?" if near else f"{owner.__name__} takes {', '.join(known)}"
    return f"{place.join(name)} is no option of {owner.__name__}; {advice}{_in_file(place.join(name), files)}"


def _unknown_option(found: re.Match[str], place: _Place, parser: ArgumentParser, files: Iterable[Path]) -> str:
    word = found[1].partition("=")[0]
    name = word.lstrip("-")
    options = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    files = () if "unrecognized" in found[0] else files
    near = name if name in options else _nearest(name, options)
    advice = f"did you mean --{near}?" if near else "--help lists all options"
    return f"{word} is no option; {advice}{_in_file(name, files)}"


def _no_such_class(found: re.Match[str], place: _Place, parser: ArgumentParser, _: Iterable[Path]) -> str:
    if "Literal[" in place.before and "." not in found[1]:  # a name, or the path of a class
        return _not_of_type(found, dataclasses.replace(place, lines=[place.before, *place.lines]))
    key = place.key.removesuffix(".init_args")
    paths = [path for hint in _type_of(key, parser) for path in _class_paths(hint)]
    by_name = {path.rpartition(".")[2].lower(): path for path in reversed(paths)}
    near = _nearest(found[1].rpartition(".")[2].lower(), by_name)
    advice = f"did you mean {by_name[near]}?" if near else "give the path of a class, such as package.module.Class"
    return f"{key}={found[1]} is no class; {advice}"


def _ambiguous(found: re.Match[str], place: _Place, *_: Any) -> str:
    return f"{place.key}={found[1]} is the name of several classes; give one of {found[2]}"


def _of_another_base(found: re.Match[str], place: _Place, *_: Any) -> str:
    return f"{place.key}={found[1]} is no {found[2]}"


def _in_callable(found: re.Match[str], place: _Place, *_: Any) -> str:
    return f"{place.key}={found[2]} must be {_KINDS.get(found[1], f'a {found[1]}')}"


def _not_of_type(found: re.Match[str], place: _Place, *_: Any) -> str:
    indent = _INDENT.match(place.lines[0])[0]  # type: ignore[index]
    same = [line[len(indent) :] for line in place.lines if line.startswith(indent)]
    kinds = [kind for line in same if line.startswith("Expected a ") for kind in _kinds(line)]
    text = " or ".join(dict.fromkeys(kinds))
    value = place.value
    choices = re.findall(r"[\w-]+", text)
    near = _nearest(value[1:], choices) if "Literal" in "".join(same) else None
    return f"{place.key}{value} must be {text}" + (f"; did you mean {near}?" if near else "")


def _kinds(line: str) -> Iterator[str]:
    if choices := re.search(r"Literal\[(.*)\]", line):
        yield ("one of " if "," in choices[1] else "") + choices[1].replace("'", "")
    elif (name := re.search(r"<class '(?:[\w.]+\.)?(\w+)'>", line)) and name[1] != "Iterable":
        yield _KINDS.get(name[1], "a list such as [a, b]" if name[1] in ("Sequence", "list") else f"a {name[1]}")


def _missing(found: re.Match[str], place: _Place, *_: Any) -> str:
    name = place.join(found[1]) if place.owner else re.sub(r"^[a-z]+\.(?=\w)", "", found[1])
    return f"--{name} is missing" + ("; give a --config that has it" if name.startswith(("data", "model")) else "")


def _no_command(found: re.Match[str], place: _Place, parser: ArgumentParser, _: Iterable[Path]) -> str:
    commands = next(action.choices for action in parser._actions if action.dest == "subcommand")
    return f"a command is missing; choose from {', '.join(map(str, commands or ()))}"


def _null(found: re.Match[str], place: _Place, *_: Any) -> str:
    return f"{place.key}=null: give the class_path of a class derived from {found[1]}"


def _abstract(found: re.Match[str], place: _Place, *_: Any) -> str:
    return f"{place.key}.class_path is missing; give it, or a --config that has it"


def _no_file(found: re.Match[str], place: _Place, *_: Any) -> str:
    path = Path(found[1])
    near = _nearest(path.name, (file.name for file in path.parent.glob("*")))
    return f"--{place.key} {path} does not exist" + (f"; did you mean {path.parent / near}?" if near else "")


def _restricted(found: re.Match[str], place: _Place, *_: Any) -> str:
    value = f"={found[1]}" if found[1] else place.value  # the line of a union's member does not repeat it
    return f"{place.key}{value} must be {found[2].removeprefix('v')}"


def _no_number(found: re.Match[str], place: _Place, *_: Any) -> str:
    return f"{place.key}{place.value or '=' + found[2]} must be {_KINDS[found[1]]}"


# The most telling line first; jsonargparse gives one for each member of a union.
_RULES: list[tuple[re.Pattern[str], Callable[..., str]]] = [
    (re.compile(r"Option '([^']+)' is not accepted"), _unknown_in_class),
    (re.compile(r"unrecognized arguments: (\S+)"), _unknown_in_class),
    (re.compile(r"does not accept option '([^']+)'"), _unknown_option),
    (re.compile(r"module '[^']+' has no attribute '([^']+)'"), _no_such_class),
    (re.compile(r"Multiple subclasses with name (\w+)\..* ambiguity: (.*)\.$"), _ambiguous),
    (re.compile(r"No module named '([^']+)'"), _no_such_class),
    (re.compile(r"callable class: Expected '([^']+)' to be a subclass of <class '(?:[\w.]+\.)?(\w+)'>"), _of_another_base),
    (re.compile(r"Expected a <class '(\w+)'>\. Got value: (.*?)\. Got value: Namespace"), _in_callable),
    (re.compile(r"Expected a dot import path string: (\S+)"), _no_such_class),
    (re.compile(r'expected "subcommand" to be one of'), _no_command),
    (re.compile(r"the following arguments are required: ([\w.]+)"), _missing),
    (re.compile(r"Not of type \w+: (?:(.*) )?does not conform to restriction (.+)"), _restricted),
    (re.compile(r"Not of type \w+: .*(int|float)(?:\(\))?\b.*: '(.*)'$"), _no_number),
    (re.compile(r"Not a valid subclass of (\w+)\. Got value: None"), _null),
    (re.compile(r"but ([\w.]+) is abstract"), _abstract),
    (re.compile(r"File does not exist: '(.+)'"), _no_file),
    (re.compile(r"Expected a (?!path but)(.+)"), _not_of_type),
]


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, [*known], n=1, cutoff=0.5)), None)


def _in_file(key: str, files: Iterable[Path]) -> str:
    """` (in FILE)` for the last file that has a dotted key."""
    for file in reversed([*files]):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for part in key.split("."):
            content = content.get(part, ...) if isinstance(content, dict) else ...
        if content is not ...:
            return f" (in {file})"
    return ""


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _type_of(key: str, parser: ArgumentParser) -> Iterator[type]:
    """Yield the classes in the type of an option, or of a dataclass's field behind it."""
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if action.dest == key:
            yield from _classes(hint)
        elif hint is not None and key.startswith(f"{action.dest}."):
            field = key.removeprefix(f"{action.dest}.")
            for owner in filter(dataclasses.is_dataclass, _classes(hint)):
                yield from _classes(get_type_hints(owner).get(field))


def _classes(hint: Any) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for inner in get_args(hint):
        yield from _classes(inner)


def _class_paths(base: type) -> Iterator[str]:
    """Subclasses, each by the shortest path that imports it."""
    children: list[type] = base.__subclasses__() if base.__module__ != "builtins" else []
    for child in children:
        parts = child.__module__.split(".")
        packages = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        paths = (f"{package}.{child.__name__}" for package in packages)
        yield from [path for path in paths if _imported(path) is child][:1]  # none for a class within a function
        yield from _class_paths(child)
