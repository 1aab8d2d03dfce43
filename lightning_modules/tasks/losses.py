"""Cross-entropy of a language model at its labels, and the likelihood of whole responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from fourier_moe import Adapter

IGNORED = -100  # label of tokens without loss


class LabelLosses(NamedTuple):
    """Sums over the label tokens of each of B examples.

    Attributes:
        loss: negative log-likelihood (B,), float32, in nats.
        num_correct: number of labels that are the most probable token (B,).
        num_labels: number of labels (B,).
    """

    loss: Tensor
    num_correct: Tensor
    num_labels: Tensor


def label_losses(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> LabelLosses:
    """Score the prediction of every label from the tokens before it.

    Args:
        model: a transformers causal language model.
        input_ids: int64 (B, T), padded on the right.
        attention_mask: (B, T), 0 for padding.
        labels: int64 (B, T), the input ids, or -100 for no loss.
        position_ids: int64 (B, T), of packed rows: 0 where an example or the padding begins. Examples do not see each other.
    """
    logits, targets, example = label_logits(model, input_ids, attention_mask, labels, position_ids)
    losses = F.cross_entropy(logits, targets, reduction="none")
    zeros = losses.new_zeros(len(labels))
    correct = (logits.detach().argmax(-1) == targets).to(losses.dtype)
    num_labels = (labels[:, 1:] != IGNORED).sum(1)
    return LabelLosses(zeros.index_add(0, example, losses), zeros.index_add(0, example, correct), num_labels)


def label_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits that predict the labels; arguments as for `label_losses`.

    Other logits are not computed: with a vocabulary of 256,000, those of a prompt would need more memory than anything else.

    Returns:
        Logits (tokens, vocabulary), float32; the labels (tokens,); the index of each label's example (tokens,).
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
    wanted = targets != IGNORED
    packed = position_ids is not None  # transformers tells examples apart by their positions, if there is no mask
    places = {"position_ids": position_ids} if packed else {"attention_mask": attention_mask}
    with _only(model.get_output_embeddings(), wanted):
        logits = model(input_ids=input_ids, use_cache=False, **places).logits
    everywhere = logits.shape[:2] == wanted.shape  # never equal for (1, tokens), since the last position has no label
    logits = (logits[wanted] if everywhere else logits[0]).float()  # (tokens, vocabulary)
    return logits, targets[wanted], wanted.nonzero()[:, 0]


def log_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    responses: Sequence[Sequence[str]],
) -> list[Tensor]:
    """Compute log p(response | prompt) of every response to every prompt, in one forward.

    It is the sum over the tokens of a response, not their mean: the probability of the text, whatever its tokenization.

    Args:
        model: a transformers causal language model.
        tokenizer: the model's tokenizer.
        prompts: B texts.
        prompt_ids: their tokens, int64 (B, T), padded on the left, with or without a beginning-of-text token.
        prompt_mask: (B, T), 0 for padding.
        responses: texts for each prompt, without the end-of-text token.

    Returns:
        A tensor (number of responses,) for each of the B prompts.
    """
    ids, labels = [], []
    for prompt, tokens, mask, texts in zip(prompts, prompt_ids, prompt_mask, responses, strict=True):
        own = tokens[mask.bool()].tolist()
        both = _continued(tokenizer, prompt, own, texts)
        # A token may span the end of the prompt, so only tokens that all responses share with the prompt have no label.
        num_shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(own, *both, strict=False)))
        ids += [tokens.new_tensor(row) for row in both]
        labels += [tokens.new_tensor([IGNORED] * num_shared + row[num_shared:]) for row in both]
    attention_mask = _right_padded([torch.ones_like(row) for row in ids], 0)
    losses = label_losses(model, _right_padded(ids, tokenizer.pad_token_id), attention_mask, _right_padded(labels, IGNORED))
    return list((-losses.loss).split([len(texts) for texts in responses]))


def _continued(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of prompt and response as one text, as in training."""
    begin = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    encoded = tokenizer([prompt + text for text in texts], add_special_tokens=False)["input_ids"]
    return [begin + tokens for tokens in encoded]


def _right_padded(rows: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@contextmanager
def _only(head: nn.Module, wanted: Tensor) -> Iterator[None]:
    """Pass only the wanted tokens of (B, T, D) to the output layer, as (1, tokens, D).

    An adapted output layer gets all tokens, since its router needs them in the shape of the token mask.
    """
    if isinstance(head, Adapter):
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][wanted][None],))
    try:
        yield
    finally:
        handle.remove()
