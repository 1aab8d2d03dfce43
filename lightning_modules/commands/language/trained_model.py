"""A trained adapter on its language model, and the prompt that it was trained with, found from the adapter's directory."""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.instructions.reading.records import Record, question_text
from datamodules.instructions.tokenizing.chat import ChatTokenizer
from datamodules.instructions.tokenizing.prompts import STYLES, Prompt, PromptStyle
from datamodules.instructions.tokenizing.templates import template_text
from datamodules.instructions.tokenizing.text import InstructionTokenizer
from fourier_moe import AdapterDescription, describe_adapter, load_adapter
from fourier_moe.errors import UserError
from fourier_moe.files.format import TENSORS
from fourier_moe.files.hub import local_directory
from lightning_modules.cli.config_files import update
from lightning_modules.tasks import CausalLanguageModel, GenerationSettings, Task
from lightning_modules.tasks.generation import Sampling, generate, require_room

Style = Literal["llm_adapters", "plain", "chat", "none"]
Dtype = Literal["float32", "bfloat16", "float16"]
Message = dict[str, str]  # `role` and `content`


class AsItStands(PromptStyle):
    """The question alone."""

    def training(self, record: Record) -> Prompt:
        return Prompt("", "\n".join(part for part in (record.instruction, record.input) if part), "")

    evaluation = training

    def response(self, output: str) -> str:
        return output


@dataclass(frozen=True)
class TrainedModel:
    """A language model with its adapter.

    Attributes:
        task: the run's task, with the model and the tokenizer.
        style: the prompt around questions: of a DataModule's `prompt`, `chat` for the tokenizer's chat template, `none`.
        run: the run's directory; None for an adapter without one.
        chat: renders conversations, for `chat`.
    """

    task: CausalLanguageModel
    style: Style
    run: Path | None
    chat: ChatTokenizer | None = None

    @property
    def prompt_style(self) -> PromptStyle:
        """The words around questions, for all styles but `chat`."""
        return STYLES.get(self.style) or AsItStands()

    def encode(self, question: Record, history: Sequence[Message] = ()) -> list[int]:
        """Return the tokens of the prompt around a question: the same as in `test` for the style of the training.

        Args:
            question: its instruction and input.
            history: earlier messages, for `chat`.

        Raises:
            UserError: if they leave no room for an answer in what the model can read.
        """
        if self.chat is not None:
            ids = self.chat.encode([*history, {"role": "user", "content": question_text(question)}])
        else:
            coder = InstructionTokenizer(self.task.tokenizer, self.prompt_style, max_length=2)  # prompts alone are never cut
            ((_, ids),) = coder.prompts([question])
        require_room(self.task.model, len(ids), "the prompt")
        return ids

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        sampling: Sampling | None = None,
        streamer: Any = None,
    ) -> list[str]:
        """Return the text that follows each prompt, given as tokens; other arguments as for `generate`."""
        model: Any = self.task.model
        ids = _left_padded(prompts, self.task.tokenizer.pad_token_id).to(model.device)
        mask = _left_padded([[1] * len(prompt) for prompt in prompts], 0).to(model.device)
        end_tokens = self.chat.end_tokens if self.chat is not None else ()
        return generate(model, self.task.tokenizer, ids, mask, settings, sampling, streamer, end_tokens)


def question_of(instruction: str, context: str = "") -> Record:
    """Return a question without an answer."""
    return Record(instruction, context, output="", answer="")


def _left_padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side="left")


