"""python -m benchmarks.one_expert: both ways to compute a single expert, forward and backward.

By positions, as routed experts are computed, and through the update as a matrix (fourier_moe/spectral/matrix_product.py). The
last column says which of them the operator takes. Processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.timing import paired_ratio, summarize, time_interleaved
from fourier_moe.spectral import matrix_product, torch_product
from lightning_modules.tables import markdown_table

WAYS = {"positions": torch_product, "matrix": matrix_product}
SIZES = (  # width, tokens, coefficients
    *((384, 800, 256), (384, 800, 1024), (384, 800, 4096), (384, 100, 4096), (384, 20, 4096)),
    *((1024, 1024, 1024), (1024, 1024, 8192), (1024, 128, 8192), (4096, 256, 8192)),
)
HEADER = ("width", "tokens", "coefficients", "positions, ms", "matrix, ms", "positions / matrix", "taken")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and store; return the rows of results.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_expert", description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="rounds; each times every size in both ways once")
    parser.add_argument("--sizes", type=int, nargs=3, action="append", metavar=HEADER[:3], help="may be given several times")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/one_expert"))
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    torch.set_num_threads(1)
    rows = measure(options.sizes or SIZES, options.repeats)
    table = markdown_table(HEADER, [_cells(row) for row in rows])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.md").write_text(f"{table}\n", encoding="utf-8")
    (options.output / "results.json").write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n")
    print(f"{table}\nstored in {options.output}")
    return rows


def measure(sizes: Sequence[Sequence[int]], repeats: int) -> list[dict[str, Any]]:
    """Time every size (width, tokens, coefficients) in both ways, all gradients but the gates'."""
    rows: list[dict[str, Any]] = []
    tasks: dict[str, Callable[[], None]] = {}
    for number, (width, tokens, coefficients) in enumerate(sizes):
        x, gradient = torch.randn(2, tokens, width)
        values = torch.randn(1, coefficients // 2, 2)
        frequencies = torch.randint(-(width // 2), width // 2 + 1, values.shape).to(torch.int32)
        arguments = (x, torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int64), values, frequencies)
        tasks |= {f"{number} {name}": partial(_step, way, arguments, gradient) for name, way in WAYS.items()}
        taken = "matrix" if matrix_product.cheaper(x, values, width) else "positions"
        rows.append({"width": width, "tokens": tokens, "coefficients": coefficients, "taken": taken})
    for task in tasks.values():
        task()
    samples = time_interleaved(tasks, repeats, clock=time.process_time)
    for number, row in enumerate(rows):
        positions, matrix = (samples[f"{number} {name}"] for name in WAYS)
        row |= {"positions": summarize(positions), "matrix": summarize(matrix), "ratio": paired_ratio(positions, matrix)}
    return rows


def _step(way: ModuleType, arguments: tuple[Tensor, ...], gradient: Tensor) -> None:
    way.product_forward(*arguments, gradient.shape[1], 1.0)
    way.product_backward(gradient, *arguments, 1.0, [True, False, True])


def _cells(row: dict[str, Any]) -> list[str]:
    times = [f"{1e3 * row[way]['median']:.1f}" for way in WAYS]
    ratio = "{median:.2f} ({lower_quartile:.2f}..{upper_quartile:.2f})".format(**row["ratio"])
    return [*(f"{row[name]:,}" for name in HEADER[:3]), *times, ratio, row["taken"]]


if __name__ == "__main__":
    main()
