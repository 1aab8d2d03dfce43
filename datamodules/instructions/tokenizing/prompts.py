"""How a question becomes the text that a model continues."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from datamodules.instructions.reading.records import Record


class Prompt(NamedTuple):
    """A prompt in three parts; only the question may be shortened."""

    head: str
    question: str
    tail: str

    @property
    def text(self) -> str:
        return "".join(self)


class PromptStyle(ABC):
    """The words around questions and responses."""

    @abstractmethod
    def training(self, record: Record) -> Prompt:
        """Return the prompt that `response` follows in training."""

    @abstractmethod
    def evaluation(self, record: Record) -> Prompt:
        """Return the prompt that the model answers."""

    @abstractmethod
    def response(self, output: str) -> str:
        """Return what follows the training prompt."""


class LLMAdaptersPrompt(PromptStyle):
    """The prompts of LLM-Adapters' scripts, with their white space, for figures that compare with published ones.

    Every line but the first is indented by 16 spaces. The blocks are separated by a line of 16 spaces in training and by an
    empty line in evaluation. The first line ends in two spaces in training and one in evaluation; with an input it ends in
    one space less, in both.
    """

    _INDENT = " " * 16

    def training(self, record: Record) -> Prompt:
        return self._prompt(record, line_end=" " if record.input else "  ", between=f"\n{self._INDENT}\n")

    def evaluation(self, record: Record) -> Prompt:
        return self._prompt(record, line_end="" if record.input else " ", between="\n\n")

    def response(self, output: str) -> str:
        return output

    def _prompt(self, record: Record, line_end: str, between: str) -> Prompt:
        described = "describes a task"
        if record.input:
            described += ", paired with an input that provides further context"
        first_line = f"Below is an instruction that {described}. Write a response that appropriately completes the request."
        question = record.instruction
        if record.input:
            question += f"{between}{self._header('Input')}{record.input}"
        return Prompt(
            f"{first_line}{line_end}\n\n{self._header('Instruction')}", question, f"{between}{self._header('Response')}"
        )

    def _header(self, name: str) -> str:
        return f"{self._INDENT}### {name}:\n{self._INDENT}"


class PlainPrompt(PromptStyle):
    """`Question: ...`, `Answer:`, a space and the response, the same in training and evaluation, in a few tokens.

    The prompt does not end in white space, so that its tokens are the beginning of the tokens of prompt and response together.
    """

    def training(self, record: Record) -> Prompt:
        parts = [part.strip() for part in (record.instruction, record.input) if part.strip()]
        return Prompt("Question: ", "\n".join(parts), "\nAnswer:")

    evaluation = training

    def response(self, output: str) -> str:
        return f" {output.strip()}"


STYLES: dict[str, PromptStyle] = {"llm_adapters": LLMAdaptersPrompt(), "plain": PlainPrompt()}