def load_trained(
    adapter: str,
    *,
    model: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    style: Style | None = None,
    without_adapter: bool = False,
) -> TrainedModel:
    """Load a trained adapter on its language model, as its run's config.yaml says.

    Args:
        adapter: a run's directory, an adapter's, or `hf://owner/name[@revision]`.
        model: name or directory of the base model, where the config names none, or one that has moved.
        dtype: of the base model's weights; None for the config's, float32 without one.
        device: None for a GPU where there is one.
        style: None for that of the training, or, where neither adapter nor config tells it, `chat` if the tokenizer has a chat
            template, otherwise `none`.
        without_adapter: load the base model alone.

    Raises:
        UserError: if there is no adapter, it is not a causal language model's, or its base model cannot be loaded.
    """
    directory, run = _find(adapter)
    config = _config_of(run)
    if method := config.get("model", {}).get("adapter", {}).get("class_path"):
        pydoc.locate(method)  # a method of one's own is known once its module is imported
    description = describe_adapter(directory)
    kind, tag = description.task.get("class"), description.task.get("pipeline_tag")
    if tag not in (None, CausalLanguageModel.pipeline_tag):
        raise UserError(f"--adapter {adapter} was trained for {kind}; an adapter of a causal language model is needed")
    task = _build(_task_config(adapter, description, config, model, dtype), adapter, model)
    if not without_adapter:
        load_adapter(task.model, directory)  # type: ignore[arg-type] # built
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    task.model.to(place).eval()  # type: ignore[union-attr]

    data = config.get("data", {}).get("init_args", {})
    trained: Any = description.task.get("prompt") or data.get("prompt")
    template = description.task.get("chat_template")
    if template is None and data.get("chat_template"):  # of an adapter that was written without it
        template = template_text(data["chat_template"])
    if template is not None:
        task.tokenizer.chat_template = template
    has_template = bool(task.tokenizer.chat_template)
    if style == "chat" and not has_template:
        raise UserError("--style chat: the tokenizer has no chat template; choose llm_adapters, plain or none")
    chosen: Style = style or trained or ("chat" if has_template else "none")
    source = "--style" if style else "as in training" if trained else "its training is not known; --style chooses another"
    weights = "no adapter" if without_adapter else f"{type(description.config).__name__} of {directory}"
    own = ", by the tokenizer's own template" if chosen == "chat" and template is None else ""
    rank_zero_info(f"{description.backbone}, {weights}; prompt: {chosen} ({source}{own})")
    coder = ChatTokenizer(task.tokenizer, None, max_length=2) if chosen == "chat" else None
    return TrainedModel(task, chosen, run, coder)


def _find(adapter: str) -> tuple[Path, Path | None]:
    """Return an adapter's directory, and that of its run, which has a config.yaml."""
    path = local_directory(adapter)
    places = [path, path / "adapter", path / "adapter_last"]
    directory = next((place for place in places if (place / TENSORS).is_file()), None)
    if directory is None:
        what = "has no adapter" if path.is_dir() else "does not exist"
        raise UserError(
            f"--adapter {adapter} {what}; give a run's directory (runs/NAME/version_0) or what fit wrote to RUN/adapter"
        )
    return directory, next((place for place in (directory, directory.parent) if (place / "config.yaml").is_file()), None)


def _config_of(run: Path | None) -> dict[str, Any]:
    """Return the config of a run; empty if there is none, or what is there belongs to something else."""
    if run is None:
        return {}
    try:
        config = yaml.safe_load(update((run / "config.yaml").read_text(encoding="utf-8"), Path.cwd()))
        config["model"]["task"]["init_args"].keys()
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return {}
    return dict(config)


def _task_config(
    adapter: str, description: AdapterDescription, config: Mapping[str, Any], model: str | None, dtype: str | None
) -> dict[str, Any]:
    """Return class_path and init_args of the task."""
    without: dict[str, Any] = {"class_path": "lightning_modules.tasks.CausalLanguageModel", "init_args": {}}
    task = config["model"]["task"] if config else without
    arguments = dict(task["init_args"])
    if model:
        if arguments.get("tokenizer") == arguments.get("model"):
            arguments["tokenizer"] = None  # of the given model
        arguments["model"] = model
    elif not config:
        if description.backbone_revision is None:  # then its name is none of the hub's
            raise UserError(
                f"--adapter {adapter} has no run's config.yaml; give its base model ({description.backbone}): --model DIR"
            )
        arguments["model"] = description.backbone
    if dtype:
        arguments["dtype"] = dtype
    return {"class_path": task["class_path"], "init_args": arguments}


def _build(spec: Mapping[str, Any], adapter: str, model: str | None) -> CausalLanguageModel:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    try:
        task = parser.instantiate(parser.parse_object({"task": dict(spec)})).task
        if not isinstance(task, CausalLanguageModel):
            raise UserError(
                f"--adapter {adapter} was trained for {type(task).__name__}; an adapter of a causal language model is needed"
            )
        task.build()
    except ArgumentError as error:
        raise UserError(f"--adapter {adapter}: the config.yaml of its run: {' '.join(str(error).split())}") from error
    except UserError as error:
        hint = "" if model else "; --model DIR tells where the base model is"
        raise UserError(f"--adapter {adapter}: {error}{hint}") from error
    return task
