"""The side-by-side tables on the GPU, by benchmarks.adapters, and what the paper says of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.adapters import compare
from benchmarks.gpu.record import Record
from benchmarks.gpu.verdict import faster_path
from benchmarks.methods import FLOOR, LORA, OURS, usable_methods
from benchmarks.models import MODELS
from benchmarks.report import markdown
from benchmarks.steps import Setting

# Table 7 of the paper: RoBERTa-large on RTE, one GPU; it names no unit of the FLOPs and no number of examples.
PAPER: list[dict[str, Any]] = [
    {"method": "LoRA", "memory, GB": 12.24, "training FLOPs": 340.02, "training, s": 13.13, "inference, ms": 53.4},
    {"method": "TopLoRA", "memory, GB": 16.90, "training FLOPs": 258.84, "training, s": 145.69, "inference, ms": 397.0},
    {"method": "GOAT", "memory, GB": 17.12, "training FLOPs": 163.46, "training, s": 867.0, "inference, ms": 840.0},
    {"method": "FourierMoE", "memory, GB": 11.61, "training FLOPs": 235.23, "training, s": 58.0, "inference, ms": 313.0},
]


def setting_of(model: str, device: torch.device, *, tiny: bool, **changes: Any) -> Setting:
    """Return the setting of a table, or of a tiny model whatever the `changes`."""
    name = "tiny" if tiny else model
    entry = MODELS[name]
    setting = Setting(
        model=name,
        layers=1 if tiny else entry.layers,
        batch=entry.batch,
        length=entry.length,
        device=device.type,
        dtype="bfloat16",
        balanced=True,
        threads=torch.get_num_threads(),
    )
    return setting if tiny else replace(setting, **changes)


def _table(record: Record, name: str, setting: Setting, methods: list[str], rounds: int) -> dict[str, Any]:
    results = compare(setting, methods, rounds, with_memory=setting.device != "cpu")
    record.add(name, results, markdown(results))
    return results


def roberta(device: torch.device, tiny: bool, record: Record) -> None:
    """RoBERTa-large, 32 x 512, beside the paper's Table 7, as multiples of LoRA too."""
    setting = setting_of("roberta-large", device, tiny=tiny, batch=32, length=512)
    results = _table(record, "table", setting, usable_methods(device.type), 2 if tiny else 15)
    record.table("the paper's Table 7", PAPER)
    of_paper = {row["method"]: row for row in PAPER}
    flops = {m: results["methods"][m] and results["methods"][m]["flops_per_step"] for m in (LORA, OURS)}
    if all(flops.values()):
        row = {
            "FLOPs of FourierMoE / LoRA, paper": of_paper["FourierMoE"]["training FLOPs"] / of_paper["LoRA"]["training FLOPs"],
            "counted here": flops[OURS] / flops[LORA],
        }
        record.table("FLOPs", [row])


def clip(device: torch.device, tiny: bool, record: Record) -> None:
    """CLIP ViT-B/32, batch 512."""
    setting = setting_of("clip-vit-b-32", device, tiny=tiny, batch=512)
    _table(record, "table", setting, usable_methods(device.type), 2 if tiny else 15)


def llama(device: torch.device, tiny: bool, record: Record) -> None:
    """LLaMA-2-7B, 16 x 256: every method on two layers, then the faster path, LoRA and the floor on as many layers as fit."""
    setting = setting_of("llama-2-7b", device, tiny=tiny, layers=2)
    few = _table(record, "few layers", setting, usable_methods(device.type), 2 if tiny else 5)["methods"]
    ours = faster_path(few)
    for layers in (1,) if tiny else (32, 24, 16):
        results = _table(record, "most layers", replace(setting, layers=layers), [FLOOR, LORA, ours], 2 if tiny else 5)
        if results["methods"][LORA] and results["methods"][ours]:
            break
