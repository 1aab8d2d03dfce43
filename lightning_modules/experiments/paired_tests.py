"""The paired tests of a comparison: every method against one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_modules.experiments.graded_examples import GradedSet, load_examples
from lightning_modules.experiments.grid import Result, cell_file
from lightning_modules.experiments.significance import Difference, Scores, holm, paired_difference, resample
from lightning_modules.tables import markdown_table
from lightning_modules.tasks.scores import SCORES

_SAME = 1e-4  # metrics are logged in float32


def differences(
    results: Sequence[Result], metric: str, reference: str, output: Path
) -> tuple[dict[str, Difference], list[str]]:
    """Every method less the reference, by the cells' names, on the seeds that both have.

    Args:
        metric: name among the results' metrics, such as `test/accuracy`.
        reference: the cell's name.
        output: directory of the cells.

    Returns:
        The differences, and a line on what is left out and why, if anything is.
    """
    by_name: dict[str, dict[int, Result]] = {}
    for result in results:
        by_name.setdefault(result.overlay, {})[result.seed] = result
    if len(by_name) == 1:
        return {}, []
    if reference not in by_name:
        return {}, [f"{reference} has no run to compare the others with"]
    resampled, size, problem = _resampled(by_name, metric, output)
    found = {}
    for name in by_name:
        seeds = sorted(by_name[name].keys() & by_name[reference].keys())
        if name == reference or not seeds:
            continue
        pair = []
        for side in (name, reference):
            values = np.array([by_name[side][seed].metrics[metric] for seed in seeds])
            samples = np.stack([resampled[side, seed] for seed in seeds]) if resampled else None
            pair.append(Scores(values, samples, size))
        found[name] = paired_difference(*pair)
    return found, [problem] if problem else []


def format_differences(found: Mapping[str, Difference], labels: Mapping[str, str], reference: str) -> str:
    """Markdown table in percentage points, a row per method, each less the reference."""
    corrected = holm([difference.p for difference in found.values()])
    rows = []
    for (name, difference), p in zip(found.items(), corrected, strict=True):
        interval = "-" if math.isnan(difference.p) else f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
        rows.append([labels[name], f"{100 * difference.mean:+.1f}", interval, _p(difference.p), _p(p), difference.sources])
    return markdown_table([f"against {labels[reference]}", "points", "95 % interval", "p", "p (Holm)", "over"], rows)


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _resampled(
    by_name: Mapping[str, Mapping[int, Result]], metric: str, output: Path
) -> tuple[dict[tuple[str, int], np.ndarray], int, str | None]:
    """The metric on bootstrap samples by name and seed, the number of examples, and a problem instead if there is one."""
    of_set, _, name = metric.removeprefix("test/").rpartition("/")
    if name not in SCORES:
        return {}, 0, f"{metric} is not computed from single answers: intervals are over seeds alone"
    keys = [(overlay, seed) for overlay, seeds in by_name.items() for seed in seeds]
    graded: dict[tuple[str, int], list[GradedSet]] = {}
    for overlay, seed in keys:
        path = cell_file(output, overlay, seed).with_suffix(".npz")
        sets = load_examples(path) if path.is_file() else {}
        graded[overlay, seed] = [sets[key] for key in sorted(sets) if not of_set or key == of_set]
        of_cell = graded[overlay, seed]
        values = [SCORES[name](one.given, one.right, np.ones(len(one.ids)), one.num_classes) for one in of_cell]
        if not values or abs(np.mean(values) - by_name[overlay][seed].metrics[metric]) > _SAME:
            return {}, 0, f"{overlay}, seed {seed}: its answers do not give its {metric}: intervals are over seeds alone"
    reference = graded[keys[0]]
    for overlay, seed in keys:
        own = graded[overlay, seed]
        if len(own) != len(reference) or not all(
            np.array_equal(one.ids, other.ids) for one, other in zip(own, reference, strict=True)
        ):
            return {}, 0, f"{overlay}, seed {seed} was tested on other examples: intervals are over seeds alone"
    samples = resample(SCORES[name], [[graded[key]] for key in keys])
    size = sum(len(one.ids) for one in reference)
    return {key: sample[0] for key, sample in zip(keys, samples, strict=True)}, size, None
