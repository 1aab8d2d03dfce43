"""Messages of a conversation, in the form of the hub and OpenAI (role, content) or of ShareGPT (from, value)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.shared.json_items import shorten
from fourier_moe.errors import UserError

Message = Mapping[str, Any]

ASSISTANT = "assistant"
COLUMNS = ("messages", "conversations")  # what the column of conversations is called where no name is given

_ROLES = {
    **{role: role for role in ("system", "developer", "user", ASSISTANT, "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "bard", "bing", "model"), ASSISTANT),
    **dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool"),
}
_FORMS = (("role", "content"), ("from", "value"))


def parse_messages(value: object, where: str) -> tuple[Message, ...]:
    """Return messages with `role` (system, developer, user, assistant or tool) and `content` (text), and what else they have.

    Args:
        value: a list of messages.
        where: its record, for errors.

    Raises:
        UserError: it is no such list, a role is unknown, or a content is not text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{where}: the conversation is {shorten(value)}; expected a list of messages")
    return tuple(_message(item, f"{where}, message {number}") for number, item in enumerate(value, start=1))


def parse_objects(value: object, where: str) -> list[Mapping[str, Any]]:
    """Return a list of objects, which may be written as JSON text; an empty one for a missing value.

    Args:
        value: the list, or its text.
        where: its name, for errors.

    Raises:
        UserError: it is no such list.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            found = value
    if found is None:
        return []
    if isinstance(found, list | tuple) and all(isinstance(item, Mapping) for item in found):
        return list(found)
    raise UserError(f"{where} is {shorten(value)}; expected a list of objects, or one as JSON text")


def learned_turns(messages: Sequence[Message]) -> list[int]:
    """Return the positions of the assistant's turns that have a loss.

    Not those without text and tool calls, those with `weight` 0 (as OpenAI marks them), and one that begins the conversation,
    which answers nothing.
    """
    return [
        turn
        for turn, message in enumerate(messages)
        if turn and message["role"] == ASSISTANT and message.get("weight") != 0
        if message["content"].strip() or message.get("tool_calls")
    ]


def _message(item: object, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"{where} is {shorten(item)}; expected an object with role and content")
    form = next((form for form in _FORMS if form[0] in item), None)
    if form is None:
        raise UserError(f"{where} has no role and no from; its fields are {', '.join(map(str, item)) or 'none'}")
    role, content = (item.get(name) for name in form)
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise UserError(f"{where}: the role {shorten(role)} is unknown; expected one of {', '.join(_ROLES)}")
    others = {name: value for name, value in item.items() if name not in form and value is not None}
    if calls := parse_objects(others.pop("tool_calls", None), f"{where}: tool_calls"):
        others["tool_calls"] = calls
    return {"role": known, "content": _text(content, where), **others}


def _text(content: object, where: str) -> str:
    """Return the text of a content, which may be a list of parts."""
    if content is None:  # beside tool calls, or a missing value
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise UserError(f"{where}: the content is {shorten(content)}; expected text, or a list of parts of the type text")
