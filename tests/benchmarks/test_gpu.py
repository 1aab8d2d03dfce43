"""The GPU command on a CPU: every section at tiny sizes, what it does with failures, and its verdict."""

import ast
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPOSITORY

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from benchmarks.adapters import compare
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import tables
from benchmarks.gpu.record import Record
from benchmarks.gpu.verdict import verdicts
from benchmarks.methods import METHODS, usable_methods
from benchmarks.steps import Setting

# A lent machine lacks these. The modules here must not need them when they are imported.
ABSENT = {"jsonargparse", "open_clip", "datasets"}
WITHOUT = ["__main__", "exactness", "tables", "profiling", "sharding", "quantized", "resume"]


def run(output: Path, *sections: str) -> dict[str, Any]:
    command.main(["--device", "cpu", "--tiny", "--output", str(output), "--sections", *sections])
    assert sorted(path.name for path in output.iterdir()) == ["results.json", "results.md"]
    results = json.loads((output / "results.json").read_text())
    for name, section in results["sections"].items():
        assert section["status"] == "done", f"{name}: {section}"
        assert f"## {name}" in (output / "results.md").read_text()
        for check, outcome in section["results"]["checks"].items():
            assert outcome["passed"] is not False, f"{check}: {outcome}"
    return results


def test_sections_run_on_a_cpu(tmp_path, monkeypatch):
    results_of: list[dict[str, Any]] = []

    def compare_once(*arguments: Any, **options: Any) -> dict[str, Any]:
        """The first table for real; the others differ in settings that are not tiny."""
        results_of.append(results_of[0] if results_of else compare(*arguments, **options))
        return results_of[0]

    monkeypatch.setattr("benchmarks.gpu.tables.compare", compare_once)
    sections = run(tmp_path, *command.SECTIONS)["sections"]
    results = {name: section["results"] for name, section in sections.items()}
    checks = results["exactness"]["checks"]
    assert [sum(f" {dtype} (" in name for name in checks) for dtype in ("float32", "bfloat16", "float64")] == [24] * 3
    assert all(checks[f"PyTorch torch.compile {part}"]["passed"] for part in ("y", "dx", "dcoefficients", "drouter"))
    assert len(results_of) == 4
    assert results["roberta"]["table"]["methods"].keys() == set(usable_methods("cpu"))
    (row,) = results["profile"]["forward and backward"]
    assert all(row[kind] > 0 for kind in ("transform", "gather and scatter", "copies", "arithmetic", "router"))
    assert [part["pairs"] for part in results["profile"]["parts"]] == ["2^17", "2^19", "2^21", "2^23"]
    assert results["resume"]["checks"]["PyTorch: numbers that differ after resuming"]["passed"]
    assert results["quantized"]["checks"]["nf4: quantized"]["passed"]


def test_measurements_import_nothing_that_a_lent_machine_lacks():
    """Read from the source: here these packages may have been imported before."""
    seen, waiting = set[str](), [f"benchmarks.gpu.{name}" for name in WITHOUT]
    while waiting:
        name = waiting.pop()
        path = REPOSITORY.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in seen or not file.exists():
            seen.add(name)
            continue
        seen.add(name)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:  # not inside of functions and `if TYPE_CHECKING`
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            waiting += [".".join(parts[: end + 1]) for parts in (one.split(".") for one in found) for end in range(len(parts))]
    assert {"lightning_modules.tables", "fourier_moe.spectral.product", "torch"} <= seen
    assert ABSENT & seen == set()


def test_a_section_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(device: torch.device, tiny: bool, record: Record) -> None:
        record.check("before", 0.0)
        raise RuntimeError("the kernel is wrong")

    def absent(device: torch.device, tiny: bool, record: Record) -> None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip.transformer")

    def fine(device: torch.device, tiny: bool, record: Record) -> None:
        with record.attempt("undefined"):
            record.check("not a number", math.nan, math.inf)
            raise ValueError("bad argument")
        record.table("rows", [{"a": 1, "b": 0.5}])

    for name, function in (("exactness", broken), ("clip", absent), ("resume", fine)):
        module, attribute = command.SECTIONS[name][0].split(".")
        monkeypatch.setattr(f"benchmarks.gpu.{module}.{attribute}", function)
    words = ["--device", "cpu", "--tiny", "--output", str(tmp_path), "--sections", "exactness", "clip", "resume"]
    sections = command.main(words)["sections"]
    assert [section["status"] for section in sections.values()] == ["failed", "skipped", "done"]
    assert sections["exactness"]["error"] == "RuntimeError: the kernel is wrong"
    assert sections["exactness"]["results"]["checks"]["before"]["passed"]
    assert "open_clip is not installed" in sections["clip"]["error"]
    checks = sections["resume"]["results"]["checks"]
    assert checks["not a number"]["passed"] is False
    assert checks["undefined"] == {"error": "nan", "limit": 0.0, "passed": False, "note": "ValueError: bad argument"}
    page = (tmp_path / "results.md").read_text()
    assert "the kernel is wrong" in page
    assert "| a | b   |" in page


