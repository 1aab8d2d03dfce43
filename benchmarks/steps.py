"""The timed work: one training step and one inference of one method on one fixed batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.machine import environment
from benchmarks.methods import TRITON, adapt, trainable
from benchmarks.models import MODELS, Classifier, build_model, copy_with_shared_backbone, make_batch
from fourier_moe import adapters, recording
from fourier_moe.spectral.kernels import OPT_IN

DTYPES = ("float32", "autocast", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The setting of a table.

    Attributes:
        dtype: `float32`; `autocast`: float32 weights under bfloat16 autocast; `bfloat16`: the same with the frozen weights
            stored in bfloat16. Head and adapters are always float32.
        balanced: force balanced routing.
        threads: CPU threads of PyTorch.
    """

    model: str
    layers: int
    batch: int
    length: int
    device: str
    dtype: str
    balanced: bool
    threads: int


def build_base(setting: Setting) -> Classifier:
    """Build the frozen model that all methods share."""
    frozen_dtype = torch.bfloat16 if setting.dtype == "bfloat16" else torch.float32
    return build_model(MODELS[setting.model], setting.layers, torch.device(setting.device), frozen_dtype)


class Trial:
    """One method, ready to run.

    Args:
        base: the frozen model; its backbone's tensors are shared, not copied.
        method: key of METHODS.
        setting: batch shape, precision, routing.
    """

    def __init__(self, base: Classifier, method: str, setting: Setting) -> None:
        entry = MODELS[setting.model]
        self.device = torch.device(setting.device)
        self.model = adapt(copy_with_shared_backbone(base), method, entry, balanced=setting.balanced).to(self.device)
        self.inputs, self.labels = make_batch(entry, setting.batch, setting.length, self.device)
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=1e-4)
        self.low_precision = setting.dtype != "float32"
        self.environment = {OPT_IN: "1"} if method == TRITON else {}
        self.routed = any(hasattr(adapter, "router") for adapter in adapters(self.model).values())

    def training_step(self) -> Tensor:
        """Forward, backward and AdamW, with the load-balancing loss if the method has one; return the loss."""
        record: AbstractContextManager[None] = recording(self.model) if self.routed else nullcontext()
        with environment(self.environment):
            with record:
                loss = nn.functional.cross_entropy(self._logits().float(), self.labels)
                if self.routed:
                    losses = [adapter.balance_loss() for adapter in adapters(self.model).values()]
                    loss = loss + torch.stack([term for term in losses if term is not None]).sum()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def inference(self) -> Tensor:
        """Compute logits of the batch, without gradients."""
        with environment(self.environment), torch.inference_mode():
            return self._logits()

    def _logits(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            return self.model(self.inputs)
