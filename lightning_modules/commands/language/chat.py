"""`python train.py chat`: a conversation with a trained language model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from transformers import TextStreamer

from fourier_moe.errors import UserError
from lightning_modules.commands.language.generate import sampling_of
from lightning_modules.commands.language.trained_model import Dtype, Message, Style, load_trained, question_of
from lightning_modules.tasks import GenerationSettings


def chat(
    *,
    adapter: str,
    system: str = "",
    max_new_tokens: PositiveInt = 256,
    temperature: NonNegativeFloat = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    style: Style | None = None,
    model: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    without_adapter: bool = False,
) -> list[Message]:
    """Talk to a trained language model: a line is a message. /reset forgets the conversation, /quit or Ctrl-D ends it.

    With the tokenizer's chat template the model reads the whole conversation. With the prompt of an instruction data set, which
    has one question and one answer, it reads each message by itself. Ctrl-C stops an answer.

    Args:
        adapter: a run's directory, an adapter's, or `hf://owner/name[@revision]`.
        system: system message of the chat template.
        max_new_tokens: length at which an answer without end is cut off.
        temperature: 0 takes the most probable token; above 0, tokens are drawn.
        top_p: share of the probability that tokens are drawn from.
        seed: of the drawing.
        style: prompt around a message: `chat` (the tokenizer's chat template), `llm_adapters`, `plain` or `none`; by default
            that of the training.
        model: name or directory of the base model, if it is not where the run's config says.
        dtype: of the base model's weights; by default the run's.
        device: cpu, cuda, ...; by default a GPU where there is one.
        without_adapter: talk to the base model alone.

    Returns:
        The messages since the last /reset.

    Raises:
        UserError: if the adapter is missing or not a language model's, or a system message has no chat template.
    """
    sampling = sampling_of(temperature, top_p)
    trained = load_trained(adapter, model=model, dtype=dtype, device=device, style=style, without_adapter=without_adapter)
    if system and trained.style != "chat":
        raise UserError(f"--system needs the tokenizer's chat template (--style chat), not the prompt {trained.style}")
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    settings, messages = GenerationSettings(max_new_tokens), [*start]
    torch.manual_seed(seed)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 # gives `input` a history and line editing
    while (text := _read()) not in (None, "/quit"):
        if text == "/reset":
            messages = [*start]
        elif text:
            try:
                prompt = trained.encode(question_of(text), messages)
                streamer = _Answer(trained.task.tokenizer)
                (answer,) = trained.answer([prompt], settings, sampling, streamer)
            except UserError as error:
                print(f"{error}" + (", or /reset" if messages != start else ""))
            except KeyboardInterrupt:
                print()
            else:
                messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return messages


def _read() -> str | None:
    """Return the next line without surrounding white space; None at the end, or after Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return None


class _Answer(TextStreamer):
    """Print an answer word by word, without white space before it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self._begun else text.lstrip()
        self._begun |= bool(text)
        super().on_finalized_text(text, stream_end)
