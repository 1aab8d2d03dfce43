"""Reading the pretrained weight of a projection, for methods that start from it."""

from __future__ import annotations

from torch import Tensor, nn

from fourier_moe.adapter import projection_shape


def pretrained_weight(base: nn.Module, name: str, method: str) -> Tensor:
    """W (out_features, in_features) of a projection, a view of its parameter.

    Raises:
        ValueError: if the weight is quantised or otherwise no plain matrix of floating-point numbers.
    """
    weight, in_and_out = base.weight, projection_shape(base)
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()
    if not (plain and tuple(weight.shape) in (in_and_out, in_and_out[::-1])):  # packed ones have other shapes
        described = f"{type(weight).__name__} of {getattr(weight, 'dtype', None)}"
        raise ValueError(
            f"{name}: {method} starts from the pretrained weight and needs a matrix of floating-point numbers, but that of "
            f"{type(base).__name__} is a {described}; load the model without quantisation, or choose another method"
        )
    assert isinstance(weight, Tensor)
    return weight.detach().T if hasattr(base, "nf") else weight.detach()  # transformers' Conv1D stores (in, out)
