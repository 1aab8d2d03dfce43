"""Tables that people paste."""

from __future__ import annotations

from collections.abc import Sequence

from fourier_moe.errors import printable


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it reads well in a terminal too. Control characters and vertical bars of cells are escaped."""
    table = [[printable(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    line = "| {} |".format
    cells = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
