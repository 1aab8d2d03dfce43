"""The results of benchmarks.adapters as plain values, and as a Markdown table."""

from __future__ import annotations

from typing import Any

from benchmarks.methods import FLOOR, LORA
from benchmarks.timing import paired_ratio, summarize
from lightning_modules.tables import markdown_table

COLUMNS = ("training_step", "inference")


def method_result(
    samples: dict[str, list[float]],
    peak_memory: int | None,
    parameters: dict[str, int],
    flops: int,
    references: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return one method's entry in results.json.

    Args:
        samples: seconds of every round, by column.
        peak_memory: bytes.
        parameters: trained scalars by kind.
        flops: floating-point operations of a training step.
        references: `samples` and `peak_memory` of the methods that ratios are relative to, by name.
    """
    ratios: dict[str, dict[str, Any]] = {}
    for name, reference in references.items():
        ratios[name] = {column: paired_ratio(samples[column], reference["samples"][column]) for column in COLUMNS}
        if peak_memory and reference["peak_memory"]:
            ratios[name]["peak_memory"] = peak_memory / reference["peak_memory"]
    return {
        **{column: {**summarize(samples[column]), "samples": samples[column]} for column in COLUMNS},
        "peak_memory": peak_memory,
        "trained_parameters": parameters,
        "flops_per_step": flops,
        "ratios": ratios,
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the table with its setting above and its legend below."""
    setting, machine = results["setting"], results["machine"]
    size = f"{setting['batch']} x {setting['length']} tokens" if setting["length"] else f"{setting['batch']} images"
    where = machine["gpu"] if setting["device"] != "cpu" else f"{machine['processor']}, {setting['threads']} threads"
    routing = "balanced" if setting["balanced"] else "learned"
    header = [
        "method", "training step", "inference", "peak memory", "TFLOP / step", "trained parameters", "step / LoRA",
        "inference / LoRA", "memory / LoRA", "step / floor", "inference / floor",
    ]  # fmt: skip
    rows = [_row(name, method) for name, method in results["methods"].items()]
    adapted = f"{', '.join(results['adapted']['targets'])}; n={results['adapted']['num_coefficients']}"
    return "\n".join([
        f"**{setting['model']}**, {setting['layers']} layers ({adapted}, E={results['adapted']['num_experts']}, "
        f"K={results['adapted']['top_k']}, LoRA r={results['adapted']['lora_rank']}), {size}, {setting['dtype']}, {routing} "
        f"routing; {where}; PyTorch {machine['versions']['torch']}, PEFT {machine['versions'].get('peft')}; commit "
        f"{(machine['commit'] or 'unknown')[:10]}{' with changes' if machine['uncommitted_changes'] else ''}",
        "",
        markdown_table(header, rows),
        "",
        f"Medians of {results['rounds']} interleaved rounds, quartiles in brackets. Ratios are per round. LoRA: "
        f"{LORA}; floor: {FLOOR}. Trained parameters: adapters + routers + head.",
        "",
    ])  # fmt: skip


def _row(name: str, method: dict[str, Any] | None) -> list[str]:
    if method is None:
        return [name, "out of memory", *["-"] * 9]
    counts = " + ".join(f"{count:,}" for count in method["trained_parameters"].values() if count)
    peak = f"{method['peak_memory'] / 2**20:,.0f} MiB" if method["peak_memory"] else "-"
    return [
        name,
        *(_with_quartiles(method[column], 1e3, "{:.1f}", " ms") for column in COLUMNS),
        peak,
        f"{method['flops_per_step'] / 1e12:.4g}",
        counts,
        *_ratios(method, LORA, ("training_step", "inference", "peak_memory")),
        *_ratios(method, FLOOR, ("training_step", "inference")),
    ]


def _ratios(method: dict[str, Any], reference: str, columns: tuple[str, ...]) -> list[str]:
    cells = []
    for column in columns:
        ratio = method["ratios"].get(reference, {}).get(column)
        if ratio is None:
            cells.append("-")
        else:
            cells.append(f"{ratio:.3f}" if isinstance(ratio, float) else _with_quartiles(ratio, 1.0, "{:.3f}", ""))
    return cells


def _with_quartiles(summary: dict[str, float], factor: float, form: str, unit: str) -> str:
    lower, median, upper = (form.format(factor * summary[key]) for key in ("lower_quartile", "median", "upper_quartile"))
    return f"{median}{unit} ({lower}..{upper})"
