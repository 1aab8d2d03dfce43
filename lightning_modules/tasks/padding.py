"""Padding of batches, moved to the right."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.tasks.base import Batch


def real_tokens(attention_mask: Tensor) -> Tensor:
    """Return a mask (B, T) of real tokens in the order of `padded_right`: real tokens first."""
    lengths = attention_mask.to(torch.bool).sum(-1, keepdim=True)
    return torch.arange(attention_mask.shape[-1], device=lengths.device) < lengths


def padded_right(batch: Batch, *names: str) -> dict[str, Tensor]:
    """Return columns of a batch with all padding on the right.

    Padding on the left would shift the positions of models that count from the first column (GPT-2, BERT), and padding would
    predict the first token of an example.

    Args:
        batch: (B, T) tensors; its `attention_mask` is 0 for padding.
        names: the columns; those that the batch does not have are left out.

    Returns:
        The columns and `attention_mask`, unchanged if the batch is padded on the right already.
    """
    mask = batch["attention_mask"]
    order = mask.to(torch.bool).long().argsort(dim=-1, descending=True, stable=True)
    columns = {name: batch[name].gather(-1, order) for name in names if name in batch}
    return columns | {"attention_mask": real_tokens(mask).to(mask.dtype)}
