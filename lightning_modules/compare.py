"""`python train.py compare`: one config under several adapters and seeds, ending in a table."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning.pytorch.callbacks import Timer

from lightning_modules.cli import AdaptationCLI

OWN = "config"  # the adapter that the config itself names


@dataclass(frozen=True)
class Result:
    """One run: test metrics of the last step's weights, trained parameters by kind, seconds of training."""

    method: str
    overlay: str
    seed: int
    main_metric: str
    metrics: dict[str, float]
    parameters: dict[str, int]
    seconds: float


def compare(args: list[str]) -> list[Result]:
    """Parse the command line, run every adapter with every seed, print the table and write it to `--output`."""
    parser = argparse.ArgumentParser(
        prog="train.py compare",
        description="Train and test one config with several adapters and seeds. Further arguments are handed to fit, "
        "for example --trainer.max_epochs 5.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, help="as for fit; repeat for overlays")
    parser.add_argument(
        "--adapters",
        required=True,
        help=f"comma-separated overlays: names in configs/adapters/, paths, or '{OWN}' for the config's own adapter",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... (default 3)")
    parser.add_argument("--output", help="directory of results.md and results.json (default runs/compare/<config's name>)")
    options, fit_args = parser.parse_known_args(args)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} must be at least 1")
    overlays = {name: _overlay(parser, name) for name in options.adapters.split(",")}
    output = Path(options.output or f"runs/compare/{Path(options.config[0]).stem}")

    configs = [word for path in options.config for word in ("--config", path)]
    runs = [(name, seed) for seed in range(options.seeds) for name in overlays]
    results = []
    for number, (name, seed) in enumerate(runs, 1):
        print(f"\n=== {number}/{len(runs)}: {name}, seed {seed} ===", flush=True)
        results.append(_run(name, seed, [*configs, *overlays[name], *fit_args], output))
    table = format_table(results)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.md").write_text(table + "\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2), encoding="utf-8")
    print(f"\n{table}\n\nWritten to {output}/results.md and results.json")
    return results


def _overlay(parser: argparse.ArgumentParser, name: str) -> list[str]:
    if name == OWN:
        return []
    path = Path(name if name.endswith(".yaml") else f"configs/adapters/{name}.yaml")
    if not path.is_file():
        known = sorted(file.stem for file in Path("configs/adapters").glob("*.yaml"))
        parser.error(f"--adapters {name!r}: {path} not found; known: {', '.join([OWN, *known])}")
    return ["--config", str(path)]


def _run(overlay: str, seed: int, args: list[str], output: Path) -> Result:
    run = f"{Path(overlay).stem}/seed_{seed}"
    logger = ["--trainer.logger.init_args.save_dir", str(output), "--trainer.logger.init_args.name", run]
    cli = AdaptationCLI([*args, "--seed_everything", str(seed), *logger], run=False)
    cli.trainer.callbacks.append(timer := Timer())  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    metrics = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]
    method = type(cli.model.adapter).__name__.removesuffix("Config")
    main_metric = f"test/{cli.model.task.main_metric}"
    return Result(method, overlay, seed, main_metric, dict(metrics), cli.model.report.trained, timer.time_elapsed("train"))


def format_table(results: list[Result]) -> str:
    """Markdown table, a row per adapter: mean and spread of the main test metric, parameters by kind, seconds."""
    metric = results[0].main_metric
    kinds = [kind for kind in results[0].parameters if any(result.parameters[kind] for result in results)]
    header = ["method", f"{metric} (mean of {len({r.seed for r in results})})", "each seed", "trained", *kinds, "seconds"]
    rows = []
    for overlay in dict.fromkeys(result.overlay for result in results):
        own = [result for result in results if result.overlay == overlay]
        same_method = {result.overlay for result in results if result.method == own[0].method}
        values = [100 * result.metrics[metric] for result in own]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        counts = own[0].parameters
        rows.append(
            [
                own[0].method if len(same_method) == 1 else f"{own[0].method} ({overlay})",
                f"{statistics.mean(values):.1f} %{spread}",
                " / ".join(f"{value:.1f}" for value in values),
                f"{sum(counts.values()):,}",
                *(f"{counts[kind]:,}" for kind in kinds),
                f"{statistics.mean(result.seconds for result in own):.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    line = "| {} |".format
    cells = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
