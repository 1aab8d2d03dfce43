"""python -m benchmarks.adapters --model roberta-large: one table of step, inference, memory and parameters by method."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import count_flops
from benchmarks.machine import describe_machine
from benchmarks.memory import peak_memory, release_memory
from benchmarks.methods import FLOOR, LORA, METHODS, trained_parameters, usable_methods
from benchmarks.models import MODELS, Classifier
from benchmarks.report import COLUMNS, markdown, method_result
from benchmarks.steps import DTYPES, Setting, Trial, build_base
from benchmarks.timing import time_interleaved

_WARM_UP = 2


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and store; return the content of results.json."""
    options = _parse(arguments)
    setting = _setting(options)
    torch.set_num_threads(setting.threads)
    results = compare(setting, options.methods, options.repeats)
    output = options.output or Path("runs/benchmarks") / f"{setting.model}-{setting.device.replace(':', '')}-{setting.dtype}"
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "results.md").write_text(markdown(results))
    _say(f"\n{markdown(results)}\nstored in {output}")
    return results


def compare(setting: Setting, methods: Sequence[str], rounds: int, *, with_memory: bool = True) -> dict[str, Any]:
    """Measure `methods` side by side; return the content of results.json.

    Args:
        setting: model, batch and precision.
        methods: keys of METHODS.
        rounds: each times every method once.
        with_memory: measure peak memory too, which on a CPU starts a process for each method.
    """
    _say(f"{setting}")
    machine = describe_machine()
    base = build_base(setting) if setting.device != "cpu" else None
    memory: dict[str, int | None] = dict.fromkeys(methods, 0)
    for method in methods if with_memory else ():
        peak = memory[method] = peak_memory(base, method, setting)
        _say(f"peak memory {method}: {'out of memory' if peak is None else f'{peak / 2**20:,.0f} MiB'}")
    trials = _build_trials(base or build_base(setting), [m for m in methods if memory[m] is not None], setting)
    seconds = _time(trials, rounds)
    samples = {method: {column: seconds[column][method] for column in COLUMNS} for method in trials}

    references = {m: {"samples": samples[m], "peak_memory": memory[m]} for m in (LORA, FLOOR) if m in trials}
    flops = _count(trials)
    entry = MODELS[setting.model]
    return {
        "setting": dataclasses.asdict(setting),
        "adapted": {key: getattr(entry, key) for key in ("targets", "num_coefficients", "num_experts", "top_k", "lora_rank")},
        "rounds": rounds,
        "machine": {**machine, "load_average_after": describe_machine()["load_average"]},
        "methods": {
            m: method_result(samples[m], memory[m], trained_parameters(trials[m].model), flops[m], references)
            if m in trials
            else None
            for m in methods
        },
    }


def _build_trials(base: Classifier, methods: list[str], setting: Setting) -> dict[str, Trial]:
    """Build and warm up all methods over one frozen model; a method that does not fit on the GPU is left out."""
    trials = {}
    for method in methods:
        try:
            trial = Trial(base, method, setting)
            for _ in range(_WARM_UP):
                trial.model.train()
                trial.training_step()
                trial.model.eval()
                trial.inference()
            trials[method] = trial
        except torch.OutOfMemoryError:
            _say(f"{method}: out of memory beside the other methods; run it with fewer --methods")
        trial = None  # type: ignore[assignment]
        release_memory()
    return trials


def _time(trials: dict[str, Trial], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds by column, method and round."""
    samples = {}
    for column in COLUMNS:
        for trial in trials.values():
            trial.model.train(column == "training_step")

        def report(number: int, seconds: dict[str, float], column: str = column) -> None:
            times = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in seconds.items())
            _say(f"{column} {number + 1}/{rounds} [ms]: {times}")

        tasks = {name: getattr(trial, column) for name, trial in trials.items()}
        samples[column] = time_interleaved(tasks, rounds, on_round=report)
    return samples


def _count(trials: dict[str, Trial]) -> dict[str, int]:
    """Return the floating-point operations of a training step by method."""
    for trial in trials.values():
        trial.model.train()
    return {method: count_flops(trial.training_step) for method, trial in trials.items()}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument("--layers", type=int, help="default: the published model's")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int, help="tokens per sequence; not for images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="autocast: float32 weights under bfloat16 autocast; "
                        "bfloat16: frozen weights in bfloat16 as well")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that the device runs")
    parser.add_argument("--routing", default="balanced", choices=("balanced", "learned"))
    parser.add_argument("--repeats", type=int, default=10, help="rounds; each times every method once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="default: runs/benchmarks/MODEL-DEVICE-DTYPE")
    options = parser.parse_args(arguments)
    usable = usable_methods(options.device)
    options.methods = options.methods or usable
    if unusable := set(options.methods) - set(usable):
        parser.error(f"--methods {' '.join(unusable)} needs a GPU and Triton, and --device is {options.device}")
    for name in ("layers", "batch", "length", "repeats", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.length is not None and not MODELS[options.model].vocabulary:
        parser.error(f"--length has no effect on {options.model}, whose inputs are images")
    return options


def _setting(options: argparse.Namespace) -> Setting:
    entry = MODELS[options.model]
    return Setting(
        model=options.model,
        layers=options.layers or entry.layers,
        batch=options.batch or entry.batch,
        length=options.length or entry.length,
        device=options.device,
        dtype=options.dtype,
        balanced=options.routing == "balanced",
        threads=options.threads,
    )


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
