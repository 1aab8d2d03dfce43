"""What code around an adapted projection finds as its `weight`, and which code is known to multiply with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fourier_moe.errors import UserError

# Torch's products, by the names of their functions.
_PRODUCTS = (
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addbmm", "addmv", "baddbmm"),
    *("inner", "tensordot", "einsum", "chain_matmul", "conv1d", "conv2d", "multi_head_attention_forward"),
    *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
)
# Functions that return parts of a weight or several weights side by side, and those that keep the number of elements.
_PARTS = (
    *("cat", "concat", "stack", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "index_select"),
    "__getitem__",
)
# What takes only a type, a device or a shape from the weight: the result is a weight only where a weight is converted.
_CONVERSIONS = ("to", "type_as", "view_as", "reshape_as", "expand_as")
_NEW_VALUES = (
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_empty", "new_empty_strided", "new_full", "new_tensor"),
)

_VIEWS = frozenset(
    getattr(Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH")
)  # attributes that still give the weight

# Attention modules that hand their projections' weights to a function, by the class whose `forward` does.
_READERS: dict[str, tuple[str, ...]] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("qkv", "proj"),
    "transformers.models.wavlm.modeling_wavlm.WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "open_clip.modified_resnet.AttentionPool2d": ("q_proj", "k_proj", "v_proj", "c_proj"),
}


_REMEDY = "leave it out of targets, for example by a regular expression for the names of the others"


def check_is_called(model: nn.Module, name: str) -> None:
    """Refuse a projection of which it is known that the module around it reads its weight and never calls it.

    Raises:
        UserError: naming both.
    """
    parent, _, child = name.rpartition(".")
    owner = type(model.get_submodule(parent))
    reader = next(cls for cls in owner.__mro__ if "forward" in vars(cls))
    if child in _READERS.get(f"{reader.__module__}.{reader.__qualname__}", ()):
        raise UserError(
            f"targets match {name!r}, but {owner.__name__} reads that projection's weight and does not call it, so that an "
            f"adapter would have no effect; {_REMEDY}"
        )


class PretrainedWeight(Tensor):
    """The frozen weight of an adapted projection, to be looked at, compared and copied, but not to be multiplied with.

    Code that multiplies with it bypasses the adapter: the model computes what the pretrained one does, and the adapter is not
    trained. It gets an error, in eager mode and under torch.compile. Analyses that multiply read the weight of `adapter.base`.
    """

    projection: str
    _wrapped: ClassVar = (Tensor, nn.Parameter)

    @classmethod
    def of(cls, weight: Any, projection: str) -> Any:
        """Return a view of `weight`; the weight itself where it is of a class of its own (quantized, sharded).

        Args:
            weight: of the base.
            projection: name of the adapted projection, for the message.
        """
        if type(weight) not in cls._wrapped:
            return weight
        view = weight.detach().as_subclass(cls)
        view.projection = projection
        return view

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        tensors = [value for value in _flat([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        first = next((tensor for tensor in tensors if type(tensor) is cls), None)
        if first is not None and name in _PRODUCTS:
            raise UserError(
                f"the model multiplies with the weight of {first.projection!r} itself ({name}) and does not call the "
                f"projection, so that its adapter would have no effect; {_REMEDY}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if first is None or (name == "__get__" and func not in _VIEWS) or name in _NEW_VALUES:
            return result
        if name in _CONVERSIONS and first is not tensors[0]:
            return result
        if isinstance(result, (tuple, list)):
            return type(result)(_rewrapped(part, first, name) for part in result) if name in _PARTS else result
        return _rewrapped(result, first, name)


def _rewrapped(result: Any, weight: PretrainedWeight, name: str) -> Any:
    """Return the result as a weight again, after a cast, a transposition and the like."""
    if type(result) is not Tensor or not (name in _PARTS or result.numel() == weight.numel()):
        return result
    return PretrainedWeight.of(result, weight.projection)


def _flat(values: Sequence[Any]) -> list[Any]:
    return [part for value in values for part in (value if isinstance(value, (list, tuple)) else (value,))]
