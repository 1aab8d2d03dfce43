"""Chat templates: the tokenizer's own, one of a file, or a plain one; and where the responses stand in what they render."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from datamodules.instructions.reading.conversations import ASSISTANT, Message
from datamodules.instructions.reading.records import Conversation
from datamodules.shared.text_files import read_text
from fourier_moe.errors import UserError

PLAIN = "plain"

_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the mark of what the assistant says, which few templates have
_PROBE = "RESPONSE"
_render_jinja: Any = render_jinja_template  # whose types are those of its most common use


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: whose template, special tokens and rules are used.
        template: Jinja text, see `template_text`; None for the tokenizer's own.

    Raises:
        UserError: there is no template, or it is not valid.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._given = template
        try:
            self.text = tokenizer.get_chat_template(self._given)
        except ValueError as error:
            raise UserError(
                f"the tokenizer '{tokenizer.name_or_path or type(tokenizer).__name__}' has no chat template, which prompt chat "
                f"needs; give chat_template {PLAIN} (User: ... Assistant: ...), or the path of a Jinja file"
            ) from error
        try:
            _render_jinja([[]], chat_template=self.text)
        except TemplateSyntaxError as error:
            whose = "the tokenizer's chat template" if template is None else "chat_template"
            raise UserError(f"{whose} is not valid Jinja: {error.message}, in line {error.lineno}") from error
        except Exception:  # it may refuse an empty conversation
            pass
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self._special = tuple(token for token in special if token)
        self._empty = re.compile("(?:{})*".format("|".join([r"\s", *(re.escape(token) for token in special if token.strip())])))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = (), where: str = "a conversation") -> str:
        """Return what the assistant's next turn follows.

        Raises:
            UserError: the template refuses the messages.
        """
        self._check_tools(messages, tools, where)
        return self._render(messages, tools, where, generation_prompt=True)

    def parts(self, conversation: Conversation) -> list[str]:
        """Return the text of a conversation as context, response, context, ..., response.

        Raises:
            UserError: the template refuses the messages, does not render all of them, or changes what it has rendered when more
                follow.
        """
        messages, where = conversation.messages, conversation.where
        self._check_tools(messages, conversation.tools, where)
        text, spans = self._marked(conversation) if _GENERATION.search(self.text) else self._by_beginnings(conversation)
        for turn, (start, end) in zip(conversation.learned, spans, strict=True):
            self._check_response(text[start:end], messages[turn], f"{where}, message {turn + 1}")
        borders = [0, *(border for span in spans for border in span)]
        return [text[start:end] for start, end in pairwise(borders)]

    def around(self) -> tuple[str, str]:
        """Return what stands before and after the text of a response that ends a conversation.

        Raises:
            UserError: the template takes no simple conversation, with or without a system message.
        """
        messages: tuple[Message, ...] = ({"role": "user", "content": "Question"}, {"role": ASSISTANT, "content": _PROBE})
        try:
            *_, response = self.parts(Conversation("", "", "", "", messages, (1,)))
        except UserError:  # some templates want a system message
            messages = ({"role": "system", "content": "Instructions"}, *messages)
            *_, response = self.parts(Conversation("", "", "", "", messages, (2,)))
        before, _, after = response.partition(_PROBE)
        return before, after

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Any], where: str) -> None:
        text = self._tokenizer.get_chat_template(self._given, list(tools) or None)
        calls = any(message.get("tool_calls") for message in messages)
        for name, is_there in (("tools", bool(tools)), ("tool_calls", calls)):
            if is_there and not re.search(rf"\b{name}\b", text):
                raise UserError(
                    f"{where}: the conversation has {name}, which the chat template does not render; leave them out, or give "
                    "chat_template a Jinja file that does"
                )

    def _check_response(self, response: str, message: Message, where: str) -> None:
        """Refuse a response without anything that the message says."""
        content = message["content"].strip()  # which may be a special token
        if self._empty.fullmatch(response) and not (content and content in response):
            raise UserError(
                f"{where}: the chat template renders nothing of it, a response to learn; give another chat_template, or the "
                "message weight 0"
            )

    def _by_beginnings(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Find responses by rendering the beginnings of a conversation, for templates that mark nothing."""
        messages, tools, where = conversation.messages, conversation.tools, conversation.where
        whole = self._render(messages, tools, where)
        spans = []
        for turn in conversation.learned:
            before = self.prompt(messages[:turn], tools, where)
            through = self._render(messages[: turn + 1], tools, where) if turn + 1 < len(messages) else whole
            if not (through.startswith(before) and whole.startswith(through)):
                raise UserError(
                    f"{where}: the chat template renders the beginning of the conversation in another way once its message "
                    f"{turn + 1} follows or is followed, so that the assistant's tokens cannot be told; give chat_template "
                    f"{PLAIN}, or a file with the same template that marks them by {{% generation %}} and {{% endgeneration %}}"
                )
            response = through[len(before) :]
            if response.rstrip().endswith(self._special):  # the model stops there, and never writes the line end after it
                response = response.rstrip()
            spans.append((len(before), len(before) + len(response)))
        return whole, spans

    def _marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Find responses by the template's own marks."""
        where = conversation.where
        turns = [turn for turn, message in enumerate(conversation.messages) if message["role"] == ASSISTANT]
        try:
            (text,), (spans,) = _render_jinja(
                [list(conversation.messages)],
                tools=list(conversation.tools) or None,
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise _refused(where, error) from error
        if len(spans) != len(turns):
            raise UserError(
                f"{where}: the chat template marks {len(spans)} turns by {{% generation %}}, and the assistant has {len(turns)}"
            )
        return text, [span for turn, span in zip(turns, spans, strict=True) if turn in conversation.learned]

    def _render(self, messages: Sequence[Message], tools: Sequence[Any], where: str, *, generation_prompt: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=list(tools) or None,
                    chat_template=self._given,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template raises what it likes
            raise _refused(where, error) from error


def template_text(template: str) -> str:
    """Return the Jinja text of `plain`, or of the file that is named.

    Raises:
        UserError: there is no such file.
    """
    if template == PLAIN:
        return _PLAIN_TEMPLATE
    path = Path(template).expanduser()
    if not path.is_file():
        raise UserError(f"chat_template '{template}' is no file; give {PLAIN}, or the path of a Jinja file")
    text = read_text(path)
    if not text.strip():
        raise UserError(f"chat_template '{template}' is empty; give {PLAIN}, or the path of a Jinja file")
    return text


def _refused(where: str, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UserError(f"{where}: the chat template does not take the conversation ({reason})")
