"""Is the difference between two variants more than chance, over seeds and over test examples?

The variants are tested with the same S seeds on the same N examples, so seeds and examples are crossed, and differences are
taken within both. The variance of the mean difference has two sources. The first is the sample variance of the S differences
over seeds. The second is a paired bootstrap over examples (Efron and Tibshirani 1993) that gives both variants the same
resampled examples; it also works for metrics that are not means over examples (F1, Matthews). Both contain the interaction of
seeds and examples, which is subtracted once, as in the analysis of variance with two crossed random factors (Clark 1973;
Baayen, Davidson and Bates 2008). Interval and p-value are those of Student's t with Satterthwaite's (1946) degrees of freedom.
If the seeds dominate, these are S - 1, so two or three seeds do not count as many. Several variants against one are corrected
by Holm's (1979) method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lightning_modules.experiments.graded_examples import GradedSet
from lightning_modules.tasks.scores import Score

RESAMPLES = 2000  # the standard error is then known to 2 %
_CONFIDENCE = 0.95
_ROUNDING = 1e-6  # metrics are logged in float32: smaller differences and variations are zero
_CHUNK = 2**24  # random numbers per draw
_SEED = 2604_01762  # unlikely to be a seed of the data, of which samples must be independent


@dataclass(frozen=True)
class Scores:
    """A metric of one variant.

    Attributes:
        values: (S,) by seed.
        resampled: (S, R) on R bootstrap samples of the test examples, the same samples for all variants; None if the metric
            cannot be computed from graded examples.
        num_examples: N; 0 without `resampled`.
    """

    values: np.ndarray
    resampled: np.ndarray | None = None
    num_examples: int = 0


@dataclass(frozen=True)
class Difference:
    """One variant less another.

    Attributes:
        mean: over the seeds.
        low, high: 95 % interval; nan if the variation is unknown: one seed and no graded examples, or exactly the same
            difference for all seeds and examples.
        p: two-sided p-value of no difference; nan likewise.
        sources: `seeds and examples`, `examples` (one seed) or `seeds`: the sources of variation.
    """

    mean: float
    low: float
    high: float
    p: float
    sources: str


def paired_difference(scores: Scores, others: Scores) -> Difference:
    """Return `scores` less `others`, for the same seeds and examples; see the module's description."""
    by_seed = scores.values - others.values
    seeds, mean = len(by_seed), float(by_seed.mean())
    terms = {}  # variance of the mean and degrees of freedom by source
    if seeds > 1:
        terms["seeds"] = float(by_seed.var(ddof=1)) / seeds, seeds - 1
    shared = 0.0
    if scores.resampled is not None and others.resampled is not None:
        resampled = scores.resampled - others.resampled
        variance_of_mean = float(resampled.mean(0).var(ddof=1))
        terms["examples"] = variance_of_mean, scores.num_examples - 1
        if seeds > 1:
            variance_of_one = float(resampled.var(axis=1, ddof=1).mean())
            shared = min(max((variance_of_one - variance_of_mean) / (seeds - 1), 0.0), variance_of_mean, terms["seeds"][0])
    if not terms:
        return Difference(mean, math.nan, math.nan, math.nan, "nothing")
    variance = sum(term for term, _ in terms.values()) - shared
    error, sources = math.sqrt(variance), " and ".join(terms)
    if error < _ROUNDING:  # all answers agree; or the difference is always the same, which proves nothing
        same = abs(mean) < _ROUNDING
        return Difference(mean, mean, mean, 1.0, sources) if same else Difference(mean, math.nan, math.nan, math.nan, sources)
    freedom = variance**2 / sum(term**2 / own for term, own in terms.values())
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - half, mean + half, p, sources)


def holm(p_values: Sequence[float]) -> list[float]:
    """Apply Holm's step-down correction: with a threshold of 0.05 the chance of any false rejection is below 5 %."""
    corrected, largest = [math.nan] * len(p_values), 0.0
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def resample(metric: Score, variants: Sequence[Sequence[Sequence[GradedSet]]]) -> list[np.ndarray]:
    """Compute a metric, averaged over the test sets, on bootstrap samples of their examples.

    Args:
        metric: takes predictions, targets and weights, each (N,), and the number of classes.
        variants: for each variant, for each of its seeds, its test sets; a test set has the same examples throughout.

    Returns:
        (S, RESAMPLES) for each variant.
    """
    generator = np.random.default_rng(_SEED)
    results = [np.zeros((len(seeds), RESAMPLES)) for seeds in variants]
    num_sets = len(variants[0][0])
    for index in range(num_sets):
        size = len(variants[0][0][index].ids)
        rows = max(1, _CHUNK // size)
        for begin in range(0, RESAMPLES, rows):
            weights = generator.multinomial(size, np.full(size, 1 / size), min(rows, RESAMPLES - begin)).astype(np.float64)
            for result, seeds in zip(results, variants, strict=True):
                for seed, sets in enumerate(seeds):
                    one = sets[index]
                    values = [metric(one.predictions, one.targets, sample, one.num_classes) for sample in weights]
                    result[seed, begin : begin + len(weights)] += np.array(values) / num_sets
    return results
