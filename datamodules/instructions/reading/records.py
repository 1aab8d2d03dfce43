"""Records of instruction data: a question with its answer, or a conversation, made of rows and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.instructions.reading.conversations import (
    ASSISTANT,
    COLUMNS,
    Message,
    learned_turns,
    parse_messages,
    parse_objects,
)
from datamodules.instructions.reading.rows import read_rows
from datamodules.shared.json_items import shorten
from fourier_moe.errors import UserError

_BESIDE = ("system", "tools")  # a message before the others, and what the assistant may call
FIELDS = ("instruction", "input", "output", "answer", "messages", *_BESIDE)  # what `columns` may name


@dataclass(frozen=True)
class Record:
    """A question and its answer.

    Attributes:
        instruction: what is asked.
        input: what it is asked about, often empty.
        output: the response as a model should write it.
        answer: the gold answer within it.
    """

    instruction: str
    input: str
    output: str
    answer: str


@dataclass(frozen=True)
class Conversation(Record):
    """A conversation up to the last response that has a loss, which is its output; what came before is its instruction.

    Attributes:
        messages: each with `role` and `content`.
        learned: positions of the assistant's turns that have a loss; the last message's is the last of them.
        tools: descriptions of the functions that the assistant may call.
        where: its name in errors.
    """

    messages: tuple[Message, ...]
    learned: tuple[int, ...]
    tools: tuple[Any, ...] = ()
    where: str = field(default="a conversation", compare=False)


def read_records(file: str | Path, *, needs_answer: bool, columns: Mapping[str, str] | None = None) -> list[Record | None]:
    """Read a list of objects, one object a line, or rows of a table, with `instruction` and `output`, perhaps `input` and
    `answer`, or with a conversation as `messages` or `conversations`, and perhaps `system` and `tools`.

    Args:
        file: the file, or a HubSplit as text.
        needs_answer: whether `answer` must be there; else a missing one is the whole output.
        columns: what the fields are called there; others but system and tools are not read then.

    Returns:
        The records, with None for conversations without a response to learn.

    Raises:
        UserError: naming file and record, if it is not such a file, or has no records.
    """
    records = [parse_record(item, where, needs_answer, columns) for where, item in read_rows(file)]
    if not records:
        raise UserError(f"'{file}' has no records; expected a list of objects with instruction, output and answer")
    if not any(records):
        raise UserError(f"'{file}' has no conversation with a response to learn, a message of the assistant after another one")
    return records


def parse_record(item: object, where: str, needs_answer: bool, columns: Mapping[str, str] | None = None) -> Record | None:
    """Return the record of a row; None for a conversation without a response to learn. See `read_records`.

    Raises:
        UserError: naming it, if it is no record.
    """
    if not isinstance(item, Mapping):
        raise UserError(f"{where} is {shorten(item)}; expected an object with instruction, output and answer")
    for name, column in (columns or {}).items():
        if column not in item:
            raise UserError(f"{where} has no '{column}', which columns names for {name}; its columns are {_names(item)}")
    beside = {name: item.get(name) for name in _BESIDE}
    read = beside | {name: item[column] for name, column in columns.items()} if columns else item
    if read.get("instruction") is None and any(name in read for name in COLUMNS):
        conversation = next((read[name] for name in COLUMNS if read.get(name) is not None), None)
        return _conversation(parse_messages(conversation, where), read, where)
    fields = {}
    for name, optional in (("instruction", False), ("input", True), ("output", False), ("answer", not needs_answer)):
        value = read.get(name)
        if value is None and optional:
            value = read.get("output") if name == "answer" else ""
        if value is None:
            raise UserError(f"{where} has no '{name}'; its fields are {_names(item)}")
        fields[name] = _text(value, name, where)
    for name in ("instruction", "answer"):  # gsm8k has empty outputs
        if not fields[name].strip():
            what = "'output' is empty, and there is no 'answer'" if read.get(name) is None else f"'{name}' is empty"
            raise UserError(f"{where}: {what}")
    record = Record(**fields)
    if not any(read.get(name) for name in _BESIDE):
        return record
    messages = ({"role": "user", "content": question_text(record)}, {"role": ASSISTANT, "content": record.output})
    return _conversation(messages, read, where)


def question_text(record: Record) -> str:
    """Return instruction and input as a user's message."""
    return "\n\n".join(part for part in (record.instruction, record.input) if part.strip())


def _conversation(messages: tuple[Message, ...], read: Mapping[str, Any], where: str) -> Conversation | None:
    answer, system = read.get("answer"), _text(read.get("system") or "", "system", where)
    tools = parse_objects(read.get("tools"), f"{where}: tools")
    if system.strip() and messages[0] != {"role": "system", "content": system}:
        if messages[0]["role"] == "system":
            raise UserError(f"{where} has 'system', and its messages begin with another one; remove one of them")
        messages = ({"role": "system", "content": system}, *messages)
    learned = learned_turns(messages)
    if not learned:
        return None
    messages = messages[: learned[-1] + 1]
    question = "\n".join(message["content"] for message in messages[:-1])
    output = messages[-1]["content"]
    gold = output if answer is None else _text(answer, "answer", where)
    return Conversation(question, "", output, gold or "tool call", messages, tuple(learned), tuple(tools), where)


def _text(value: object, name: str, where: str) -> str:
    if name == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' is {shorten(value)}; expected text")
    return value


def _names(item: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, item)) or "none"
