"""CSV files that are safe to open: in a spreadsheet, and in a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fourier_moe.errors import printable

_FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # and their full-width forms


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, its cells as `csv_line` writes them."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(csv_line(header))
        file.writelines(csv_line(row) for row in rows)


def csv_line(cells: Sequence[Any]) -> str:
    """One row of a CSV file, in one line whatever the cells hold.

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
