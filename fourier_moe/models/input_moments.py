"""InputMoments: what adapters know of a projection's input, and how it is measured on a few batches before training.

The second moment of a pretrained model's activations is badly conditioned: a few features, and the mean vector above all, hold
most of the energy. A method with a fixed basis cannot turn away from them, but it can read centered and scaled features.

Shape legend: T tokens, N in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fourier_moe.errors import UserError

MIN_STD = 1e-2  # of the root mean square of all features' std: at least this share of it divides a nearly constant feature


class InputMoments(nn.Module):
    """z = size (x - mean) / std by feature, (..., N) -> (..., N) in the dtype of x; frozen once they are measured.

    std is that of each feature over the tokens, at least MIN_STD times the root mean square of all of them. `size` keeps the
    input's overall size: root mean square of x over that of (x - mean) / std, both over all tokens and features. Learning rates
    and the update's factor mean the same with and without.

    Attributes:
        mean: float32 buffer (N,).
        scale: float32 buffer (N,), size / std; 0 before the moments are measured.
        sums: what `measure_inputs` adds to while it runs, else None.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__()
        for name in ("mean", "scale"):
            self.register_buffer(name, torch.zeros(in_features, device=device, dtype=torch.float32))
        self.sums: _Sums | None = None
        self._known = False

    def forward(self, x: Tensor) -> Tensor:
        """Return z, and zeros while the moments are being measured: the adapted model is then the pretrained one.

        Raises:
            UserError: if they have not been measured.
        """
        if self.sums is not None:
            self.sums.add(x.detach())
            return torch.zeros_like(x)
        self._require_measured()
        return ((x - self.mean) * self.scale).to(x.dtype)

    def _require_measured(self) -> None:
        if not self._known:
            self._known = self.is_measured()  # read once: on a GPU it waits for the device
            if not self._known:
                raise UserError(
                    "normalize_input='moments': mean and std of the projection's input have not been measured; train with "
                    "train.py fit, call fourier_moe.measure_inputs(model, batches) before the first step, or load an adapter"
                )

    def is_measured(self) -> bool:
        """Whether there are moments; True on the meta device, where nothing is known."""
        return self.scale.is_meta or bool((self.scale > 0).all())

    @torch.no_grad()
    def set(self, sums: _Sums) -> None:
        """Take the moments of all tokens in `sums`."""
        mean_N, square_N = sums.total / sums.count, sums.squares / sums.count
        variance_N = (square_N - mean_N.square()).clamp(min=0)
        std_N = torch.maximum(variance_N.sqrt(), MIN_STD * variance_N.mean().sqrt())
        size = (square_N.sum() / (variance_N / std_N.square()).sum()).sqrt()
        self.mean.copy_(mean_N)
        self.scale.copy_(size / std_N)
        self._known = True

    @torch.no_grad()
    def as_affine(self, update_MN: Tensor) -> tuple[Tensor, Tensor]:
        """dW' (M, N) and b (M,) in float64 with dW' x + b = dW z.

        Raises:
            UserError: if they have not been measured.
        """
        self._require_measured()
        scaled_MN = update_MN.double() * self.scale.double()
        return scaled_MN, -scaled_MN @ self.mean.double()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = not self.scale.is_meta and self.is_measured()


class _Sums:
    """Sums over the tokens that one projection reads, in float64."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.packed = torch.zeros(2 * in_features + 1, dtype=torch.float64, device=self.device)
        self.mask: Tensor | None = None

    @property
    def total(self) -> Tensor:
        return self.packed[: len(self.packed) // 2]

    @property
    def squares(self) -> Tensor:
        return self.packed[len(self.packed) // 2 : -1]

    @property
    def count(self) -> float:
        return float(self.packed[-1])

    def add(self, x: Tensor) -> None:
        if self.mask is not None and self.mask.shape != x.shape[:-1]:
            raise UserError(
                f"token_mask has shape {tuple(self.mask.shape)}, but the adapted projection sees tokens of shape "
                f"{tuple(x.shape[:-1])}; give one true/false per token of the projection's input"
            )
        x_TN = x.reshape(-1, x.shape[-1]) if self.mask is None else x[self.mask.to(x.device, torch.bool)]
        x_TN = x_TN.to(self.device).double()
        count = self.packed.new_full((1,), len(x_TN))
        self.packed += torch.cat([x_TN.sum(0), x_TN.square().sum(0), count])


def unmeasured(model: nn.Module) -> dict[str, InputMoments]:
    """The moments of a model that have not been measured, by the name of their projection."""
    return {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, InputMoments) and not module.is_measured()
    }


@torch.no_grad()
def measure_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None = None,
    token_mask: Callable[[Any], Tensor | None] | None = None,
) -> None:
    """Measure the mean and std of what each adapter reads, for adapters with `normalize_input: moments`; no labels are needed.

    Moments that are known stay. While it runs, adapters add nothing and the model is in eval mode: what is measured are the
    pretrained model's own activations. Of several processes each gives its own batches, and all get the same moments; all
    processes have to call it.

    Args:
        model: an adapted model.
        batches: a few, like those of training; 16 are plenty.
        forward: runs the model on a batch; by default `model(**batch)` for a mapping, else `model(batch)`.
        token_mask: gives true for the real tokens of a batch and false for padding, in the leading shape of every adapted
            projection's input, as in `recording`; by default all tokens count.

    Raises:
        UserError: if the model does not call an adapted projection, or its input is not finite, or the same for all tokens.
    """
    found = unmeasured(model)
    if not found:
        return
    with _collecting(model, found) as sums:
        for batch in batches:
            mask = token_mask(batch) if token_mask else None
            for one in sums.values():
                one.mask = mask
            if forward is not None:
                forward(batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
        for one in sums.values():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(one.packed)
    for name, one in sums.items():
        if one.count < 2:
            raise UserError(
                f"the inputs of {name} cannot be measured: the batches gave it {one.count:.0f} tokens without padding, and at "
                "least 2 are needed; give more batches, or leave projections that the model does not call out of targets"
            )
        if not one.packed.isfinite().all():
            raise UserError(f"the inputs of {name} hold NaN or infinity; they cannot be measured")
        if not (one.squares * one.count - one.total.square() > 0).any():
            raise UserError(f"the inputs of {name} are the same for all tokens; leave it out of targets")
    for name, one in sums.items():
        found[name].set(one)


@contextmanager
def _collecting(model: nn.Module, found: Mapping[str, InputMoments]) -> Iterator[dict[str, _Sums]]:
    """In eval mode, with sums for each of the moments; afterwards everything is as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for moments in found.values():
        moments.sums = _Sums(len(moments.mean), moments.mean.device)
    try:
        yield {name: moments.sums for name, moments in found.items() if moments.sums is not None}
    finally:
        for moments in found.values():
            moments.sums = None
        for module, mode in modes.items():
            module.training = mode
