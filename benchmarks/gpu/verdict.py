"""The targets that a GPU must show, met or missed."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.methods import DENSE, LORA, OURS, TRITON


class Target(NamedTuple):
    """`method` / `reference` in `column` of a table is at most `most`, or at least `least`."""

    section: str
    table: str
    column: str
    method: str
    reference: str
    most: float | None = None
    least: float | None = None


TARGETS = [
    Target("roberta", "table", "training_step", OURS, LORA, most=1.10),
    Target("roberta", "table", "inference", OURS, LORA, most=1.10),
    Target("roberta", "table", "training_step", DENSE, OURS, least=5),
    Target("llama", "most layers", "training_step", OURS, LORA, most=1.15),
    Target("llama", "most layers", "peak_memory", OURS, LORA, most=1.0),
    Target("llama", "few layers", "training_step", DENSE, OURS, least=5),
]


def verdicts(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each target: what it is, what was measured, and `met`, `missed` or `not measured`."""
    return [_row(target, sections) for target in TARGETS]


def _row(target: Target, sections: dict[str, Any]) -> dict[str, Any]:
    table = sections.get(target.section, {}).get("results", {}).get(target.table)
    methods = table["methods"] if table else {}
    method, reference = (faster_path(methods) if name == OURS else name for name in (target.method, target.reference))
    bound = f"at most {target.most}" if target.most is not None else f"at least {target.least}"
    layers = f"{table['setting']['model']}, {table['setting']['layers']} layers" if table else target.section
    row = {"where": layers, "what": f"{target.column} of {method} / {reference}", "target": bound}
    if not methods.get(reference) or method not in methods:
        return {**row, "measured": "", "verdict": "not measured"}
    if methods[method] is None:
        return {**row, "measured": "out of memory", "verdict": "missed" if target.least is None else "met"}
    ratio = _ratio(methods[method], methods[reference], target.column)
    if ratio is None:
        return {**row, "measured": "", "verdict": "not measured"}
    met = ratio <= target.most if target.most is not None else ratio >= (target.least or 0)
    return {**row, "measured": f"{ratio:.3f}", "verdict": "met" if met else "missed"}


def faster_path(methods: dict[str, Any]) -> str:
    """Return which of our two paths is the faster, of those that were measured."""
    measured = {path: methods[path]["training_step"]["median"] for path in (OURS, TRITON) if methods.get(path)}
    present = [path for path in (OURS, TRITON) if path in methods]
    return min(measured, key=lambda path: measured[path]) if measured else next(iter(present), OURS)


def _ratio(method: dict[str, Any], reference: dict[str, Any], column: str) -> float | None:
    if column == "peak_memory":
        return method[column] / reference[column] if method[column] and reference[column] else None
    pairs = zip(method[column]["samples"], reference[column]["samples"], strict=True)
    return statistics.median(a / b for a, b in pairs)