@pytest.mark.parametrize(
    ("code", "status", "error"), [(0, "done", None), (None, "out of time", "stopped after"), (-11, "failed", "exit status -11")]
)
def test_what_a_section_found_in_its_own_process_is_kept(tmp_path, monkeypatch, code, status, error):
    def found(device: torch.device, tiny: bool, record: Record) -> None:
        record.check("so far", 0.0)

    def run_limited(words: Sequence[str], seconds: float) -> int | None:
        assert list(words[:3]) == [sys.executable, "-m", "benchmarks.gpu"]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        command.main(words[3:])
        if code != 0:  # it ended before it could say how
            (tmp_path / "resume.status.json").unlink()
        return code

    monkeypatch.setattr("benchmarks.gpu.resume.measure", found)
    monkeypatch.setattr(command, "run_limited", run_limited)
    (tmp_path / "resume.status.json").write_text(json.dumps({"status": "done", "error": "of an earlier run"}))
    monkeypatch.setattr(command, "_on_gpu", lambda options: True)
    words = ["--device", "cpu", "--tiny", "--output", str(tmp_path), "--sections", "resume"]
    section = command.main(words)["sections"]["resume"]
    assert section["status"] == status
    assert section["results"]["checks"]["so far"]["passed"]
    assert error is None if "error" not in section else error in section["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
    assert command.main([*words, "--minutes", "0"])["sections"]["resume"]["status"] == "no time left"


def test_a_section_is_stopped_when_its_time_is_over():
    assert command.run_limited([sys.executable, "-S", "-c", "raise SystemExit(3)"], 60) == 3
    assert command.run_limited([sys.executable, "-S", "-c", "import time; time.sleep(600)"], 0.5) is None


def table(**methods: tuple[float, float] | None) -> dict[str, Any]:
    """A table of (training step, peak memory) by method."""
    samples = {
        name: pair and {"training_step": {"samples": [pair[0]] * 2, "median": pair[0]}, "peak_memory": pair[1]}
        for name, pair in methods.items()
    }
    return {"setting": {"model": "llama-2-7b", "layers": 2}, "methods": samples}


def test_llama_takes_the_faster_path_and_as_many_layers_as_fit(tmp_path, monkeypatch):
    calls = []

    def compare_stub(setting: Setting, methods: Sequence[str], rounds: int, **_: Any) -> dict[str, Any]:
        calls.append((setting.layers, list(methods)))
        fits = table(**dict.fromkeys(methods, (1.0, 1)) | {"fourier_moe_triton": (0.9, 1)})
        return fits if setting.layers < 32 else table(**dict.fromkeys(methods))

    monkeypatch.setattr("benchmarks.gpu.tables.compare", compare_stub)
    monkeypatch.setattr("benchmarks.gpu.tables.markdown", lambda results: "")
    monkeypatch.setattr("benchmarks.gpu.tables.usable_methods", lambda device: list(METHODS))
    tables.llama(torch.device("cuda"), False, Record(tmp_path / "llama.json"))
    three = ["head_only", "lora", "fourier_moe_triton"]
    assert calls == [(2, list(METHODS)), (32, three), (24, three)]
    setting = tables.setting_of("llama-2-7b", torch.device("cuda"), tiny=False, layers=8)
    assert (setting.batch, setting.length, setting.dtype, setting.device) == (16, 256, "bfloat16", "cuda")


def test_verdict_takes_the_faster_path_and_counts_no_memory_as_slow():
    most = table(lora=(1.0, 10), fourier_moe=(1.2, 9), fourier_moe_triton=(1.1, 11))
    few = table(lora=(1.0, 10), fourier_moe=(1.0, 10), dense=None)
    rows = verdicts({"llama": {"results": {"most layers": most, "few layers": few}}})
    found = {row["what"]: (row["measured"], row["verdict"]) for row in rows if row["where"].startswith("llama")}
    assert found == {
        "training_step of fourier_moe_triton / lora": ("1.100", "met"),
        "peak_memory of fourier_moe_triton / lora": ("1.100", "missed"),
        "training_step of dense / fourier_moe": ("out of memory", "met"),
    }
    assert {row["verdict"] for row in rows if row["where"] == "roberta"} == {"not measured"}
    few["methods"]["dense"] = table(dense=(4.0, 1))["methods"]["dense"]
    assert verdicts({"llama": {"results": {"few layers": few}}})[-1]["verdict"] == "missed"


def test_a_dry_run_is_asked_for_in_so_many_words(capsys):
    for words, message in ((["--device", "cpu"], "needs --tiny"), (["--device", "cuda"], "needs a GPU")):
        if "cuda" not in words or not torch.cuda.is_available():
            with pytest.raises(SystemExit):
                command.main(words)
            assert message in capsys.readouterr().err
