"""Conversations, and questions as conversations of two messages, as token ids by a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from datamodules.instructions.reading.conversations import ASSISTANT, Message
from datamodules.instructions.reading.records import Conversation, Record, question_text
from datamodules.instructions.tokenizing.prompts import Prompt
from datamodules.instructions.tokenizing.templates import ChatTemplate
from datamodules.instructions.tokenizing.text import ExampleTokenizer, TokenizedExample
from datamodules.shared.cache import cache_key
from fourier_moe.errors import UserError

CHAT = "chat"  # the prompt style


class ChatTokenizer(ExampleTokenizer):
    """Tokenizes records with a chat template, which also writes the tokens that begin and end texts and turns.

    Args:
        tokenizer: of the model, a fast one or bytes.
        template: Jinja text, see `template_text`; None for the tokenizer's own.
        max_length: of a conversation in training, in tokens. A longer one loses its end. Where not even the first response
            fits, the beginning goes instead, down to a quarter of the room, and then the end of that response: there is always
            something to learn.

    Raises:
        UserError: there is no template, or the tokenizer does not tell where in the text its tokens stand.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self._template = ChatTemplate(tokenizer, template)
        self._before, after = self._around()
        last = tokenizer(after.strip(), add_special_tokens=False)["input_ids"][:1]
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self.end_tokens = tuple(token for token in last if token in special)

    def prompts(self, records: Sequence[Record]) -> Iterator[tuple[Prompt, list[int]]]:
        conversations = [_conversation(record) for record in records]
        texts = [self._template.prompt(one.messages[:-1], one.tools, one.where) for one in conversations]
        bos = self._tokenizer.bos_token or ""
        for text, (ids,) in zip(texts, self._tokenize([(text,) for text in texts]), strict=True):
            yield Prompt("", text.removeprefix(bos), ""), ids

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of what the assistant's next turn follows.

        Raises:
            UserError: the template refuses the messages.
        """
        ((ids,),) = self._tokenize([(self._template.prompt(messages),)])
        return ids

    def response(self, output: str) -> str:
        return self._before + output

    def key(self, records: Sequence[Record]) -> str:
        """Return a name for the examples of these records, without rendering them."""
        settings = [self._max_length, self._template.text]
        conversations = map(_conversation, records)
        texts = (json.dumps([one.messages, one.learned, one.tools], default=str) for one in conversations)  # times in parquet
        return cache_key(self._tokenizer, settings, texts)

    def _around(self) -> tuple[str, str]:
        try:
            return self._template.around()
        except UserError as error:  # the records will tell
            rank_zero_warn(f"where a turn ends is unknown, so answers end only at the tokenizer's end token: {error}")
            return "", ""

    def _parts(self, record: Record) -> Sequence[str]:
        return self._template.parts(_conversation(record))

    def _fit(self, parts: Sequence[list[int]]) -> TokenizedExample:
        ids, responses = list[int](), []
        for number, part in enumerate(parts):
            if number % 2:
                responses.append((len(ids), len(ids) + len(part)))
            ids += part
        start, end = responses[0]
        if end > self._max_length:
            return self._fit_first(ids[:start], ids[start:end])
        kept = [(start, min(end, self._max_length)) for start, end in responses if start < self._max_length]
        cut = sum(end - start for start, end in responses) - sum(end - start for start, end in kept)
        return TokenizedExample(ids[: kept[-1][1]], tuple(kept), response_cut=cut)

    def _fit_first(self, context: list[int], response: list[int]) -> TokenizedExample:
        """Return the example of a first turn that is too long."""
        begin = context[:1] if context[:1] == [self._tokenizer.bos_token_id] else []
        room = self._max_length - len(begin)
        kept = context[max(len(begin), len(context) - max(room - len(response), room // 4)) :]
        answered = response[: room - len(kept)]
        ids = [*begin, *kept, *answered]
        return TokenizedExample(
            ids,
            ((len(ids) - len(answered), len(ids)),),
            len(context) - len(begin) - len(kept),
            len(response) - len(answered),
        )


def _conversation(record: Record) -> Conversation:
    """Return a question with its response as a conversation."""
    if isinstance(record, Conversation):
        return record
    question = question_text(record)
    messages = ({"role": "user", "content": question}, {"role": ASSISTANT, "content": record.output})
    where = f"the question {json.dumps(question[:40], ensure_ascii=False)}"
    return Conversation(record.instruction, record.input, record.output, record.answer, messages, (1,), where=where)
