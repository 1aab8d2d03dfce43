"""From prompts and responses to token ids, and what is cut where they are too long."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from datamodules.instructions.prompts import Prompt, PromptStyle
from datamodules.instructions.records import Record
from datamodules.shared.cache import cache_key
from fourier_moe.errors import UserError

_CHUNK = 2000  # tokenizers that are not in Python use all cores for a list of texts


@dataclass(frozen=True)
class TokenizedExample:
    """Prompt and response as one sequence.

    Attributes:
        ids: all token ids.
        prompt_length: how many of them are the prompt's.
        question_cut: tokens left out at the beginning of the question.
        response_cut: tokens left out at the end of the response (with its end-of-sequence token).
    """

    ids: list[int]
    prompt_length: int
    question_cut: int = 0
    response_cut: int = 0


class InstructionTokenizer:
    """Tokenizes records with a prompt style.

    Prompt and response are tokenized as one text, as they would be found in any other text; a token that reaches into the
    response is the response's. A BOS token comes first if the tokenizer uses one, an EOS token ends the response.

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
        if not (tokenizer.is_fast or isinstance(tokenizer, ByT5Tokenizer)):
            raise UserError(
                f"tokenizer: a {type(tokenizer).__name__} cannot tell where the prompt's tokens end; give one with a "
                "tokenizer.json, or bytes"
            )
        self._tokenizer = tokenizer
        self.style = style
        self._max_length = max_length
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._prefix = [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []
        self._suffix = [] if eos is None else [eos]

    def examples(self, records: Sequence[Record]) -> Iterator[TokenizedExample]:
        """Yield the training prompts with responses, at most `max_length` tokens each.

        Raises:
            UserError: `max_length` has no room beside the style's own words.
        """
        for texts in self._batches(records):
            for head, question, tail, response in self._tokenize(texts):
                yield self._fit(head, question, tail, response)

    def prompts(self, records: Sequence[Record]) -> Iterator[tuple[Prompt, list[int]]]:
        """Yield the evaluation prompts and their token ids."""
        prompts = [self.style.evaluation(record) for record in records]
        for prompt, parts in zip(prompts, self._tokenize(prompts), strict=True):
            yield prompt, self._prefix + [token for part in parts for token in part]

    def key(self, records: Sequence[Record]) -> str:
        """Return a name for the examples of these records: a hash of all that they depend on."""
        settings = [self._max_length, self._prefix, self._suffix]
        return cache_key(
            self._tokenizer, settings, (part for texts in self._batches(records) for parts in texts for part in parts)
        )

    def _batches(self, records: Sequence[Record]) -> Iterator[list[tuple[str, str, str, str]]]:
        """Yield the head, question, tail and response of some records at a time."""
        for start in range(0, len(records), _CHUNK):
            yield [
                (*self.style.training(record), self.style.response(record.output)) for record in records[start : start + _CHUNK]
            ]

    def _fit(self, head: list[int], question: list[int], tail: list[int], response: list[int]) -> TokenizedExample:
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
        return TokenizedExample(ids, len(ids) - len(answered), len(question) - len(kept), len(response) - len(answered))

    def _tokenize(self, texts: Sequence[Sequence[str]]) -> Iterator[list[list[int]]]:
        """Yield the token ids of each part of each text, without special tokens."""
        if not self._tokenizer.is_fast:  # in Python, without offsets: bytes, for which the parts are the same alone
            for parts in texts:
                yield [self._tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in parts]
            return
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            encoded = self._tokenizer(
                ["".join(parts) for parts in chunk], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            for parts, ids, spans in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                borders = [0, *(bisect_left(spans, end, key=_last_character) for end in accumulate(map(len, parts)))]
                yield [ids[start:end] for start, end in pairwise(borders)]


def _last_character(span: tuple[int, int]) -> int:
    """Return the place of a token's last character in the text. Spans may exclude white space, on the left in whole tokens."""
    return span[1] - 1
