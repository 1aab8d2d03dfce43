"""CausalLanguageModel: a decoder trained on responses and graded by the answers that it generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from transformers import PreTrainedModel

from fourier_moe.errors import UserError
from lightning_modules.tasks.backbones.hugging_face import (
    check_model,
    check_vocabulary,
    fetch_model,
    load_causal_language_model,
    load_fitting_tokenizer,
    save_hugging_face,
    tokenizer_name,
)
from lightning_modules.tasks.base import Batch, Evaluation, Task, TaskData, select
from lightning_modules.tasks.generation import GenerationSettings, generate, is_sharded, require_room
from lightning_modules.tasks.losses import IGNORED, LabelLosses, label_losses, log_likelihoods
from lightning_modules.tasks.packing import require_packing
from lightning_modules.tasks.padding import padded_right, real_tokens

GREEDY = GenerationSettings()


class CausalLanguageModel(Task):
    """Adapt a decoder (LLaMA, Gemma, Qwen) and grade its answers to the prompts of benchmarks.

    A batch has `input_ids`, `attention_mask` and `labels` (-100 for no loss), padded on either side; packed rows have
    `position_ids`, too, which begin again with every example. For evaluation it has `prompt_ids` and `prompt_mask`, padded on
    the left, and for each example `prompt`, `answer`, `benchmark` (its `grade` finds the answer in a text), `choices` and
    `responses` (the text of each choice), perhaps `end_tokens` (ids that end an answer).

    Args:
        model: name on the Hugging Face hub, or directory of a model.
        tokenizer: name or directory of the data's tokenizer, `bytes`, or null for the model's own.
        evaluation: how answers are generated.
        scoring: `generate`: the model writes text, in which the benchmark's rule finds the answer, as in LLM-Adapters and the
            paper. `likelihood`: the answer is the choice with the most probable response after the prompt (sum over its
            tokens), as in lm-evaluation-harness; faster, never without an answer, and not comparable with `generate`.
        generate_in_validation: also generate and grade answers in validation, which is slow; otherwise validation computes the
            loss and the token accuracy of the known responses.
        dtype: of the frozen weights: float32, bfloat16 or float16. Adapters stay in float32.
        quantization: `int8` or `nf4` (4 bits) for the linear layers of the frozen model, null for none; embeddings, norms, the
            output layer and activations keep `dtype`. Needs bitsandbytes.
        tiny: use an untrained model with 2 layers of width 256 that reads bytes (configs/smoke.yaml).
        attn_implementation: attention in transformers: `eager`, `sdpa`, `flash_attention_2` (needs flash-attn and a 16-bit
            dtype), ...; null for its own choice.
        loss_chunk_size: labels whose logits exist at the same time, for large vocabularies; the backward pass computes logits
            again. null for all.

    Attributes:
        finished: `output` and `loss` by id from an interrupted evaluation; these examples are graded, not answered again.

    Raises:
        UserError: for an unknown scoring, dtype or quantization, an impossible loss_chunk_size, a missing package, or a
            directory without a model.
    """

    main_metric = "accuracy"
    pipeline_tag = "text-generation"
    batch_keys = ("input_ids", "attention_mask", "labels")

    def __init__(
        self,
        model: str = "meta-llama/Llama-2-7b-hf",
        tokenizer: str | None = None,
        evaluation: GenerationSettings = GREEDY,
        scoring: Literal["generate", "likelihood"] = "generate",
        generate_in_validation: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantization: Literal["int8", "nf4"] | None = None,
        tiny: bool = False,
        attn_implementation: str | None = None,
        loss_chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_model(model, dtype, quantization)
        if scoring not in ("generate", "likelihood"):
            raise UserError(f"scoring={scoring!r} must be 'generate' or 'likelihood'")
        self.model_name, self.dtype, self.quantization, self.tiny = model, dtype, quantization, tiny
        self.attn_implementation, self.loss_chunk_size = attn_implementation, loss_chunk_size
        if loss_chunk_size is not None and loss_chunk_size < 1:
            raise UserError(f"loss_chunk_size={loss_chunk_size} must be 1 or more, or null")
        self.tokenizer_name = tokenizer or tokenizer_name(model, tiny)
        self.evaluation, self.scoring, self.generate_in_validation = evaluation, scoring, generate_in_validation
        self.finished: Mapping[str, dict[str, Any]] = {}

    @property
    def works_untrained(self) -> bool:
        return True

    def arguments(self) -> dict[str, Any]:
        return {"model": self.model_name, "dtype": self.dtype, "quantization": self.quantization, "tiny": self.tiny}

    def fetch(self) -> None:
        if not self.tiny:
            fetch_model(self.model_name)

    def build(self, num_classes: int | None = None, class_names: Sequence[str] | None = None) -> PreTrainedModel:
        """Load the model and its tokenizer; see Task.

        Raises:
            UserError: if one of them cannot be loaded, or the tokenizer is another model's.
        """
        self.tokenizer = load_fitting_tokenizer(self.tokenizer_name, self.model_name, self.tiny)
        self.model = load_causal_language_model(**self.arguments(), attn_implementation=self.attn_implementation)
        check_vocabulary(self.tokenizer, self.tokenizer_name, self.model, self.model_name)
        return self.model

    def check(self, loaders: Sequence[Any]) -> None:
        """Check the first example of every set; see Task.

        Raises:
            UserError: if `scoring` is likelihood and a benchmark has no choices, if answers are not generated in validation and
                a set has no known responses, or if a prompt leaves no room for an answer.
        """
        for loader in loaders:
            if self._grades and (longest := getattr(loader.dataset, "longest_prompt", 0)):
                require_room(self.model, longest, "the longest prompt of an evaluation set")
            batch = loader.collate_fn([loader.dataset[0]])
            if self._grades and self.scoring == "likelihood":
                _require_choices(batch)
            elif not self._grades and "labels" not in batch:
                raise UserError(
                    f"validation needs known responses, and {batch['benchmark'][0].name} has none; set "
                    "model.task.generate_in_validation to true, or leave the set out of data.validation_sets"
                )

    def check_training(self, data: TaskData) -> None:
        """Check that the model keeps packed examples apart; see Task.

        Raises:
            UserError: if it does not.
        """
        if "position_ids" in getattr(data, "batch_keys", ()):
            require_packing(self.model, data.batch_size)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean over the label tokens of the batch."""
        losses = self._label_losses(batch)
        return losses.loss.sum() / losses.num_labels.sum().clamp(min=1)

    def loss_weight(self, batch: Batch) -> Tensor:
        """Return the number of label tokens without the first token of each example, which nothing predicts."""
        return (padded_right(batch, "labels")["labels"][:, 1:] != IGNORED).sum()

    def token_mask(self, batch: Batch) -> Tensor:
        return real_tokens(batch["attention_mask"])

    def save_model(self, directory: Path, class_names: Sequence[str] | None) -> None:
        save_hugging_face(self.model, self.tokenizer_name, directory, self.tokenizer.chat_template)

    def new_metrics(self) -> MetricCollection:
        names = ["accuracy", "strict_accuracy"] if self._grades else ["token_accuracy"]
        # Compute groups would merge metrics that agree on the first batch.
        return MetricCollection({name: Share(name) for name in names}, compute_groups=False)

    def evaluate(self, batch: Batch) -> Evaluation:
        """Grade answers; in validation without generation, score only the known responses."""
        if not self._grades:
            losses = self._label_losses(batch)
            count = losses.num_labels.clamp(min=1)
            return Evaluation({"token_accuracy": losses.num_correct / count}, losses.loss / count)
        rows = self.predict(batch)
        device = batch["prompt_ids"].device
        loss = torch.tensor([row["loss"] for row in rows], device=device) if "labels" in batch else None
        graded = {"accuracy": "correct", "strict_accuracy": "strict_correct"}
        inputs = {name: torch.tensor([float(row[key]) for row in rows], device=device) for name, key in graded.items()}
        prediction = inputs["accuracy"].long()
        return Evaluation(inputs, loss, rows, prediction, torch.ones_like(prediction))

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        """Generate and grade an answer to every prompt.

        Returns:
            Rows with id, benchmark, prompt, output (the generated text), extracted (the answer found in it, or None), answer
            (the correct one), correct, strict_extracted, strict_correct (by the benchmark's stricter rule), and loss: the mean
            over the label tokens of the known response, in nats, or None.

        Raises:
            UserError: if `scoring` is likelihood and a benchmark has no choices.
        """
        wanted = self._unfinished(batch)
        answers = dict(zip(wanted, self._answer(select(batch, wanted)), strict=True)) if wanted else {}
        for row, id_ in enumerate(batch["id"]):
            if row not in answers:
                answers[row] = self.finished[id_]["output"], self.finished[id_]["loss"]
        texts = zip(*(batch[name] for name in _TEXTS), strict=True)
        return [_row(answers[row], *text) for row, text in enumerate(texts)]

    def settings(self) -> dict[str, Any]:
        """Return what the answers depend on, in addition to the weights."""
        names = ("model_name", "dtype", "quantization", "tiny", "tokenizer_name", "scoring")
        return {name: getattr(self, name) for name in names} | {"evaluation": asdict(self.evaluation)}

    @property
    def _grades(self) -> bool:
        """Whether answers are generated and graded in the current split."""
        return self.split != "val" or self.generate_in_validation

    def _label_losses(self, batch: Batch) -> LabelLosses:
        if self.loss_chunk_size is not None and self.model is not None and is_sharded(self.model):
            raise UserError("loss_chunk_size does not work with FSDP2, which gathers the output layer once; set it to null")
        inputs = padded_right(batch, "input_ids", "labels", "position_ids")
        return label_losses(self.model, **inputs, chunk_size=self.loss_chunk_size)

    def _unfinished(self, batch: Batch) -> list[int]:
        """Return the examples to answer. With a sharded model all processes answer all examples if any is missing anywhere."""
        missing = [row for row, id_ in enumerate(batch["id"]) if id_ not in self.finished]
        assert self.model is not None, "build() comes first"
        if not is_sharded(self.model):
            return missing
        anywhere = torch.tensor(len(missing), device=batch["prompt_ids"].device)
        torch.distributed.all_reduce(anywhere)
        return list(range(len(batch["id"]))) if anywhere else []

    def _answer(self, batch: Batch) -> list[tuple[str, float | None]]:
        """Return the output and the loss of every example."""
        prompts = (batch["prompt_ids"], batch["prompt_mask"])
        if self.scoring == "likelihood":
            _require_choices(batch)
            scores = log_likelihoods(self.model, self.tokenizer, batch["prompt"], *prompts, batch["responses"])
            outputs = [texts[int(score.argmax())] for texts, score in zip(batch["responses"], scores, strict=True)]
        else:
            end_tokens = {token for tokens in batch.get("end_tokens", ()) for token in tokens}
            outputs = generate(self.model, self.tokenizer, *prompts, self.evaluation, end_tokens=end_tokens)
        losses: list[float | None] = [None] * len(outputs)
        if "labels" in batch:
            known = self._label_losses(batch)
            losses = (known.loss / known.num_labels.clamp(min=1)).tolist()
        return list(zip(outputs, losses, strict=True))


class Share(MeanMetric):
    """Mean of one of the metric inputs."""

    plot_upper_bound = 1.0

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def update(self, **inputs: Tensor) -> None:  # type: ignore[override]
        super().update(inputs[self.name])


_TEXTS = ("id", "benchmark", "prompt", "answer")


def _row(written: tuple[str, float | None], id_: str, benchmark: Any, prompt: str, answer: str) -> dict[str, Any]:
    output, loss = written
    grade = benchmark.grade(output, answer)
    return {
        "id": id_,
        "benchmark": benchmark.name,
        "prompt": prompt,
        "output": output,
        "extracted": grade.extracted,
        "answer": answer,
        "correct": grade.correct,
        "strict_extracted": grade.strict_extracted,
        "strict_correct": grade.strict_correct,
        "loss": loss,
    }


def _require_choices(batch: Batch) -> None:
    for benchmark, choices in zip(batch["benchmark"], batch["choices"], strict=True):
        if not choices:
            raise UserError(f"scoring='likelihood' compares choices, and {benchmark.name} has none; use scoring='generate'")
