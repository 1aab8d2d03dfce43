"""Frozen weights in 8 or 4 bits with bitsandbytes, on GPUs and on the CPU."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available

from fourier_moe.errors import UserError

# Arguments of BitsAndBytesConfig. nf4 also quantizes its own scale factors, as QLoRA does (arXiv 2305.14314).
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
_VERSION = "0.50"  # the first tested version


def check_quantization(quantization: str | None) -> None:
    """Check a quantization without loading anything.

    Raises:
        UserError: for an unknown quantization, or if bitsandbytes is not installed.
    """
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise UserError(f"quantization={quantization!r} must be one of {', '.join(QUANTIZATIONS)}, or null")
    if not is_bitsandbytes_available(_VERSION):
        raise UserError(f"quantization={quantization!r} needs bitsandbytes {_VERSION} or newer: pip install -e '.[quantized]'")


def quantization_config(quantization: str, skeleton: PreTrainedModel) -> BitsAndBytesConfig:
    """Return the quantization config for `from_pretrained`.

    Args:
        quantization: one of QUANTIZATIONS.
        skeleton: the model on the meta device, in the dtype of activations and of weights that are not quantized.
    """
    kept = [*modules_outside_body(skeleton)]
    if quantization == "nf4":
        # A scale factor belongs to a block of 64 numbers. If a row ends within a block, bitsandbytes 0.50.2 silently computes
        # wrong values on CPUs with AVX-512, off by 20 % and more.
        kept += [n for n, layer in skeleton.named_modules() if isinstance(layer, nn.Linear) and layer.in_features % 64]
    # llm_int8_skip_modules applies to both quantizations.
    return BitsAndBytesConfig(**QUANTIZATIONS[quantization], bnb_4bit_compute_dtype=skeleton.dtype, llm_int8_skip_modules=kept)


def modules_outside_body(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of a language model's output layer or of a classifier's head."""
    children = model.named_children()
    return tuple(name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters()))


def prepare_training(model: PreTrainedModel) -> None:
    """Let bitsandbytes pass gradients in every case, and without a log message for every layer."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with bfloat16 products the first evaluation would repack the weights for a kernel without gradients. From
            # then on the adapters of earlier layers would silently get none.
            module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # warns about float16 in every call
