"""Frozen weights in 8 or 4 bits, by bitsandbytes, which computes with them on GPUs and on the CPU."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available

from fourier_moe.errors import UserError

# What each is called in transformers. nf4 also quantizes its own scale factors, as QLoRA does (arXiv 2305.14314).
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


_VERSION = "0.50"  # the first that this was tried with


def check_quantization(quantization: str | None) -> None:
    """Look for what is needed without loading anything.

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
    """What `from_pretrained` takes.

    Args:
        quantization: one of QUANTIZATIONS.
        skeleton: the model without weights (on the meta device), in the dtype that is computed in and that what is not
            quantized keeps.
    """
    kept = [*modules_outside_body(skeleton)]
    if quantization == "nf4":
        # A scale factor belongs to 64 numbers in a row. Where a row ends within them, bitsandbytes 0.50.2 reads wrong numbers
        # on CPUs with AVX-512: off by 20 % and more, without a word.
        kept += [n for n, layer in skeleton.named_modules() if isinstance(layer, nn.Linear) and layer.in_features % 64]
    # The argument is called int8 and holds for both.
    return BitsAndBytesConfig(**QUANTIZATIONS[quantization], bnb_4bit_compute_dtype=skeleton.dtype, llm_int8_skip_modules=kept)


def modules_outside_body(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of a language model's output layer, or of a classifier's head."""
    children = model.named_children()
    return tuple(name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters()))


def prepare_training(model: PreTrainedModel) -> None:
    """What bitsandbytes needs besides to pass all gradients on, and to do so without a line in the log for every layer."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs that multiply bfloat16 the first evaluation would pack the weights anew, for a kernel without gradient:
            # from then on nothing would reach the adapters of earlier layers, without a word.
            module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # warns of float16 in every call
