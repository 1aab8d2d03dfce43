"""`compare --tune`: every variant gets the same number of trials over its own learning rates, judged on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Timer

from fourier_moe.errors import UserError
from lightning_modules.cli import AdaptationCLI
from lightning_modules.experiments.graded_examples import GradedSet
from lightning_modules.experiments.grid import describe_error, merged, run_one, run_result
from lightning_modules.experiments.kept_runs import variant_directory
from lightning_modules.experiments.preflight import Variant
from lightning_modules.experiments.results import Result
from lightning_modules.tables import markdown_table, write_table

TRIAL_SEED = 1000  # the runs that are tested have the seeds 0, 1, ...
GROUPS = ("experts", "adapter", "backbone", "head", "router")  # in the order in which their rates are varied
_STEPS = (2, 1)  # powers of two: the rates are varied by a factor of 4 first, then by 2

Point = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """One training run with other learning rates.

    Attributes:
        rates: learning rate of each parameter group.
        score: the validation metric; minus infinity if the run failed.
        metric: name of the score, such as `val/accuracy`; "" if the run failed.
        loss: the validation loss; infinity if the run failed. It decides between equal scores.
        failure: why the run failed; "" if it did not.
        minimizes: whether a lower score is better.
    """

    rates: Mapping[str, float]
    score: float = -math.inf
    metric: str = ""
    loss: float = math.inf
    failure: str = ""
    minimizes: bool = False

    @property
    def rank(self) -> tuple[float, float]:
        """What trials are compared by; larger is better."""
        own = -self.score if self.minimizes else self.score
        score, loss = (-math.inf if math.isnan(value) else value for value in (own, -self.loss))
        return score, loss


class NoValidationMetricError(UserError):
    """The validation data does not give what the trials are judged by; no other rate can change that."""


def search(dimensions: int, budget: int, evaluate: Callable[[Point], tuple[float, float]]) -> Point:
    """Find a good point with a compass search: one coordinate at a time, as long as it improves, then with smaller steps.

    Kolda, Lewis, Torczon: Optimization by Direct Search (SIAM Review 45, 2003), section 1. It needs no range, so a variant
    whose own rates are far off is not held to them.

    Args:
        dimensions: number of coordinates; the search begins at 0 in all of them.
        budget: number of different points that may be evaluated.
        evaluate: returns the rank of a point, larger is better.

    Returns:
        The best point that was evaluated.
    """
    ranks: dict[Point, tuple[float, float]] = {}
    best = (0,) * dimensions
    ranks[best] = evaluate(best)

    def improves(point: Point) -> bool:
        nonlocal best
        if point not in ranks:
            if len(ranks) == budget:
                return False
            ranks[point] = evaluate(point)
        if ranks[point] > ranks[best]:
            best = point
            return True
        return False

    def moved(index: int, step: int) -> Point:
        return (*best[:index], best[index] + step, *best[index + 1 :])

    for step in _STEPS:
        improved = True
        while improved and len(ranks) < budget:
            improved = False
            for index in range(dimensions):
                for direction in (step, -step):
                    while improves(moved(index, direction)):
                        improved = True
    return best


def own_rates(variants: Mapping[str, Variant]) -> dict[str, dict[str, float]]:
    """Return the learning rate of each group that is trained, by variant."""
    found = {}
    for name, variant in variants.items():
        groups = {group: getattr(variant.optimization, group) for group in GROUPS}
        found[name] = {group: setting.lr for group, setting in groups.items() if setting is not None and setting.lr > 0}
    return found


def tune(
    name: str, words: Sequence[str], own: Mapping[str, float], trials: int, metric: str | None, output: Path
) -> list[Trial]:
    """Train a variant with several learning rates and rank them on validation data; the test data is not read.

    A trial whose result is in `output` already is not made again.

    Args:
        name: name of the variant.
        words: arguments of `fit`.
        own: the rates to begin with, by group, see `own_rates`.
        trials: number of training runs.
        metric: validation metric, as `--metric` names it; None for the task's main one. Where validation does not measure it,
            as in language models, which answer questions in the test alone, the trials are judged by the task's `monitor`.
        output: directory of the comparison; the trials are in `trials/<variant>`.

    Returns:
        The trials, in the order in which they were made.

    Raises:
        UserError: if every trial failed, or there is no validation data.
    """
    directory = output / "trials" / variant_directory(name)
    made: list[Trial] = []

    def measure(cli: AdaptationCLI, point: str, seed: int) -> tuple[Result, dict[str, GradedSet]]:
        return _train_and_validate(cli, point, seed, metric)

    def evaluate(point: Point) -> tuple[float, float]:
        rates = {group: float(f"{lr * 2.0**power:.6g}") for (group, lr), power in zip(own.items(), point, strict=True)}
        text = ",".join(f"{group}={lr:g}" for group, lr in rates.items())
        print(f"\n=== trial {len(made) + 1}/{trials} of {name}: {text.replace(',', ', ')} ===", flush=True)
        try:
            result = run_one(text, TRIAL_SEED, [*words, *rate_words(rates)], directory, measure)
        except NoValidationMetricError:
            raise
        except Exception as error:
            made.append(Trial(rates, failure=describe_error(error)))
            print(f"failed: {made[-1].failure}", flush=True)
        else:
            score, loss = result.metrics[result.main_metric], result.metrics.get("val/loss", math.inf)
            made.append(Trial(rates, score, result.main_metric, loss, minimizes=result.minimizes(result.main_metric)))
        return made[-1].rank

    search(len(own), trials, evaluate)
    if all(trial.failure for trial in made):
        raise UserError(f"{name}: all {len(made)} trials failed; the first: {made[0].failure}")
    return made


def rate_words(rates: Mapping[str, float]) -> list[str]:
    """Return the arguments of `fit` that set these learning rates."""
    return [word for group, lr in rates.items() for word in (f"--model.optimization.{group}.lr", f"{lr!r}")]


def _train_and_validate(cli: AdaptationCLI, variant: str, seed: int, metric: str | None) -> tuple[Result, dict[str, GradedSet]]:
    """Return the validation metrics of the last step's weights."""
    trainer, model, timer = cli.trainer, cli.model, Timer()
    trainer.callbacks.append(timer)  # type: ignore[attr-defined]
    metrics: dict[str, float] = {}
    if trainer.limit_val_batches:  # else there is nothing to train for
        trainer.fit(model, cli.datamodule)
        if sum(trainer.num_val_batches):
            metrics = merged(trainer.validate(model, cli.datamodule, verbose=False))
    names = [f"val/{metric or model.task.main_metric}", model.task.monitor[0]]
    name = next((name for name in names if name in metrics), None)
    if name is None:
        found = ", ".join(metrics) or "there is no validation data; hold a part out"
        needed = " or ".join(dict.fromkeys(names))
        raise NoValidationMetricError(
            f"--tune needs {needed} of the validation data to judge its trials by, and found: {found}"
        )
    return run_result(cli, variant, seed, name, metrics, timer), {}


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Return the trial of the highest rank; of equal ones the first."""
    return max(trials, key=lambda trial: trial.rank)


def trial_table(tuned: Mapping[str, Sequence[Trial]], labels: Mapping[str, str], output: Path) -> list[str]:
    """Return a Markdown table of all trials and notes on rates at the edge of what was tried; write trials.csv.

    Args:
        tuned: the trials by variant.
        labels: what each variant is called.
        output: directory of trials.csv.
    """
    metric = next(trial.metric for trials in tuned.values() for trial in trials if not trial.failure)
    figures = list(dict.fromkeys([metric, "val/loss"]))
    groups = [group for group in GROUPS if any(group in trials[0].rates for trials in tuned.values())]
    header = ["method", "trial", *(f"{group} lr" for group in groups), *figures, "chosen"]
    rows: list[list[Any]] = []
    notes = []
    for name, trials in tuned.items():
        chosen = best_trial(trials)
        for number, trial in enumerate(trials, 1):
            rates = [trial.rates.get(group, "") for group in groups]
            values = [trial.failure, ""] if trial.failure else [trial.score, trial.loss]
            rows.append([labels[name], number, *rates, *values[: len(figures)], "yes" if trial is chosen else ""])
        for group, lr in chosen.rates.items():
            tried = {trial.rates[group] for trial in trials}
            if len(tried) > 1 and lr in (min(tried), max(tried)):
                edge = "lowest" if lr == min(tried) else "highest"
                notes.append(
                    f"Note: {labels[name]}: {lr:g} is the {edge} {group} rate tried; more trials may find a better one"
                )
    output.mkdir(parents=True, exist_ok=True)
    write_table(output / "trials.csv", header, rows)
    text = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return [f"Learning rates chosen on validation data (seed {TRIAL_SEED}):\n\n{markdown_table(header, text)}", *notes]
