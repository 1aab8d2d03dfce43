"""Record: what a section of the GPU command has found so far, on disk after every finding."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_modules.tables import markdown_table


class Record:
    """The results of a section, written to `path` whenever something is added, so that a section may be killed at any time.

    Attributes:
        results: plain values for JSON: `checks`, and what `add` was given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = {"checks": {}, "markdown": ""}

    def add(self, name: str, value: Any, markdown: str = "") -> None:
        """Keep a result and its Markdown."""
        self.results[name] = value
        self.results["markdown"] += markdown.rstrip("\n") + "\n\n" if markdown else ""
        self._write()

    def table(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows with equal keys, which are a table's columns."""
        cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
        self.add(name, list(rows), markdown_table(list(rows[0]), cells))

    def check(self, name: str, error: float | None, limit: float = 0.0, note: str = "") -> None:
        """Keep the outcome of a check: passed if `error`, a number, is at most `limit`; None if it cannot be done here."""
        passed = None if error is None else error <= limit  # never for NaN
        finite = error if error is None or math.isfinite(error) else str(error)
        self.results["checks"][name] = {"error": finite, "limit": limit, "passed": passed, "note": note}
        print(f"{name}: {error} (at most {limit}) {note}", flush=True)
        self._write()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record an exception in the body as a failed check, or as not done if memory ran out; the next check is still made.

        A missing package is not for the check but for the whole section to tell.
        """
        try:
            yield
        except ModuleNotFoundError:
            raise
        except torch.OutOfMemoryError:
            self.check(name, None, note="out of memory")
        except Exception as error:
            self.check(name, math.nan, note=f"{type(error).__name__}: {error}".splitlines()[0][:300])

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.results, indent=2) + "\n")
        new.replace(self.path)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||actual - expected|| / ||expected|| in float64, or the difference itself where all of `expected` is 0."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    difference, norm = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / norm if norm else difference


def unequal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Return how many of the numbers differ in any bit."""
    return float(sum((a != b).sum().item() for a, b in zip(first, second, strict=True)))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
