"""Where the time of one adapted projection goes: transforms, gather and scatter, router, copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.record import Record, synchronize
from benchmarks.machine import environment
from benchmarks.methods import product_paths
from benchmarks.routing import BalancedRouter
from benchmarks.timing import time_interleaved
from fourier_moe import FourierMoEConfig, FourierMoELinear, TopKRouter
from fourier_moe.spectral import torch_product
from fourier_moe.spectral.kernels import OPT_IN


class Shape(NamedTuple):
    """One adapted projection with 8 experts."""

    name: str
    tokens: int
    in_features: int
    out_features: int
    num_coefficients: int
    top_k: int


SHAPES = [
    Shape("RoBERTa-large query", 32 * 512, 1024, 1024, 1008, 2),
    Shape("LLaMA-2-7B q", 16 * 256, 4096, 4096, 8192, 4),
    Shape("LLaMA-2-7B up", 16 * 256, 4096, 11008, 8192, 4),
    Shape("LLaMA-2-7B down", 16 * 256, 11008, 4096, 8192, 4),
    Shape("CLIP ViT-B/32 q", 512 * 50, 768, 768, 3008, 2),
]
TINY = [Shape("tiny", 8, 32, 48, 64, 2)]

# Kinds of work by what the operator's name contains. Triton's kernels count for the operator that starts them.
_KINDS = {
    "transform": ("fft",),
    "gather and scatter": ("gather", "scatter", "index", "routed_spectral_product"),
    "copies": ("copy", "clone", "aten::cat", "zero", "fill"),
}
_REST = "arithmetic"
_STEPS = 5
_BF16 = 2  # bytes


def measure(device: torch.device, tiny: bool, record: Record) -> None:
    """Fill the record; see benchmarks/README.md."""
    bandwidth = _bandwidth(device, tiny)
    record.add("bytes per second", bandwidth, f"A copy reads and writes {bandwidth / 1e12:.3f} TB/s.")
    paths = product_paths(device.type)
    rows: dict[str, list[dict[str, Any]]] = {"forward": [], "forward and backward": []}
    parts: list[dict[str, Any]] = []
    for shape in TINY if tiny else SHAPES:
        work = _Work(shape, device)
        for path, switch in paths.items():
            with environment({OPT_IN: switch}):
                for (part, table), backward in zip(rows.items(), (False, True), strict=True):
                    table.append({"projection": shape.name, "path": path, **work.row(backward, bandwidth)})
                    record.add(f"{part}, so far", table)
        parts += [{"projection": shape.name, **row} for row in work.by_size_of_parts()]
    for part, table in rows.items():
        del record.results[f"{part}, so far"]
        record.add(f"{part}, unit", "microseconds", f"One adapted projection in bfloat16, {part}, microseconds on the device:")
        record.table(part, table)
    record.add("parts, path", "PyTorch", "The PyTorch path, forward and backward, by token-position pairs of a part:")
    record.table("parts", parts)


class _Work:
    """The parts of one adapted projection, each with and without its backward pass."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        _, tokens, in_features, out_features, num_coefficients, top_k = shape
        config = FourierMoEConfig(targets=["projection"], num_coefficients=num_coefficients, top_k=top_k, num_experts=8, seed=0)
        self.base = nn.Linear(in_features, out_features, bias=False, device=device).bfloat16().requires_grad_(False)
        layer = FourierMoELinear(self.base, config, "projection").to(device)
        nn.init.normal_(layer.experts.coefficients)
        assert isinstance(layer.router, TopKRouter)
        self.router, self.experts = BalancedRouter(layer.router), layer.experts
        self.x = torch.randn(tokens, in_features, device=device).bfloat16().requires_grad_()
        self.cotangent = torch.randn(tokens, out_features, device=device).bfloat16()
        with torch.no_grad():
            self.routing = self.router(self.x)
            self.y, self.update = self.base(self.x), self.experts(self.x, self.routing)
        self.routing.gates.requires_grad_()

    def row(self, backward: bool, bandwidth: float) -> dict[str, float]:
        """Return microseconds by kind of work, those of the other parts, and the least time for x and y."""
        device, product = self.device, partial(self.product, backward)
        kinds = kinds_of_work(product, device)
        parts = {"router": self.to_experts, "adding to the output": self.adding, "frozen projection": self.frozen}
        limit = 1e6 * self._bytes(backward) / bandwidth
        return {
            **{kind: kinds.get(kind, 0.0) for kind in (*_KINDS, _REST)},
            **{name: sum(kinds_of_work(partial(part, backward), device).values()) for name, part in parts.items()},
            "product by the clock": 1e6 * min(time_interleaved({"product": product}, _STEPS)["product"]),
            "x and y once": limit,
            "share of that limit": limit / (sum(kinds.values()) or float("inf")),
        }

    def _bytes(self, backward: bool) -> int:
        """x is read and y written; backward, x and the gradient of y are read and the gradient of x is written."""
        _, tokens, in_features, out_features, *_ = self.shape
        return _BF16 * tokens * (in_features + out_features + backward * (2 * in_features + out_features))

    def by_size_of_parts(self) -> list[dict[str, Any]]:
        """Return time and memory of the PyTorch path by how many token-position pairs it computes at once."""
        product, rows = partial(self.product, True), []
        for size in (2**17, 2**19, 2**21, 2**23):
            with patch.object(torch_product, "_POSITIONS_PER_CHUNK", size), environment({OPT_IN: "0"}):
                product()
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                seconds = min(time_interleaved({"product": product}, _STEPS)["product"])
                peak = torch.cuda.max_memory_allocated() - before if self.device.type == "cuda" else 0
            rows.append({"pairs": f"2^{size.bit_length() - 1}", "milliseconds": 1e3 * seconds, "peak, MiB": peak / 2**20})
        return rows

    def product(self, backward: bool) -> None:
        """The experts' update for a given routing."""
        update = self.experts(self.x, self.routing)
        if backward:
            torch.autograd.grad(update, [self.x, self.routing.gates, self.experts.coefficients], torch.ones_like(update))

    def to_experts(self, backward: bool) -> None:
        """The router."""
        gates = self.router(self.x).gates
        if backward:
            torch.autograd.grad(gates, [self.x, self.router.weight], torch.ones_like(gates))

    def adding(self, backward: bool) -> None:
        """The update in the output's precision, added to it; its gradient in float32."""
        self.y + self.update.to(self.y.dtype)
        if backward:
            self.cotangent.float()

    def frozen(self, backward: bool) -> None:
        """The frozen projection, for comparison."""
        y = self.base(self.x)
        if backward:
            torch.autograd.grad(y, [self.x], self.cotangent)


def kinds_of_work(work: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return the microseconds of one `work()` by kind: on a GPU of its kernels, on a CPU of its operators."""
    on_gpu = device.type == "cuda"
    for _ in range(2):
        work()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(_STEPS):
            work()
        synchronize(device)
    kinds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # a kernel counts for the operator that started it
            name = event.key.lower()
            kind = next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), _REST)
            kinds[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / _STEPS
    return dict(kinds)


def _bandwidth(device: torch.device, tiny: bool) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.empty(2**20 if tiny else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = time_interleaved({"copy": lambda: target.copy_(source)}, 10)["copy"]
    return 2 * source.numel() / min(seconds)
