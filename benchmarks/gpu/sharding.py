"""FSDP2 on one GPU: a LLaMA of 7B shapes in bfloat16 trains as it does unsharded."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.gpu.record import Record, synchronize
from benchmarks.gpu.tables import setting_of
from benchmarks.memory import release_memory
from benchmarks.methods import OURS
from benchmarks.steps import Setting, Trial, build_base
from lightning_modules.strategies.sharding import shard_frozen

_STEPS = 6


def measure(device: torch.device, tiny: bool, record: Record) -> None:
    """Fill the record; see benchmarks/README.md."""
    setting = setting_of("llama-2-7b", device, tiny=tiny, layers=8, batch=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    plain = _train(setting, device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=address, rank=0, world_size=1)
    try:
        sharded = _train(setting, device, init_device_mesh(device.type, (1,)))
    finally:
        distributed.destroy_process_group()
    rows = [{"model": name, **row} for name, (row, _) in {"unsharded": plain, "FSDP2": sharded}.items()]
    record.table(f"{setting.layers} layers of {setting.model}", rows)
    record.check("FSDP2: sharded parameters", float(not sharded[0]["sharded parameters"]))
    for step, (a, b) in enumerate(zip(plain[1], sharded[1], strict=True)):
        record.check(f"FSDP2: loss of step {step}", abs(a - b) / abs(a), 1e-3, f"{a:.6f} and {b:.6f}")


def _train(setting: Setting, device: torch.device, mesh: Any = None) -> tuple[dict[str, Any], list[float]]:
    """Return the figures and losses of a few steps from the same start."""
    release_memory()
    trial = Trial(build_base(setting), OURS, replace(setting, balanced=False))
    if mesh is not None:
        shard_frozen(trial.model, mesh, device)
    trial.model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(_STEPS):
        start = time.perf_counter()
        loss = trial.training_step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    row = {
        "sharded parameters": sum(isinstance(parameter, DTensor) for parameter in trial.model.parameters()),
        "fastest step, ms": 1e3 * min(seconds),
        "peak memory, MiB": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0,
    }
    return row, losses
