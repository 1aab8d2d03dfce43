"""Heads of transformers' and timm's classifiers: what they read, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.routing.logits import without_autocast


@contextmanager
def reading_heads(heads: Sequence[nn.Module], last_token: Tensor | None = None, length: int = 0) -> Iterator[None]:
    """Let the heads compute without autocast, on the last real token of each example, repeated over all positions.

    transformers may then select any position. It compares ids with `config.pad_token_id`, and would otherwise take padding for
    text if the batch is padded with another token, or text for padding if the text contains that token.

    Args:
        heads: modules outside the model's body.
        last_token: index of each example's last real token (B,); None for a model that pools by itself.
        length: number of tokens T of the batch.
    """
    with ExitStack() as hooks, ExitStack() as autocast:

        def begin(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            autocast.enter_context(without_autocast(inputs[0].device))
            if last_token is None or inputs[0].dim() < 3:  # pooled by a head before this one
                return inputs
            examples = torch.arange(len(inputs[0]), device=inputs[0].device)
            return inputs[0][examples, last_token.to(inputs[0].device)].unsqueeze(1), *inputs[1:]

        def end(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            autocast.close()
            return output if last_token is None or output.dim() < 3 else output.expand(-1, length, -1)

        for head in heads:
            hooks.callback(head.register_forward_pre_hook(begin).remove)
            hooks.callback(head.register_forward_hook(end).remove)
        yield


def cast_to_float32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the inputs of a head from the backbone's precision to float32."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
