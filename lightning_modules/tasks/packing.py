"""Whether a language model keeps the examples of a packed row apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourier_moe.errors import UserError

_LENGTH = 4  # tokens of an example that is tried
_MAX_LEAK = 1e-3  # share of the logits' spread: nothing leaks but rounding
_MAX_SHIFT = 0.1  # other kernels round in another way, in 16 bits by a few percent


@torch.no_grad()
def require_packing(model: Any, batch_size: int) -> None:
    """Try whether a packed example's logits depend on the example before it, and are those of the example alone.

    transformers finds packed examples by positions that begin again, where it is given no mask; with attention that ignores
    them, every example silently sees those before it.

    Args:
        model: a transformers causal language model.
        batch_size: rows per batch; flash attention finds packed examples in a single row only.

    Raises:
        UserError: if the model does not keep them apart.
    """
    device = model.get_input_embeddings().weight.device
    before, last = torch.arange(2 * _LENGTH, device=device).view(2, _LENGTH), torch.arange(_LENGTH, device=device) + 3
    rows = torch.cat([before, last.expand(2, -1)], 1)
    positions = torch.arange(_LENGTH, device=device).repeat(2)
    training = model.training
    model.eval()
    try:
        pieces = rows.split(1) if batch_size == 1 else [rows]
        packed = torch.cat([_logits(model, piece, positions) for piece in pieces])[:, _LENGTH:]
        alone = _logits(model, last[None], positions[:_LENGTH])
    except TypeError as error:  # its forward takes no positions
        raise _refused(model, f"takes no position_ids ({error})", batch_size) from error
    finally:
        model.train(training)
    spread = alone.std()
    if not (packed[0] - packed[1]).abs().max() <= _MAX_LEAK * spread:
        raise _refused(model, "lets an example see the one before it", batch_size)
    if not (packed[0] - alone[0]).abs().max() <= _MAX_SHIFT * spread:
        raise _refused(model, "computes something else for an example that is not the first of its row", batch_size)


def _logits(model: Any, input_ids: Tensor, positions: Tensor) -> Tensor:
    positions = positions.expand(len(input_ids), -1)
    logits: Tensor = model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
    return logits.float()


def _refused(model: Any, what: str, batch_size: int) -> UserError:
    attention = getattr(model.config, "_attn_implementation", None)
    one_row = ", or data.batch_size to 1" if batch_size > 1 and "flash" in str(attention) else ""
    return UserError(
        f"packing: {type(model).__name__} with attn_implementation {attention} {what}; set data.packing to false{one_row}"
    )
