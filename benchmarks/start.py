"""Host memory of starting a sharded run: python -m benchmarks.start [--processes 2] [--layers 4]

A LLaMA of random weights is read in bfloat16, adapted and sharded on CPU processes (gloo), once as ShardedBaseStrategy does,
where only the first process loads, and once with every process loading, as in a plain FSDP start. Reported is the memory of
each process beyond the libraries, at its peak and at the end, and the peak of their sum. The file is in float32: from a file in
bfloat16 the first process would hold no copy, only pages that the system may drop.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import environment
from benchmarks.memory import ALLOCATOR
from fourier_moe import FourierMoEConfig, inject
from lightning_modules.callbacks.monitoring.peak_memory import status_bytes
from lightning_modules.strategies.sharding import shard_frozen
from lightning_modules.tables import markdown_table
from lightning_modules.tasks import CausalLanguageModel

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
MB = 1e6


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print the table; return its rows."""
    parser = argparse.ArgumentParser(description="host memory of starting a sharded run")
    parser.add_argument("--processes", type=int, default=2, help="CPU processes")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--width", type=int, default=2048, help="width of the model")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as directory:
        num_bytes, block = _write_model(directory, options.layers, options.width)
        print(f"one copy {num_bytes / MB:,.0f} MB, one block {block / MB:,.0f} MB; {options.processes} processes\n")
        rows = [_measure(directory, options.processes, everyone) for everyone in (False, True)]
    for row in rows:
        row["peak of all / one copy"] = f"{row['peak of all, MB'] / (num_bytes / MB):.2f}"
    print(
        markdown_table(list(rows[0]), [[f"{v:,.0f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows])
    )
    return rows


def _write_model(directory: str, layers: int, width: int) -> tuple[int, int]:
    """Return the bytes of the whole model in bfloat16, and of one block."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=16
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    of_model, of_block = (sum(p.numel() for p in module.parameters()) for module in (model, model.model.layers[0]))
    return 2 * of_model, 2 * of_block


def _measure(directory: str, num_processes: int, everyone: bool) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    barriers = [context.Barrier(num_processes + 1) for _ in range(2)]
    with environment(ALLOCATOR):
        processes = [
            context.Process(target=_start, args=(rank, num_processes, address, directory, everyone, *barriers))
            for rank in range(num_processes)
        ]
        for process in processes:
            process.start()
    barriers[0].wait()
    pids = [process.pid or 0 for process in processes]
    before = [_anonymous(pid) for pid in pids]
    peaks, peak_of_all = before, 0
    while barriers[1].n_waiting < num_processes:
        if not all(process.is_alive() for process in processes):
            raise RuntimeError(f"a process has died: exit codes {[process.exitcode for process in processes]}")
        now = [_anonymous(pid) for pid in pids]
        peaks = [max(pair) for pair in zip(peaks, now, strict=True)]
        peak_of_all = max(peak_of_all, sum(now) - sum(before))
        time.sleep(0.002)
    ends = [_anonymous(pid) for pid in pids]
    peaks = [max(pair) for pair in zip(peaks, ends, strict=True)]
    peak_of_all = max(peak_of_all, sum(ends) - sum(before))
    barriers[1].wait()
    for process in processes:
        process.join()
    row: dict[str, Any] = {"loaded by": "every process" if everyone else "the first process"}
    for rank, (start, peak, end) in enumerate(zip(before, peaks, ends, strict=True)):
        row[f"process {rank}: peak, MB"] = (peak - start) / MB
        row[f"process {rank}: end, MB"] = (end - start) / MB
    return row | {"peak of all, MB": peak_of_all / MB}


def _start(rank: int, size: int, address: str, directory: str, everyone: bool, ready: Any, done: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    task = CausalLanguageModel(directory, "bytes", dtype="bfloat16")
    config = FourierMoEConfig(targets=TARGETS, num_coefficients=8192)
    ready.wait()
    with torch.device("cpu" if everyone or rank == 0 else "meta"):
        model = task.build()
        inject(model, config)
    shard_frozen(model, mesh, torch.device("cpu"))
    done.wait()
    distributed.destroy_process_group()


def _anonymous(pid: int) -> int:
    """Return the bytes of a process's memory that are not pages of files."""
    return status_bytes("RssAnon", "RssShmem", pid=pid) or 0


if __name__ == "__main__":
    main()
