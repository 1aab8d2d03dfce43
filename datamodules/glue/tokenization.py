"""Sentences to token ids, once: the result lies on disk and is found again under a key of all it depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.glue.source import Examples
from datamodules.shared.cache import cache_key, load_or_make

_CHUNK = 10_000


@dataclass(frozen=True)
class TokenizedExamples:
    """Token ids of N examples without padding, one after the other.

    Attributes:
        columns: input name (input_ids, perhaps token_type_ids) -> int32 (tokens of all examples).
        offsets: where each example starts, and where the last one ends, int64 (N + 1).
        num_truncated: how many examples were longer than allowed, and cut.
    """

    columns: dict[str, Tensor]
    offsets: Tensor
    num_truncated: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, end = self.offsets[index : index + 2].tolist()
        return {name: values[start:end] for name, values in self.columns.items()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.offsets.diff().tolist()


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, cache_directory: Path
) -> TokenizedExamples:
    """Tokenize sentences, or pairs of them as the tokenizer joins pairs; examples that are too long are cut at max_length.

    Args:
        examples: the sentences.
        tokenizer: adds its special tokens.
        max_length: most tokens of an example, special ones included.
        cache_directory: gets a file, or already has it.

    Raises:
        UserError: the cache directory cannot be written to.
    """
    key = cache_key(tokenizer, max_length, *examples.sentences)
    columns = load_or_make(cache_directory, key, lambda: _tokenize(examples, tokenizer, max_length))
    return TokenizedExamples(columns, columns.pop("offsets"), int(columns.pop("num_truncated")))


def _tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Tensor]:
    """Return the columns, with `offsets` and `num_truncated`."""
    names = [name for name in tokenizer.model_input_names if name in ("input_ids", "token_type_ids")]
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    lengths: list[int] = []
    num_truncated = 0
    for start in range(0, len(examples), _CHUNK):
        rows = [list(column[start : start + _CHUNK]) for column in examples.sentences]
        encoded = tokenizer(*rows, verbose=False)
        too_long = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
        if too_long:
            chosen = [[column[row] for row in too_long] for column in rows]
            cut = tokenizer(*chosen, truncation=True, max_length=max_length)
            for name in names:
                for row, values in zip(too_long, cut[name], strict=True):
                    encoded[name][row] = values
        num_truncated += len(too_long)
        lengths += [len(ids) for ids in encoded["input_ids"]]
        for name in names:
            columns[name].append(torch.tensor([value for values in encoded[name] for value in values], dtype=torch.int32))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = {name: torch.cat(parts) for name, parts in columns.items()}
    return {**tokens, "offsets": offsets, "num_truncated": torch.tensor(num_truncated)}
