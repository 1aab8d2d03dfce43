"""Frozen weights in nf4 and int8: a LLaMA of 7B shapes trains its adapters over them."""

from __future__ import annotations

import tempfile
import time
from typing import Any, Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.record import Record, synchronize
from benchmarks.memory import release_memory
from benchmarks.models import MODELS
from fourier_moe import FourierMoEConfig, balance_loss, inject, is_quantized, recording

_STEPS = 8
_VOCABULARY = 512  # of bytes: the model has no tokenizer of its own
_SIZES: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
_TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def measure(device: torch.device, tiny: bool, record: Record) -> None:
    """Fill the record; see benchmarks/README.md."""
    import bitsandbytes  # noqa: F401  the section is skipped without it

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        config = LlamaConfig(vocab_size=_VOCABULARY, num_hidden_layers=1 if tiny else 4, **(_TINY if tiny else _SIZES))
        with torch.device(device):
            LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
        for quantization in (None, "int8", "nf4"):
            release_memory()
            rows.append({"base": quantization or "bfloat16", **_train(directory, quantization, device, tiny, record)})
            record.add("so far", rows)
    del record.results["so far"]
    record.table(f"{config.num_hidden_layers} layers", rows)


def _train(
    directory: str, quantization: Literal["int8", "nf4"] | None, device: torch.device, tiny: bool, record: Record
) -> dict[str, Any]:
    from lightning_modules.tasks import CausalLanguageModel  # needs the libraries of all tasks

    name = quantization or "bfloat16"
    entry = MODELS["llama-2-7b"]
    model = CausalLanguageModel(directory, "bytes", dtype="bfloat16", quantization=quantization).build().train()
    nn.Sequential(model).to(device)  # as a trainer does: transformers refuses to move a quantized model itself
    if quantization:
        record.check(f"{name}: quantized", float(not is_quantized(model)))
    num_coefficients = 64 if tiny else entry.num_coefficients
    inject(model, FourierMoEConfig(targets=entry.targets, num_coefficients=num_coefficients, num_experts=8, top_k=entry.top_k))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {n: p.data.to("cpu", copy=True) for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    tokens = torch.randint(_VOCABULARY, (2, 16) if tiny else (16, 256), generator=torch.Generator().manual_seed(0)).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, seconds, idle = [], [], 0
    for step in range(_STEPS):
        start = time.perf_counter()
        with recording(model), torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
            total = loss + balance_loss(model)
        total.backward()
        if step == 1:  # before, the experts are 0 and give the routers no gradient
            idle = sum(p.grad is None or not p.grad.any() or not p.grad.isfinite().all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    record.check(f"{name}: adapters without a finite gradient", float(idle))
    record.check(f"{name}: last loss / first loss", losses[-1] / losses[0], 0.999, f"{losses[0]:.4f} to {losses[-1]:.4f}")
    changed = sum(not torch.equal(p.data.cpu(), frozen[n]) for n, p in model.named_parameters() if n in frozen)
    record.check(f"{name}: frozen weights that changed", float(changed))
    return {
        "frozen weights, MiB": sum(p.numel() * p.element_size() for p in frozen.values()) / 2**20,
        "fastest step, ms": 1e3 * min(seconds),
        "peak memory, MiB": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0,
    }
