"""python -m benchmarks.scaling: cost of one adapted projection by width, tokens, experts, active experts, coefficients.

Three things are timed at every point, forward and backward: the frozen projection (gradient with respect to its input), the
routed spectral product on given gates (all its gradients), and the whole adapted projection, router included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from benchmarks.plots import plot_study
from benchmarks.routing import BalancedRouter
from benchmarks.timing import paired_ratio, summarize, time_interleaved
from fourier_moe import FourierMoEConfig, FourierMoELinear, TopKRouter
from lightning_modules.tables import write_table

PARTS = ("frozen", "product", "adapted")
_WARM_UP = 2
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One projection, width x width; the defaults are RoBERTa-large's."""

    width: int = 1024
    tokens: int = 1024
    num_experts: int = 8
    top_k: int = 2
    num_coefficients: int = 1008


@dataclass(frozen=True)
class Study:
    """Points along one axis; `axis` is the field of Point that varies, `title` names the fixed ones."""

    axis: str
    title: str
    points: tuple[Point, ...]


def _along(axis: str, title: str, values: Sequence[int], **fixed: int) -> Study:
    return Study(axis, title, tuple(Point(**{**fixed, axis: value}) for value in values))


_PER_EXPERT = 126  # real coefficients of one expert at the default point

STUDIES = {
    "width": _along("width", "width (1,024 tokens, E=8, K=2, n=1008)", (768, 1024, 1536, 2048, 3072, 4096)),
    "tokens": _along("tokens", "tokens (width 1,024, E=8, K=2, n=1008)", (128, 512, 1024, 2048, 4096)),
    "experts": Study(
        "num_experts",
        f"experts (width 1,024, K=2, {_PER_EXPERT} coefficients per expert)",
        tuple(Point(num_experts=E, num_coefficients=E * _PER_EXPERT) for E in (4, 8, 16, 32, 64)),
    ),
    "active": _along("top_k", "active experts (width 1,024, E=8, n=1008)", (1, 2, 4, 8)),
    "coefficients": _along("num_coefficients", "coefficients (width 1,024, E=8, K=2)", (256, 1008, 2016, 4032, 8192)),
    "tiny": _along("width", "for the tests", (32, 64), tokens=8, num_experts=4, num_coefficients=64),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, store and plot; return the content of scaling.json."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "setting": {key: getattr(options, key) for key in ("device", "dtype", "repeats", "threads", "clock", "routing")},
        "machine": describe_machine(),
        "studies": {},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.studies:
        study = STUDIES[name]
        rows = _measure(study, options)
        results["studies"][name] = {"axis": study.axis, "title": study.title, "points": rows}
        plot_study(study.title, study.axis, rows, options.output / f"{name}.png", clock=options.clock)
    (options.output / "scaling.json").write_text(json.dumps(results, indent=2) + "\n")
    _write_csv(results["studies"], options.output / "scaling.csv")
    print(f"stored in {options.output}")
    return results


def _measure(study: Study, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all points of a study interleaved, so that a drift of the machine does not bend the curve."""
    tasks: dict[str, Callable[[], None]] = {}
    for number, point in enumerate(study.points):
        tasks |= {f"{number} {part}": task for part, task in _tasks(point, options).items()}
    for _ in range(_WARM_UP):
        for task in tasks.values():
            task()
    samples = time_interleaved(tasks, options.repeats, clock=_CLOCKS[options.clock])
    rows = []
    for number, point in enumerate(study.points):
        seconds = {part: samples[f"{number} {part}"] for part in PARTS}
        row: dict[str, Any] = dataclasses.asdict(point)
        row |= {part: {**summarize(values), "samples": values} for part, values in seconds.items()}
        row |= {f"{part}_to_frozen": paired_ratio(seconds[part], seconds["frozen"]) for part in ("product", "adapted")}
        rows.append(row)
        times = ", ".join(f"{part} {1e3 * row[part]['median']:.2f} ms" for part in PARTS)
        ratio = row["product_to_frozen"]
        print(
            f"{study.axis} {row[study.axis]}: {times}; product / frozen {ratio['median']:.3f} "
            f"({ratio['lower_quartile']:.3f}..{ratio['upper_quartile']:.3f})",
            flush=True,
        )
    return rows


def _tasks(point: Point, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    device, low_precision = torch.device(options.device), options.dtype != "float32"
    stored = torch.bfloat16 if low_precision else torch.float32
    base = nn.Linear(point.width, point.width).to(device, stored).requires_grad_(False)
    config = FourierMoEConfig(
        targets=["projection"],
        num_coefficients=point.num_coefficients,
        num_experts=point.num_experts,
        top_k=point.top_k,
    )
    layer = FourierMoELinear(base, config, "projection")
    nn.init.normal_(layer.experts.coefficients, std=0.01)
    if options.routing == "balanced":
        assert isinstance(layer.router, TopKRouter)
        layer.router = BalancedRouter(layer.router)
    x = torch.randn(point.tokens, point.width, device=device, dtype=stored, requires_grad=True)
    gradient = torch.randn(point.tokens, point.width, device=device)
    routing = layer.route(x)
    routing = routing._replace(gates=routing.gates.detach().requires_grad_(True))
    leaves = [x, routing.gates, *layer.parameters()]

    def task(function: Callable[[], Tensor]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
                y = function()
            y.backward(gradient.to(y.dtype))
            for leaf in leaves:
                leaf.grad = None

        return forward_and_backward

    functions = (lambda: base(x), lambda: layer.experts(x, routing), lambda: layer(x))
    return {part: task(function) for part, function in zip(PARTS, functions, strict=True)}


def _write_csv(studies: dict[str, Any], path: Path) -> None:
    fields = [field.name for field in dataclasses.fields(Point)]
    measured = (*PARTS, "product_to_frozen", "adapted_to_frozen")
    statistics = ("median", "lower_quartile", "upper_quartile", "min")
    rows = (
        [
            name,
            *(row[field] for field in fields),
            *(row[quantity][statistic] for quantity in measured for statistic in statistics),
        ]
        for name, study in studies.items()
        for row in study["points"]
    )
    write_table(path, ["study", *fields, *(f"{name}_{statistic}" for name in measured for statistic in statistics)], rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--studies", nargs="+", default=[name for name in STUDIES if name != "tiny"], choices=STUDIES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of input and frozen weight")
    parser.add_argument("--routing", default="balanced", choices=("balanced", "learned"))
    parser.add_argument("--repeats", type=int, default=20, help="rounds; each times everything in a study once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=_CLOCKS, help="cpu: of this process, one thread, for a busy machine")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/scaling"))
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and (options.device != "cpu" or options.threads != 1):
        parser.error(
            "--clock cpu needs --device cpu --threads 1: it sees no GPU, and counts the waiting of a second thread as work"
        )
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
