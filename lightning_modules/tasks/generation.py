"""Continue prompts with a language model, independent of the model's own generation_config.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fourier_moe.config import check_types
from fourier_moe.errors import UserError


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated: greedily or with beam search, without sampling.

    Attributes:
        max_new_tokens: maximal number of tokens of an answer.
        num_beams: 1 for greedy decoding; LLM-Adapters reports results with 4.

    Raises:
        UserError: if one of them is no whole number of 1 or more.
    """

    max_new_tokens: int = 32
    num_beams: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits.
        top_p: share of the probability, of the most probable tokens, that is drawn from.

    Raises:
        UserError: if one of them is out of its range.
    """

    temperature: float
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be a number above 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0, at most 1")


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    settings: GenerationSettings,
    sampling: Sampling | None = None,
    streamer: Any = None,
    end_tokens: Iterable[int] = (),
) -> list[str]:
    """Return the text that follows each prompt, without special tokens and surrounding white space.

    Where the longest prompt leaves less room than `max_new_tokens` in the model's context, all answers of the batch end there.

    Args:
        model: a transformers causal language model; it generates in eval mode, and its mode is restored.
        tokenizer: the model's tokenizer.
        prompt_ids: int64 (B, T), padded on the left.
        prompt_mask: (B, T), 0 for padding.
        settings: length and beams.
        sampling: how tokens are drawn; None for the most probable ones.
        streamer: receives the tokens of a single prompt as they come; see transformers.TextStreamer.
        end_tokens: ids that end a text beside the model's and the tokenizer's own, such as a chat template's end of a turn.

    Raises:
        UserError: if a prompt leaves no room at all.
    """
    drawing: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling else {}
    config = GenerationConfig(
        max_new_tokens=_room(model, prompt_mask, settings.max_new_tokens),
        num_beams=settings.num_beams,
        do_sample=sampling is not None,
        **drawing,
        use_cache=True,
        eos_token_id=_end_tokens(model, tokenizer, end_tokens),
        pad_token_id=tokenizer.pad_token_id,
    )
    with _evaluating(model), _without_own_settings(model):
        tokens = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=config,
            synced_gpus=is_sharded(model),
            streamer=streamer,
        )
    answers = tokenizer.batch_decode(
        tokens[:, prompt_ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [answer.strip() for answer in answers]


def context_length(model: Any) -> int | None:
    """Return the number of tokens that a model can read; None if it does not tell."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def require_room(model: Any, num_tokens: int, what: str) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Raises:
        UserError: naming `what`.
    """
    context = context_length(model)
    if context is not None and num_tokens >= context:
        raise UserError(f"{what} has {num_tokens:,} tokens, and the model reads {context:,}; shorten it")


def _room(model: Any, prompt_mask: Tensor, wanted: int) -> int:
    """Return how many of the wanted tokens fit behind the longest prompt."""
    context = context_length(model)
    if context is None or prompt_mask.shape[1] + wanted <= context:
        return wanted
    longest = int(prompt_mask.sum(1).max())
    require_room(model, longest, "a prompt")
    if longest + wanted > context:
        rank_zero_warn(f"answers end where the model's context of {context:,} tokens does, before max_new_tokens={wanted}")
    return min(wanted, context - longest)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model is sharded, so that every forward needs all processes."""
    return torch.distributed.is_initialized() and any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, others: Iterable[int]) -> list[int]:
    """Return the tokenizer's end token, which ends training data, the model's own (end of text, end of turn), and others."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *own, *others) if token is not None})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode for a while, since gradient checkpointing forbids the cache in training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Hide the model's own config, from which transformers fills unset fields such as sampling and penalties."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
