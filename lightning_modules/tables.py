"""Tables that are safe to paste and to open: in a spreadsheet, and in a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fourier_moe.errors import printable

_FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # and their full-width forms


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an aligned table, which reads well in a terminal too. Control characters and vertical bars are escaped."""
    table = [[printable(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    line = "| {} |".format
    cells = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], digits: int | None = None) -> None:
    """Write a CSV file with cells as in `csv_line`.

    Args:
        path: the file.
        header: names of the columns.
        rows: the cells of each row.
        digits: significant digits of floats; None for all of them.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(csv_line(header))
        for row in rows:
            file.write(csv_line([f"{cell:.{digits}g}" if digits and isinstance(cell, float) else cell for cell in row]))


def csv_line(cells: Sequence[Any]) -> str:
    """Return one row of a CSV file, in one line whatever the cells hold.

    Control characters become escapes (`printable`). Text that a spreadsheet would take for a formula gets an apostrophe in
    front, as OWASP advises; numbers do not, negative ones either.
    """
    buffer = io.StringIO()
    csv.writer(buffer).writerow([_safe(cell) if isinstance(cell, str) else cell for cell in cells])
    return buffer.getvalue()


def _safe(text: str) -> str:
    shown = printable(text)
    return f"'{shown}" if shown.startswith(_FORMULA_STARTS) and not _is_number(shown) else shown


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
