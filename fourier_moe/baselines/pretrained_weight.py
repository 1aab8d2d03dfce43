"""Reading the pretrained weight of a projection, for methods that start from it."""

from __future__ import annotations

from torch import Tensor, nn

from fourier_moe.adapter import projection_shape


def pretrained_weight(base: nn.Module, name: str, method: str) -> Tensor:
    """W (out_features, in_features) of a projection, a view of its parameter.

    Raises:
        ValueError: if the weight is quantised or otherwise no plain matrix of floating-point numbers.
    """
    weight, shape = base.weight, projection_shape(base)
    if not (
        isinstance(weight, Tensor)
        and type(weight.data) is Tensor  # quantised ones may call themselves float32
        and weight.is_floating_point()
        and tuple(weight.shape) in (shape, shape[::-1])
    ):
        described = f"{type(weight).__name__} of {getattr(weight, 'dtype', None)}"
        raise ValueError(
            f"{name}: {method} starts from the pretrained weight and needs a matrix of floating-point numbers, but that of "
            f"{type(base).__name__} is a {described}; load the model without quantisation, or choose another method"
        )
    return weight.detach().T if hasattr(base, "nf") else weight.detach()  # transformers' Conv1D stores (in, out)
