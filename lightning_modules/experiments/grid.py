"""Runs of several variants with several seeds, each kept in a file: what `compare` and `sweep` share."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from fourier_moe.errors import UserError
from lightning_modules.callbacks.monitoring.peak_memory import PeakMemory
from lightning_modules.cli import AdaptationCLI, user_error
from lightning_modules.evaluation_sets import each_loader, limit_of
from lightning_modules.experiments.graded_examples import GradedExamples, GradedSet
from lightning_modules.experiments.kept_runs import kept_file, read_run, variant_directory, write_run
from lightning_modules.experiments.provenance import config_hash, repository_commit, versions
from lightning_modules.experiments.results import Result
from lightning_modules.interruption import read_checkpoint
from lightning_modules.tasks.scores import lower_is_better, not_shares


def run_grid(grid: Mapping[str, Sequence[str]], seeds: int, output: Path) -> tuple[list[Result], list[str]]:
    """Train and test every variant with every seed; a run whose result is in `output` already is not repeated.

    Args:
        grid: arguments of `fit` by variant.
        seeds: number of seeds: 0, 1, ...
        output: directory of the runs.

    Returns:
        The results, and one line for each run that failed.
    """
    runs = [(name, seed) for seed in range(seeds) for name in grid]
    results: list[Result] = []
    failures: list[str] = []
    seconds: dict[tuple[str, int], float] = {}  # duration of the runs made now
    for number, (name, seed) in enumerate(runs, 1):
        left = _remaining(runs[number - 1 :], seconds, output)
        print(f"\n=== {number}/{len(runs)}: {name}, seed {seed}{left} ===", flush=True)
        begin, kept = time.perf_counter(), kept_file(output, name, seed).is_file()
        try:
            results.append(run_one(name, seed, [*grid[name]], output, _train_and_test))
        except (KeyboardInterrupt, SystemExit):  # Lightning turns the former into the latter
            print(f"\ninterrupted: {len(results)} of {len(runs)} runs are in {output}; repeat the command", flush=True)
            raise
        except Exception as error:
            failures.append(f"{name}, seed {seed}: {describe_error(error)}")
            print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
        if not kept:
            seconds[name, seed] = time.perf_counter() - begin
        gc.collect()  # trainer and model refer to each other, and the next run needs the memory
    return results, failures


def require_named_logger(config: Mapping[str, Any]) -> None:
    """Refuse a config whose logger does not let the runs have directories by name.

    Raises:
        UserError: naming the logger.
    """
    logger = config["trainer"]["logger"]
    settings = logger.get("init_args", {}) if isinstance(logger, Mapping) else {}
    if not {"save_dir", "name"} <= settings.keys():
        found = logger["class_path"] if isinstance(logger, Mapping) else "several" if isinstance(logger, list) else logger
        raise UserError(
            f"trainer.logger is {found}; compare and sweep tell their runs apart by a logger's save_dir and name, as one "
            "TensorBoardLogger or CSVLogger has them"
        )


def _remaining(runs: Sequence[tuple[str, int]], seconds: Mapping[tuple[str, int], float], output: Path) -> str:
    """Say how long these runs will take, from the mean of the runs made so far: those of the same variant, else all."""
    todo = [name for name, seed in runs if not kept_file(output, name, seed).is_file()]
    if not seconds or not todo:
        return ""
    mean = statistics.mean(seconds.values())
    own = {name: [s for (other, _), s in seconds.items() if other == name] for name in todo}
    total = sum(statistics.mean(own[name]) if own[name] else mean for name in todo)
    text = f"{total:.0f} s" if total < 90 else f"{total / 60:.0f} min" if total < 5400 else f"{total / 3600:.1f} h"
    return f", about {text} left"


def run_one(
    variant: str,
    seed: int,
    args: list[str],
    output: Path,
    measure: Callable[[AdaptationCLI, str, int], tuple[Result, dict[str, GradedSet]]],
) -> Result:
    """Make one run, or read its result if a run of the same resolved config is kept.

    Args:
        variant: name of the variant.
        seed: its seed.
        args: arguments of `fit`.
        output: directory of the runs.
        measure: trains and evaluates; gets the parsed run, the variant and the seed.
    """
    name = f"{variant_directory(variant)}/seed_{seed}"
    logger = ["--trainer.logger.init_args.save_dir", str(output), "--trainer.logger.init_args.name", name]
    try:
        cli = AdaptationCLI([*args, "--seed_everything", str(seed), *logger], run=False)
    except SystemExit as error:
        raise UserError("the config does not parse, see the message above") from error
    config = resolved_config(cli)
    path = kept_file(output, variant, seed)
    kept = read_run(path, config, cli.trainer.is_global_zero)
    if kept is not None:
        kept.pop("overlay", None)  # the variant's former name
        return Result(**kept | {"variant": variant})
    result, examples = measure(cli, variant, seed)
    if cli.trainer.is_global_zero:
        write_run(path, config, asdict(result), examples)
    return result


def resolved_config(cli: AdaptationCLI) -> dict[str, Any]:
    """Return every setting of a run as plain values."""
    return json.loads(cli.parser.dump(cli.config, format="json"))


def _train_and_test(cli: AdaptationCLI, variant: str, seed: int) -> tuple[Result, dict[str, GradedSet]]:
    """Return the result, and the graded test examples of the last step's weights."""
    trainer, model = cli.trainer, cli.model
    timer, memory, examples = Timer(), PeakMemory(), GradedExamples()
    trainer.callbacks += [timer, memory, examples]  # type: ignore[attr-defined]
    trainer.fit(model, cli.datamodule)
    last_step = trainer.global_step
    router = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("router/")}
    metrics = merged(trainer.test(model, cli.datamodule, verbose=False))
    partial = limit_of(trainer, "test", each_loader(trainer.test_dataloaders))
    graded = examples.gather(trainer)
    main_metric = f"test/{model.task.main_metric}"
    if main_metric not in metrics:
        found = ", ".join(metrics) or "no metric"
        raise UserError(f"the test set gave {found}, but {main_metric} is needed for the comparison; does it have labels?")
    best = _best_checkpoint(trainer.checkpoint_callbacks)
    best_metrics = None
    if best is not None:
        path, step = best
        same = step == last_step  # then it holds the weights just tested
        best_metrics = metrics if same else merged(trainer.test(model, cli.datamodule, ckpt_path=path, verbose=False))
    result = run_result(
        cli,
        variant,
        seed,
        main_metric,
        metrics,
        timer,
        best_metrics=best_metrics,
        router=router,
        size=model.adapter.describe_size(),
        peak_memory=memory.peak,
        data_order=examples.data_order,
        config_hash=config_hash(resolved_config(cli)),
        commit=repository_commit(),
        versions=versions(trainer.strategy.root_device),
        partial=partial,
        not_shares=not_shares(model.task.new_metrics()),
    )
    return result, graded


