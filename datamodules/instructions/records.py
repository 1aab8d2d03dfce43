"""Records of instruction data, read from JSON and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datamodules.shared.json_items import read_items, shorten
from fourier_moe.errors import UserError


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


def read_records(path: Path, *, needs_answer: bool) -> list[Record]:
    """Read a list of objects, or one object a line, with `instruction`, `output`, `answer`, perhaps `input`.

    Args:
        path: the file.
        needs_answer: whether `answer` must be there; else a missing one is the whole output.

    Raises:
        UserError: naming file and record, if it is not such a file, or has no records.
    """
    records = []
    for where, item in read_items(path):
        if not isinstance(item, dict):
            raise UserError(f"{where} is {shorten(item)}; expected an object with instruction, output and answer")
        fields = {}
        for name, optional in (("instruction", False), ("input", True), ("output", False), ("answer", not needs_answer)):
            value = item.get(name)
            if value is None and optional:
                value = item["output"] if name == "answer" else ""
            if value is None:
                raise UserError(f"{where} has no '{name}'; its fields are {', '.join(map(str, item)) or 'none'}")
            if name == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str):
                raise UserError(f"{where}: '{name}' is {shorten(value)}; expected text")
            fields[name] = value
        for name in ("instruction", "answer"):  # gsm8k has empty outputs
            if not fields[name].strip():
                what = "'output' is empty, and there is no 'answer'" if item.get(name) is None else f"'{name}' is empty"
                raise UserError(f"{where}: {what}")
        records.append(Record(**fields))
    if not records:
        raise UserError(f"'{path}' has no records; expected a list of objects with instruction, output and answer")
    return records
