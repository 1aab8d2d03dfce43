"""From prompts and responses to token ids, and what is cut where they are too long."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from datamodules.instructions.reading.records import Conversation, Record
from datamodules.instructions.tokenizing.prompts import Prompt, PromptStyle
from datamodules.shared.cache import cache_key
from fourier_moe.errors import UserError

_CHUNK = 2000  # tokenizers that are not in Python use all cores for a list of texts


@dataclass(frozen=True)
class TokenizedExample:
    """Prompt and response, or a conversation, as one sequence.

    Attributes:
        ids: all token ids.
        responses: where each response begins and ends among them.
        question_cut: tokens left out at the beginning of the question.
        response_cut: tokens left out at the end of the response (with its end-of-sequence token).
    """

    ids: list[int]
    responses: tuple[tuple[int, int], ...]
    question_cut: int = 0
    response_cut: int = 0

    @property
    def prompt_length(self) -> int:
        """How many ids come before the first response."""
        return self.responses[0][0]


class ExampleTokenizer(ABC):
    """Makes token ids of records.

    Contexts and responses are tokenized as one text, as they would be found in any other text; a token that reaches into a
    response is the response's.

    Args:
        tokenizer: of the model, a fast one or bytes.
        max_length: of an example in training, in tokens.

    Attributes:
        end_tokens: ids that end a response, beside the model's own.

    Raises:
        UserError: the tokenizer does not tell where in the text its tokens stand.
    """

    end_tokens: tuple[int, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not (tokenizer.is_fast or isinstance(tokenizer, ByT5Tokenizer)):
            raise UserError(
                f"tokenizer: a {type(tokenizer).__name__} cannot tell where the prompt's tokens end; give one with a "
                "tokenizer.json, or bytes"
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})")

    @abstractmethod
    def prompts(self, records: Sequence[Record]) -> Iterator[tuple[Prompt, list[int]]]:
        """Yield the evaluation prompts and their token ids."""

    @abstractmethod
    def key(self, records: Sequence[Record]) -> str:
        """Return a name for the examples of these records: a hash of all that they depend on."""

    @abstractmethod
    def response(self, output: str) -> str:
        """Return a response as it follows the prompt."""

    @abstractmethod
    def _parts(self, record: Record) -> Sequence[str]:
        """Return the texts that a training example consists of."""

    @abstractmethod
    def _fit(self, parts: Sequence[list[int]]) -> TokenizedExample:
        """Return the example of the tokens of its parts, at most `max_length` of them."""

    def examples(self, records: Sequence[Record]) -> Iterator[TokenizedExample]:
        """Yield the training examples, at most `max_length` tokens each.

        Raises:
            UserError: `max_length` has no room beside the prompt's own words, or a record does not fit this tokenizer.
        """
        for texts in self._batches(records):
            yield from map(self._fit, self._tokenize(texts))

    def _batches(self, records: Sequence[Record]) -> Iterator[list[Sequence[str]]]:
        """Yield the parts of some records at a time."""
        for start in range(0, len(records), _CHUNK):
            yield [self._parts(record) for record in records[start : start + _CHUNK]]

    def _tokenize(self, texts: Sequence[Sequence[str]]) -> Iterator[list[list[int]]]:
        """Yield the token ids of each part of each text, without special tokens."""
        if not self._tokenizer.is_fast:  # in Python, without offsets: bytes, for which the parts are the same alone
            for parts in texts:
                yield [self._bytes(part) for part in parts]
            return
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            encoded = self._tokenizer(
                ["".join(parts) for parts in chunk], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            for parts, ids, spans in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                borders = [0, *(bisect_left(spans, end, key=_last_character) for end in accumulate(map(len, parts)))]
                yield [ids[start:end] for start, end in pairwise(borders)]

    def _bytes(self, text: str) -> list[int]:
        """Return the ids of a text with special tokens, beside which the tokenizer itself would leave out white space."""
        pieces = [piece for piece in self._special.split(text) if piece]
        return [token for piece in pieces for token in self._tokenizer(piece, add_special_tokens=False)["input_ids"]]


class InstructionTokenizer(ExampleTokenizer):
    """Tokenizes records with a prompt style.

    A BOS token comes first if the tokenizer uses one, an EOS token ends the response.

    Args:
        tokenizer: of the model, a fast one or bytes.
        style: the words around questions and responses.
        max_length: of prompt and response together, in tokens. Where they are longer, the question loses its beginning, so
            that the response stays whole. A response that does not fit even so loses its end; the end of the question then
            gets up to half of the room. Prompts alone are never cut: an answer to half a question says nothing.

    Raises:
        UserError: the tokenizer does not tell where in the text its tokens stand.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: PromptStyle, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self.style = style
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._prefix = [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []
        self._suffix = [] if eos is None else [eos]

    def prompts(self, records: Sequence[Record]) -> Iterator[tuple[Prompt, list[int]]]:
        prompts = [self.style.evaluation(_single(record)) for record in records]
        for prompt, parts in zip(prompts, self._tokenize(prompts), strict=True):
            yield prompt, self._prefix + [token for part in parts for token in part]

    def response(self, output: str) -> str:
        return self.style.response(output)

    def key(self, records: Sequence[Record]) -> str:
        settings = [self._max_length, self._prefix, self._suffix]
        texts = (part for texts in self._batches(records) for parts in texts for part in parts)
        return cache_key(self._tokenizer, settings, texts)

    def _parts(self, record: Record) -> Sequence[str]:
        """Return the head, question, tail and response."""
        return (*self.style.training(_single(record)), self.style.response(record.output))

    def _fit(self, parts: Sequence[list[int]]) -> TokenizedExample:
        head, question, tail, response = parts
        room = self._max_length - len(self._prefix) - len(head) - len(tail)
        if room < 2:
            raise UserError(
                f"max_length={self._max_length} has no room for a question and a response: the prompt's own words take "
                f"{self._max_length - room} tokens of this tokenizer; give at least {self._max_length - room + 2}"
            )
        response = response + self._suffix
        question_room = room - len(response) if len(response) <= room else room // 2
        kept = question[max(0, len(question) - question_room) :]
        answered = response[: room - len(kept)]
        ids = [*self._prefix, *head, *kept, *tail, *answered]
        start = len(ids) - len(answered)
        return TokenizedExample(ids, ((start, len(ids)),), len(question) - len(kept), len(response) - len(answered))


def _single(record: Record) -> Record:
    if isinstance(record, Conversation):
        raise UserError(f"{record.where} has messages, a system message or tools; set prompt to chat, which renders them")
    return record


def _last_character(span: tuple[int, int]) -> int:
    """Return the place of a token's last character in the text. Spans may exclude white space, on the left in whole tokens."""
    return span[1] - 1