def run_result(
    cli: AdaptationCLI, variant: str, seed: int, main_metric: str, metrics: dict[str, float], timer: Timer, **more: Any
) -> Result:
    """Return the result of a run: what every kind of run has, and more fields of `Result`."""
    model = cli.model
    return Result(
        method=type(model.adapter).__name__.removesuffix("Config"),
        variant=variant,
        seed=seed,
        main_metric=main_metric,
        metrics=metrics,
        parameters=model.report.trained,
        seconds=timer.time_elapsed("train"),
        lower_is_better=lower_is_better(model.task.new_metrics()),
        **more,
    )


def _best_checkpoint(callbacks: list[Any]) -> tuple[str, int] | None:
    """Return path and step of the checkpoint that was best on validation, None if no callback keeps one."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            checkpoint = read_checkpoint(callback.best_model_path)
            return callback.best_model_path, checkpoint["global_step"]
    return None


def merged(metrics_by_set: list[Any]) -> dict[str, float]:
    """Return the metrics of all test sets in one dictionary; their names contain the set."""
    return {name: float(value) for metrics in metrics_by_set for name, value in metrics.items()}


def describe_error(error: Exception) -> str:
    """Return one line; print the traceback before it, unless the error is the user's mistake."""
    mistake = user_error(error)
    if mistake is None:
        traceback.print_exception(error)
    text = " ".join(str(mistake or error).split())
    return f"{type(mistake or error).__name__}: {text}"
