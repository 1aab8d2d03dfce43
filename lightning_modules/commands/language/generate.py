"""`python train.py generate`: what a trained language model answers to a prompt, or to a file of prompts."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch.utilities import rank_zero_info

from datamodules.instructions.reading.records import Record
from datamodules.shared.json_items import SUFFIXES, read_items, shorten
from datamodules.shared.text_files import read_text
from fourier_moe.errors import UserError
from lightning_modules.commands.language.trained_model import Dtype, Style, load_trained, question_of
from lightning_modules.interruption import require_new, require_writable
from lightning_modules.tasks import GenerationSettings
from lightning_modules.tasks.generation import Sampling


def generate(
    *,
    adapter: str,
    prompt: str = "",
    prompts: str | None = None,
    output: str | None = None,
    batch_size: PositiveInt = 8,
    max_new_tokens: PositiveInt = 256,
    temperature: NonNegativeFloat = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    style: Style | None = None,
    model: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    without_adapter: bool = False,
) -> list[str]:
    """Answer a prompt, or a file of prompts, with a trained language model.

    Args:
        adapter: a run's directory, an adapter's, or `hf://owner/name[@revision]`.
        prompt: a question; the prompt of the training is put around it.
        prompts: a file of questions: one a line, or a .json or .jsonl file of texts, or of objects with `prompt` or
            `instruction`, and perhaps `input`.
        output: a new file for the answers, JSON lines with `prompt` and `output`; by default they are printed.
        batch_size: prompts answered at once.
        max_new_tokens: length at which an answer without end is cut off.
        temperature: 0 takes the most probable token; above 0, tokens are drawn.
        top_p: share of the probability that tokens are drawn from.
        seed: of the drawing.
        style: prompt around a question: `llm_adapters`, `plain`, `chat` (the tokenizer's chat template) or `none`; by default
            that of the training.
        model: name or directory of the base model, if it is not where the run's config says.
        dtype: of the base model's weights; by default the run's.
        device: cpu, cuda, ...; by default a GPU where there is one.
        without_adapter: answer with the base model alone.

    Returns:
        The answers.

    Raises:
        UserError: if a prompt is empty or too long, the adapter is missing or not a language model's, or `output` exists.
    """
    questions = _questions(prompt, prompts)
    sampling = sampling_of(temperature, top_p)
    if output is not None:
        require_new(output, "--output", "file")
        require_writable(Path(output).parent, "--output")
    trained = load_trained(adapter, model=model, dtype=dtype, device=device, style=style, without_adapter=without_adapter)
    encoded = [trained.encode(question) for question in questions]
    settings = GenerationSettings(max_new_tokens)
    torch.manual_seed(seed)
    answers: list[str] = []
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(output, "x", encoding="utf-8") if output is not None else nullcontext() as file:
        for start in range(0, len(encoded), batch_size):
            new = trained.answer(encoded[start : start + batch_size], settings, sampling)
            for question, answer in zip(questions[start:], new, strict=False):
                asked = {"prompt": question.instruction, **({"input": question.input} if question.input else {})}
                row = json.dumps({**asked, "output": answer}, ensure_ascii=False)
                print(answer if file is None and prompts is None else row, file=file, flush=True)
            answers += new
    if output is not None:
        rank_zero_info(f"{len(answers):,} answers written to {output}")
    return answers


def sampling_of(temperature: float, top_p: float) -> Sampling | None:
    """Return how tokens are drawn; None for temperature 0.

    Raises:
        UserError: for impossible values, and `top_p` where nothing is drawn.
    """
    if temperature:
        return Sampling(temperature, top_p)
    if top_p != 1:
        raise UserError(f"--top_p {top_p} needs a --temperature above 0: without one the most probable token is taken")
    return None


def _questions(prompt: str, prompts: str | None) -> list[Record]:
    if bool(prompt.strip()) == bool(prompts):
        both = " and --prompts are two sources; give one of them" if prompts else " is empty; give a text, or --prompts FILE"
        raise UserError(f"--prompt{both}")
    if not prompts:
        return [question_of(prompt)]
    path = Path(prompts)
    if not path.is_file():
        raise UserError(f"--prompts {prompts} does not exist")
    if path.suffix in SUFFIXES:
        found = [_question(item, where) for where, item in read_items(path)]
    else:
        found = [question_of(line) for line in read_text(path).splitlines() if line.strip()]
    if not found:
        raise UserError(f"--prompts {prompts} has no prompts")
    return found


def _question(item: object, where: str) -> Record:
    fields = item if isinstance(item, dict) else {"prompt": item}
    text, context = fields.get("prompt", fields.get("instruction")), fields.get("input") or ""
    if not isinstance(text, str) or not text.strip() or not isinstance(context, str):
        raise UserError(f"{where} is {shorten(item)}; expected a text, or an object with `prompt` or `instruction`")
    return question_of(text, context)
