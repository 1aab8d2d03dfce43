"""Batches padded on either side, read as if they were padded on the right."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.tasks.base import Batch


def real_tokens(attention_mask: Tensor) -> Tensor:
    """True for real tokens, false for padding (B, T), as `padded_right` orders them: the real ones first."""
    lengths = attention_mask.to(torch.bool).sum(-1, keepdim=True)
    return torch.arange(attention_mask.shape[-1], device=lengths.device) < lengths


def padded_right(batch: Batch, *names: str) -> dict[str, Tensor]:
    """Some of a batch's columns with all padding on the right.

    Padding on the left would move the positions of models that count them from the first column (GPT-2, BERT), and let padding
    predict an example's first token.

    Args:
        batch: of (B, T) tensors; its `attention_mask` is 0 for padding.
        names: the columns; those that the batch lacks are left out.

    Returns:
        The columns and `attention_mask`. Of a batch that is padded on the right they are equal to the batch's.
    """
    mask = batch["attention_mask"]
    order = mask.to(torch.bool).long().argsort(dim=-1, descending=True, stable=True)
    columns = {name: batch[name].gather(-1, order) for name in names if name in batch}
    return columns | {"attention_mask": real_tokens(mask).to(mask.dtype)}
