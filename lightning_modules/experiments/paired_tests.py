"""The paired tests of a comparison: every variant against one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from lightning_modules.experiments.graded_examples import GradedSet, load_examples
from lightning_modules.experiments.kept_runs import kept_file
from lightning_modules.experiments.significance import Difference, Scores, holm, paired_difference, resample
from lightning_modules.tables import markdown_table
from lightning_modules.tasks.scores import SCORES

_SAME = 1e-4  # metrics are logged in float32


def differences(frame: pd.DataFrame, reference: str, output: Path) -> tuple[dict[str, Difference], list[str]]:
    """Compute every variant's metric less the reference's, on the seeds that both have.

    Args:
        frame: see `result_frame`.
        reference: a variant.
        output: directory of the runs.

    Returns:
        The differences by variant, and a line on what is left out and why, if anything is.
    """
    values = {name: runs.set_index("seed")["last"] for name, runs in frame.groupby("variant", sort=False)}
    if len(values) == 1:
        return {}, []
    if reference not in values:
        return {}, [f"{reference} has no run to compare the others with"]
    resampled, size, problem = _resampled(frame, output)
    found = {}
    for name in values:
        seeds = sorted(set(values[name].index) & set(values[reference].index))
        if name == reference or not seeds:
            continue
        pair = []
        for side in (name, reference):
            samples = np.stack([resampled[side, seed] for seed in seeds]) if resampled else None
            pair.append(Scores(values[side].loc[seeds].to_numpy(), samples, size))
        found[name] = paired_difference(*pair)
    return found, [problem] if problem else []


def format_differences(
    found: Mapping[str, Difference], labels: Mapping[str, str], reference: str, *, is_share: bool = True
) -> str:
    """Return a Markdown table, a row per variant, each less the reference; differences of shares are in percentage points."""
    factor, digits = (100, "+.1f") if is_share else (1, "+.4g")
    corrected = holm([difference.p for difference in found.values()])
    rows = []
    for (name, difference), p in zip(found.items(), corrected, strict=True):
        interval = (
            "-" if math.isnan(difference.p) else f"{factor * difference.low:{digits}} to {factor * difference.high:{digits}}"
        )
        rows.append(
            [labels[name], f"{factor * difference.mean:{digits}}", interval, _p(difference.p), _p(p), difference.sources]
        )
    unit = "points" if is_share else "difference"
    return markdown_table([f"against {labels[reference]}", unit, "95 % interval", "p", "p (Holm)", "over"], rows)


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _resampled(frame: pd.DataFrame, output: Path) -> tuple[dict[tuple[str, int], np.ndarray], int, str | None]:
    """Return the metric on bootstrap samples by variant and seed, the number of examples, and the problem if there is one."""
    metric, problem = frame["metric"].iat[0], "intervals are over seeds alone"
    set_name, _, name = metric.removeprefix("test/").rpartition("/")
    if name not in SCORES:
        return {}, 0, f"{metric} is not computed from single answers: {problem}"
    graded: dict[tuple[str, int], list[GradedSet]] = {}
    for variant, seed, logged in frame[["variant", "seed", "last"]].itertuples(index=False):
        path = kept_file(output, variant, seed).with_suffix(".npz")
        sets = load_examples(path) if path.is_file() else {}
        own = graded[variant, seed] = [sets[key] for key in sorted(sets) if not set_name or key == set_name]
        values = [SCORES[name](one.predictions, one.targets, np.ones(len(one.ids)), one.num_classes) for one in own]
        if not values or abs(np.mean(values) - logged) > _SAME:
            return {}, 0, f"{variant}, seed {seed}: its answers do not give its {metric}: {problem}"
    reference = next(iter(graded.values()))
    for (variant, seed), own in graded.items():
        if len(own) != len(reference) or not all(np.array_equal(a.ids, b.ids) for a, b in zip(own, reference, strict=True)):
            return {}, 0, f"{variant}, seed {seed} was tested on other examples: {problem}"
    samples = resample(SCORES[name], [[sets] for sets in graded.values()])
    size = sum(len(one.ids) for one in reference)
    return {key: sample[0] for key, sample in zip(graded, samples, strict=True)}, size, None
