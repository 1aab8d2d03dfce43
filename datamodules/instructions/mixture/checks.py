"""What is refused of a user's own data before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datamodules.instructions.mixture.mixing import Source
from datamodules.instructions.reading.records import FIELDS
from fourier_moe.errors import UserError


def check_streaming(sources: Sequence[Source], packing: bool) -> None:
    """Refuse what cannot be streamed.

    Raises:
        UserError: naming it.
    """
    if packing:
        raise UserError("packing and streaming cannot be used together: rows are packed from all examples; set one to false")
    if len(sources) > 1 or sources[0].weight != 1 or not sources[0].custom:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"streaming reads one set of your own, without a weight, and train names {names}; set it to false")


def check_columns(columns: Mapping[str, str] | None, sources: Sequence[Source]) -> None:
    """Refuse names that nothing would read.

    Raises:
        UserError: if `columns` is not complete, names an unknown field, or there is no custom data.
    """
    if columns is None:
        return
    unknown = [name for name in columns if name not in FIELDS]
    if unknown:
        raise UserError(f"columns: '{unknown[0]}' is unknown; expected some of {', '.join(FIELDS)}, each with a column's name")
    for one, others in (("messages", ("instruction", "input", "output")), ("instruction", ("messages",))):
        both = [name for name in others if one in columns and name in columns]
        if both:
            raise UserError(f"columns names {one} beside {both[0]}; a record is a conversation, or a question with a response")
    if "messages" not in columns and not {"instruction", "output"} <= columns.keys():
        raise UserError(
            f"columns names {', '.join(columns) or 'nothing'}; expected messages, or instruction and output at least"
        )
    if not any(source.custom for source in sources):
        raise UserError("columns is for data of your own, and train and test name none")
