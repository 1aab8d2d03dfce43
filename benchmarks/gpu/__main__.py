"""python -m benchmarks.gpu: every measurement that needs a GPU, the most important first; see benchmarks/README.md.

Each section is a process of its own with a limit on its time. One that fails, hangs or breaks CUDA is recorded, and the next
starts. results.json and results.md are written after each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.record import Record
from benchmarks.gpu.verdict import verdicts
from benchmarks.machine import describe_machine, environment
from lightning_modules.tables import markdown_table

# What measures each section, and the most seconds that it may take. Together more than there is: most need less.
SECTIONS: dict[str, tuple[str, int]] = {
    "exactness": ("exactness.measure", 120),
    "roberta": ("tables.roberta", 120),
    "llama": ("tables.llama", 180),
    "profile": ("profiling.measure", 60),
    "clip": ("tables.clip", 60),
    "sharding": ("sharding.measure", 60),
    "resume": ("resume.measure", 60),
    "quantized": ("quantized.measure", 60),
}
OPTIONAL = ("open_clip", "datasets", "bitsandbytes", "peft")
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what deterministic matrix products need before CUDA starts


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the sections and write the results; return the content of results.json."""
    options = _parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.only:
        return run_section(options.only, options)
    end = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {"machine": describe_machine(), "sections": {}}
    for name in options.sections:
        start = time.monotonic()
        _remove_files(name, options)
        seconds = min(SECTIONS[name][1], end - start)
        if not _on_gpu(options):
            section = run_section(name, options)
        elif seconds > 5:
            section = _isolated(name, options, seconds)
        else:
            section = {"status": "no time left"}
        results["sections"][name] = section | {"seconds": round(time.monotonic() - start, 1)}
        _say(f"{name}: {section['status']} {section.get('error', '')}")
        results["verdict"] = verdicts(results["sections"])
        (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (options.output / "results.md").write_text(markdown(results))
        _remove_files(name, options)  # what they held is in results.json
    _say(summary(results))
    return results


def run_section(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a section in this process; return its status, its results and its error, which are also left in a file."""
    results_file, status_file = _files(name, options)
    record = Record(results_file)
    section: dict[str, Any] = {"status": "done"}
    try:
        module, function = SECTIONS[name][0].split(".")
        measure = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        measure(torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu"), options.tiny, record)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in OPTIONAL:
            section = _failure()
        else:
            section = {"status": "skipped", "error": f"{missing} is not installed; see the wheels in benchmarks/README.md"}
    except Exception:
        section = _failure()
    status_file.write_text(json.dumps(section))
    return section | {"results": record.results}


def _failure() -> dict[str, Any]:
    text = traceback.format_exc()
    print(text, file=sys.stderr, flush=True)
    return {"status": "failed", "error": text.strip().splitlines()[-1], "traceback": text[-3000:]}


def _on_gpu(options: argparse.Namespace) -> bool:
    return options.device == "cuda"


def _isolated(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a section in a process of its own, for at most `seconds`."""
    words = ["--only", name, "--device", options.device, "--output", str(options.output), *(["--tiny"] if options.tiny else [])]
    with environment(_DETERMINISTIC if name in ("exactness", "resume") else {}):
        code = run_limited([sys.executable, "-m", "benchmarks.gpu", *words], seconds)
    results_file, status_file = _files(name, options)
    section = (
        json.loads(status_file.read_text()) if status_file.exists() else {"status": "failed", "error": f"exit status {code}"}
    )
    if code is None:
        section = {"status": "out of time", "error": f"stopped after {seconds:.0f} s"}
    return section | {"results": json.loads(results_file.read_text()) if results_file.exists() else {}}


def run_limited(command: Sequence[str], seconds: float) -> int | None:
    """Run a command; return its exit status, or None if it was killed after `seconds`, with all that it had started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def markdown(results: dict[str, Any]) -> str:
    """Return everything as one page, the verdict first."""
    machine = results["machine"]
    commit = f"{(machine['commit'] or 'unknown')[:10]}{' with changes' if machine['uncommitted_changes'] else ''}"
    versions = f"PyTorch {machine['versions']['torch']}, CUDA {machine['cuda']}"
    where = f"{machine['gpu'] or machine['processor']}; {versions}; commit {commit}; {machine['date']}"
    lines = ["# GPU results", "", where, "", summary(results), ""]
    for name, section in results["sections"].items():
        lines += [f"## {name}", "", f"{section['status']}, {section['seconds']} s. {section.get('error', '')}".rstrip(), ""]
        found = section.get("results", {})
        lines += [found.get("markdown", "")]
        if checks := found.get("checks"):
            rows = [[check, *_cells(outcome)] for check, outcome in checks.items()]
            lines += [markdown_table(["check", "error", "at most", "", "note"], rows), ""]
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """Return the verdict, and what became of each section."""
    targets = markdown_table(list(results["verdict"][0]), [list(row.values()) for row in results["verdict"]])
    rows = []
    for name, section in results["sections"].items():
        checks = section.get("results", {}).get("checks", {})
        failed = [check for check, outcome in checks.items() if outcome["passed"] is False]
        counts = f"{sum(c['passed'] is True for c in checks.values())} passed, {len(failed)} failed" if checks else ""
        rows.append(
            [name, section["status"], f"{section['seconds']} s", counts, "; ".join(failed[:3]) or section.get("error", "")]
        )
    return f"{targets}\n\n{markdown_table(['section', 'status', 'time', 'checks', 'first failures'], rows)}"


def _cells(outcome: dict[str, Any]) -> list[str]:
    error = outcome["error"]
    shown = "" if error is None else f"{error:.3g}" if isinstance(error, float) else str(error)
    verdict = {True: "passed", False: "FAILED", None: "not done"}[outcome["passed"]]
    return [shown, f"{outcome['limit']:.3g}", verdict, outcome["note"]]


def _files(name: str, options: argparse.Namespace) -> tuple[Path, Path]:
    return options.output / f"{name}.json", options.output / f"{name}.status.json"


def _remove_files(name: str, options: argparse.Namespace) -> None:
    for path in _files(name, options):
        path.unlink(missing_ok=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="every measurement that needs a GPU")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="default: all, in this order")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all sections together")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, in this process, without limits"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a dry run")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/gpu"))
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)  # the process of one section
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU; --device cpu --tiny is a dry run")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is a dry run and needs --tiny")
    return options


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
