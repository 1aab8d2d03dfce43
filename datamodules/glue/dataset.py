"""The torch dataset over tokenized examples, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from datamodules.glue.source import Examples
from datamodules.glue.tokenization import TokenizedExamples


class TextDataset(Dataset[dict[str, Any]]):
    """Some of a split's examples, in the given order.

    An item is a dict: `input_ids` int32 (T,), `token_type_ids` int32 (T,) if the tokenizer gives them, `label` int
    (absent where labels are hidden), `id` str, and `text` str if there are sentences (a pair is joined by ` | `).

    Args:
        examples: A split.
        tokens: the same split, tokenized.
        indices: which of its examples.
        sentences: of the split, as in `Examples`, where its text is shown; none elsewhere.
    """

    def __init__(
        self,
        examples: Examples,
        tokens: TokenizedExamples,
        indices: Sequence[int],
        sentences: Sequence[Sequence[str]] = (),
    ) -> None:
        self.indices = indices
        lengths = tokens.lengths
        self.lengths = [lengths[index] for index in indices]
        self._ids, self._labels, self._tokens, self._sentences = examples.ids, examples.labels, tokens, sentences

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item]
        example: dict[str, Any] = {**self._tokens[index], "id": self._ids[index]}
        if self._labels is not None:
            example["label"] = self._labels[index]
        if self._sentences:
            example["text"] = " | ".join(sentences[index] for sentences in self._sentences)
        return example


@dataclass(frozen=True)
class PadBatch:
    """Makes a batch of B items, padded on the right to the longest of them.

    `input_ids`, `attention_mask` and, if there are any, `token_type_ids` int64 (B, T); `label` int64 (B,), if there
    are labels; `id` and, if it is shown, `text`, lists of B strings.

    Args:
        pad_token_id: what `input_ids` are padded with.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch: dict[str, Any] = {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}
        for name, padding in (("input_ids", self.pad_token_id), ("token_type_ids", 0)):
            if name in items[0]:
                batch[name] = pad_sequence([item[name] for item in items], batch_first=True, padding_value=padding).long()
        if "label" in items[0]:
            batch["label"] = torch.tensor([item["label"] for item in items])
        if "classes" in items[0]:
            batch["classes"] = torch.stack([item["classes"] for item in items])
        for name in ("id", "task", "text"):
            if name in items[0]:
                batch[name] = [item[name] for item in items]
        return batch
