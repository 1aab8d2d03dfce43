"""Cross-entropy of a language model at its labels, and the likelihood of whole responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from fourier_moe import Adapter
from fourier_moe.errors import UserError

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
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> LabelLosses:
    """Score the prediction of every label from the tokens before it.

    Args:
        model: a transformers causal language model.
        input_ids: int64 (B, T), padded on the right.
        attention_mask: (B, T), 0 for padding.
        labels: int64 (B, T), the input ids, or -100 for no loss.
        position_ids: int64 (B, T), of packed rows: 0 where an example or the padding begins. Examples do not see each other.
        chunk_size: labels whose logits exist at the same time; the backward pass computes them a second time. None for all.

    Raises:
        UserError: with chunk_size, if logits are more than the output layer of the hidden states, or this layer is adapted.
    """
    targets, wanted = _targets(labels)
    if chunk_size is None:
        logits = _label_logits(model, input_ids, attention_mask, wanted, position_ids)
        losses, correct = _scores(logits, targets[wanted])
    else:
        states = _label_states(model, input_ids, attention_mask, wanted, position_ids)
        head = model.get_output_embeddings()
        chunks = zip(states.split(chunk_size), targets[wanted].split(chunk_size), strict=True)
        parts = [checkpoint(_chunk_scores, head, *chunk, use_reentrant=False) for chunk in chunks]
        losses, correct = (torch.cat(each) for each in zip(*parts, strict=True))
    zeros, example = losses.new_zeros(len(labels)), wanted.nonzero()[:, 0]
    return LabelLosses(zeros.index_add(0, example, losses), zeros.index_add(0, example, correct), wanted.sum(1))


def _label_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor, position_ids: Tensor | None) -> Tensor:
    """Return the logits that predict the labels, (tokens, vocabulary), float32.

    Other logits are not computed: with a vocabulary of 256,000, those of a prompt would need more memory than anything else.
    """
    with _only(model.get_output_embeddings(), wanted):
        logits = _forward(model, input_ids, attention_mask, position_ids)
    everywhere = logits.shape[:2] == wanted.shape  # never equal for (1, tokens), since the last position has no label
    return (logits[wanted] if everywhere else logits[0]).float()


def _targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token that each position predicts (B, T), and whether it is a label."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
    return targets, targets != IGNORED


def _forward(model: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None) -> Tensor:
    packed = position_ids is not None  # transformers tells examples apart by their positions, if there is no mask
    places = {"position_ids": position_ids} if packed else {"attention_mask": attention_mask}
    logits: Tensor = model(input_ids=input_ids, use_cache=False, **places).logits
    return logits


def _scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of each target (tokens,), and 1 where it is the most probable token, else 0."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses, (logits.detach().argmax(-1) == targets).to(losses.dtype)


def _chunk_scores(head: nn.Module, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _scores(head(states).float(), targets)


def _label_states(model: Any, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor, position_ids: Tensor | None) -> Tensor:
    """Return what the output layer gets for each label, (tokens, D); it computes the first token only."""
    head, kept = model.get_output_embeddings(), []
    if isinstance(head, Adapter):
        raise UserError(
            "loss_chunk_size splits the tokens of the output layer, and a router needs all; leave the layer out of targets"
        )

    def keep(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        kept.append(inputs[0][wanted])
        return (kept[0][None, :1],)

    handle = head.register_forward_pre_hook(keep)
    try:
        first = _forward(model, input_ids, attention_mask, position_ids)[0]
    finally:
        handle.remove()
    if head not in _PLAIN_HEADS:
        with torch.no_grad():
            if not torch.allclose(first.float(), head(kept[0][:1]).float(), rtol=1e-5, atol=1e-6):
                raise UserError(
                    f"loss_chunk_size needs the logits that are those of the output layer, and {type(model).__name__} changes "
                    "them afterwards (by a cap or a scale); set it to null"
                )
        if len(kept[0]):
            _PLAIN_HEADS.add(head)
    return kept[0]


_PLAIN_HEADS: WeakSet[nn.Module] = WeakSet()  # output layers after which nothing changes the logits


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
