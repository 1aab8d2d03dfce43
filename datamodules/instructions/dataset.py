"""Tokenized examples as torch datasets, and how they become batches."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from datamodules.instructions.benchmarks import Benchmark
from datamodules.instructions.reading.records import Record
from datamodules.instructions.tokenizing.text import ExampleTokenizer
from datamodules.shared.cache import load_or_make

IGNORED = -100  # the label of a token without loss


@dataclass(frozen=True)
class Example:
    """A record and where it is from.

    Attributes:
        id: unique in its set.
        record: the record.
        benchmark: how answers to it are graded.
        task: the training source it is from, if it is from one.
    """

    id: str
    record: Record
    benchmark: Benchmark
    task: str | None = None


class TrainDataset(Dataset[dict[str, Any]]):
    """Prompts with responses.

    An item is a dict: `input_ids` and `labels` int64 (T,), `id` str, `task` str.

    Args:
        examples: records and where they are from.
        tokenizer: makes token ids of them.
        train_on_prompt: whether the prompt's tokens have labels, too.
        cache_directory: keeps the token ids from run to run; None tokenizes every time.

    Attributes:
        lengths: tokens of each example.
        questions_cut: how many questions lost their beginning.
        responses_cut: how many responses lost their end.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: ExampleTokenizer,
        *,
        train_on_prompt: bool,
        cache_directory: Path | None = None,
    ) -> None:
        self.ids = [example.id for example in examples]
        self.tasks = [example.task for example in examples]
        records = [example.record for example in examples]
        if cache_directory is None:
            found = _tokenize(records, tokenizer)
        else:
            found = load_or_make(cache_directory, tokenizer.key(records), lambda: _tokenize(records, tokenizer))
        self.lengths = found["lengths"].tolist()
        self.questions_cut = int(found["questions_cut"])
        self.responses_cut = int(found["responses_cut"])
        # Tensors instead of a list each: loading processes share their memory instead of copying it bit by bit.
        self._tokens = found["tokens"]
        self._starts = _starts(found["lengths"])
        self._responses = found["responses"].view(-1, 2)
        self._first_responses = _starts(found["response_counts"])
        self._train_on_prompt = train_on_prompt

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._starts[index : index + 2].tolist()
        input_ids = self._tokens[start:end].long()
        labels = input_ids.clone() if self._train_on_prompt else torch.full_like(input_ids, IGNORED)
        first, last = self._first_responses[index : index + 2].tolist()
        for begin, end in self._responses[first:last].tolist():
            labels[begin:end] = input_ids[begin:end]
        return {"input_ids": input_ids, "labels": labels, "id": self.ids[index], "task": self.tasks[index]}


def _tokenize(records: Sequence[Record], tokenizer: ExampleTokenizer) -> dict[str, Tensor]:
    """Return all token ids in a row, the number of ids of each example, beginnings and ends of the responses in a row, their
    number in each example, and the number of cut examples."""
    tokens, lengths, responses, counts = (array("i") for _ in range(4))  # lists of so many numbers would take gigabytes
    questions_cut = responses_cut = 0
    for item in tokenizer.examples(records):
        tokens.extend(item.ids)
        lengths.append(len(item.ids))
        counts.append(len(item.responses))
        for response in item.responses:
            responses.extend(response)
        questions_cut += item.question_cut > 0
        responses_cut += item.response_cut > 0
    columns = {"tokens": tokens, "lengths": lengths, "responses": responses, "response_counts": counts}
    cut = {"questions_cut": questions_cut, "responses_cut": responses_cut}
    return {name: torch.frombuffer(values, dtype=torch.int32) for name, values in columns.items()} | {
        name: torch.tensor(value) for name, value in cut.items()
    }


def _starts(lengths: Tensor) -> Tensor:
    """Return where each of several pieces in a row begins, and where the last one ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


class EvaluationDataset(Dataset[dict[str, Any]]):
    """Prompts to be answered, with the gold response where there is one.

    An item is a dict: `prompt_ids` int64 (T,); `prompt`, `answer` and `id` str; `benchmark`; `choices` and `responses`, tuples
    of str, the answers to choose from and the text that gives each, as it follows the prompt; `end_tokens`, ids that end a
    response beside the model's own; `input_ids` and `labels` as in TrainDataset where the set's outputs are right; `task` str
    where the examples are from a training source.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: ExampleTokenizer, *, train_on_prompt: bool) -> None:
        self._examples = examples
        self._prompts = list(tokenizer.prompts([example.record for example in examples]))
        self._tokenizer = tokenizer
        has_gold = all(example.benchmark.has_gold_output for example in examples)
        self._gold = TrainDataset(examples, tokenizer, train_on_prompt=train_on_prompt) if has_gold else None

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max((len(ids) for _, ids in self._prompts), default=0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example, (prompt, ids) = self._examples[index], self._prompts[index]
        choices = example.benchmark.choices(example.record.instruction)
        item: dict[str, Any] = {
            "prompt_ids": torch.tensor(ids),
            "prompt": prompt.text,
            "answer": example.record.answer,
            "benchmark": example.benchmark,
            "choices": choices,
            "responses": tuple(self._tokenizer.response(example.benchmark.response(choice)) for choice in choices),
            "end_tokens": self._tokenizer.end_tokens,
            "id": example.id,
        }
        if example.task is not None:
            item["task"] = example.task
        if self._gold is not None:
            item |= {name: value for name, value in self._gold[index].items() if name in ("input_ids", "labels")}
        return item


class Collator:
    """Makes a batch of items: prompts are padded on the left, all else on the right, with masks int64 (B, T)."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
        if "input_ids" in batch:
            batch["attention_mask"] = _mask(batch["input_ids"], "right")
            batch["input_ids"] = _pad(batch["input_ids"], self._pad_token_id, "right")
            batch["labels"] = _pad(batch["labels"], IGNORED, "right")
        if "position_ids" in batch:  # of packed rows; padding begins again, as an example of its own
            width = batch["input_ids"].shape[1]
            batch["position_ids"] = torch.stack(
                [torch.cat([row, torch.arange(width - len(row))]) for row in batch["position_ids"]]
            )
        if "prompt_ids" in batch:
            batch["prompt_mask"] = _mask(batch["prompt_ids"], "left")
            batch["prompt_ids"] = _pad(batch["prompt_ids"], self._pad_token_id, "left")
        return batch


def _mask(sequences: list[Tensor], side: str) -> Tensor:
    return _pad([torch.ones_like(sequence) for sequence in sequences], 0, side)


def _pad(sequences: list[Tensor], value: int, side: str) -> Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)
