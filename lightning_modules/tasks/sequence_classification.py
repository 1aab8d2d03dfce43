"""SequenceClassification: any Hugging Face model with a sequence classification head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from datamodules.shared.tokenizers import load_tokenizer
from fourier_moe.errors import UserError
from lightning_modules.tasks.backbones.hugging_face import (
    check_model,
    check_vocabulary,
    fetch_model,
    load_fitting_tokenizer,
    load_sequence_classifier,
    save_hugging_face,
    tokenizer_name,
)
from lightning_modules.tasks.backbones.quantization import modules_outside_body
from lightning_modules.tasks.base import Batch, Evaluation, Task, TaskData
from lightning_modules.tasks.class_ranges import class_rows, evaluate_classes, own_classes_only, require_two_classes
from lightning_modules.tasks.heads import cast_to_float32, reading_heads
from lightning_modules.tasks.padding import padded_right, real_tokens
from lightning_modules.tasks.scores import F1, Matthews

# Classifiers whose head sees all tokens. transformers then selects the last one by comparing ids with a padding token. Most
# of them call their head `score`; these do not.
_OTHER_LAST_TOKEN_READERS = ("ctrl", "modernbert-decoder")
_FIRST_TOKEN_READERS = ("cohere_compass_text",)  # calls its head `score`, but reads the first token


class SequenceClassification(Task):
    """Classify sentences, or pairs of them, with a frozen encoder (RoBERTa, BERT) or decoder (LLaMA).

    With several tasks (a batch with `classes`, see `datamodules.mixture`) each example is classified among the classes of its
    own task, as with an output layer per task; metrics count a task's classes from 0.

    A batch has `input_ids`, `attention_mask` and perhaps `token_type_ids`, padded on either side with any token. A decoder is
    read at the last token that `attention_mask` marks as real, never by comparing ids with a padding token. The head computes
    in float32 also under mixed precision, since bfloat16 logits would tie.

    Args:
        model: name on the Hugging Face hub, or directory of a model.
        metrics: metrics in addition to accuracy: `f1` (of class 1 of two classes, otherwise the mean over the classes),
            `matthews` (correlation coefficient).
        dtype: of the frozen weights: float32, bfloat16 or float16. Adapters and head stay in float32.
        quantization: `int8` or `nf4` (4 bits) for the linear layers of the frozen model, null for none; embeddings, norms and
            activations keep `dtype`. Needs bitsandbytes.
        tiny: use an untrained model with 2 layers of width 256 that reads bytes (configs/smoke.yaml).
        tokenizer: name or directory of the data's tokenizer, `bytes`, or null for the model's own. The command line sets it.
        attn_implementation: attention in transformers: `eager`, `sdpa`, `flash_attention_2` (needs flash-attn and a 16-bit
            dtype), ...; null for its own choice.

    Raises:
        UserError: for an unknown metric, dtype or quantization, a missing package, or a directory without a model.
    """

    main_metric = "accuracy"
    monitor = ("val/accuracy", "max")
    pipeline_tag = "text-classification"
    batch_keys = ("input_ids", "attention_mask", "label")

    def __init__(
        self,
        model: str = "FacebookAI/roberta-large",
        metrics: Sequence[Literal["accuracy", "f1", "matthews"]] = ("accuracy",),
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantization: Literal["int8", "nf4"] | None = None,
        tiny: bool = False,
        tokenizer: str | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        check_model(model, dtype, quantization)
        unknown = set(metrics) - {"accuracy", "f1", "matthews"}
        if unknown:
            raise UserError(f"metrics={list(metrics)} must be some of accuracy, f1, matthews")
        self.model_name, self.dtype, self.quantization, self.tiny = model, dtype, quantization, tiny
        self.attn_implementation = attn_implementation
        self.tokenizer_name = tokenizer or tokenizer_name(model, tiny)
        self._knows_tokenizer = tokenizer is not None
        self.metric_names = dict.fromkeys(["accuracy", *metrics])
        self.num_classes = 0
        self._reads_last_token = False  # whether the head sees all tokens, and the logits of the last one count

    def arguments(self) -> dict[str, Any]:
        return {"model": self.model_name, "dtype": self.dtype, "quantization": self.quantization, "tiny": self.tiny}

    def fetch(self) -> None:
        if not self.tiny:
            fetch_model(self.model_name)

    def check_data(self, data: TaskData) -> None:
        super().check_data(data)
        require_two_classes(data)

    def build(self, num_classes: int | None, class_names: Sequence[str] | None = None) -> PreTrainedModel:
        """Load the model with a new head; see Task.

        Raises:
            UserError: if the number of classes is unknown, the model cannot be loaded, or the tokenizer is another model's.
        """
        self.num_classes = num_classes or len(class_names or ())
        if not self.num_classes:
            raise UserError("num_classes is unknown; give data with classes, or the adapter file that keeps them")
        tokenizer = load_fitting_tokenizer(self.tokenizer_name, self.model_name, self.tiny) if self._knows_tokenizer else None
        model = load_sequence_classifier(
            num_labels=self.num_classes, **self.arguments(), attn_implementation=self.attn_implementation
        )
        if tokenizer is not None:
            check_vocabulary(tokenizer, self.tokenizer_name, model, self.model_name)
        self.head_names = modules_outside_body(model)
        self._reads_last_token = _reads_last_token(model.config, self.head_names)
        for name in self.head_names:
            model.get_submodule(name).float().register_forward_pre_hook(cast_to_float32)
        config, embeddings = model.config.get_text_config(), cast(nn.Embedding, model.get_input_embeddings())
        if self._reads_last_token and (config.pad_token_id is None or not 0 <= config.pad_token_id < len(embeddings.weight)):
            config.pad_token_id = self._tokenizer().pad_token_id  # without one, transformers refuses batches
        self.model = model
        return model

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, classes) in float32, -infinity for the classes of other tasks."""
        assert isinstance(self.model, PreTrainedModel), "build() comes first"
        inputs = padded_right(batch, "input_ids", "token_type_ids")
        mask, padding = self.token_mask(batch), self.model.config.get_text_config().pad_token_id
        if padding is not None:  # RoBERTa and BART compare ids with it to find positions and the end
            inputs["input_ids"] = inputs["input_ids"].masked_fill(~mask, padding)
        heads = [self.model.get_submodule(name) for name in self.head_names]
        last_token = mask.sum(-1) - 1 if self._reads_last_token else None
        with reading_heads(heads, last_token, mask.shape[-1]):
            logits = self.model(**inputs).logits.float()
        return own_classes_only(logits, batch)

    def save_model(self, directory: Path, class_names: Sequence[str] | None) -> None:
        """Write the model for AutoModelForSequenceClassification, with the class names in its config."""
        assert isinstance(self.model, PreTrainedModel)
        if self._reads_last_token:
            tokenizer = self._tokenizer()
            self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
            if tokenizer("a")["input_ids"][-1] == tokenizer.pad_token_id:
                rank_zero_warn(
                    f"the tokenizer uses the token {tokenizer.pad_token!r} as end of text and for padding; transformers "
                    "skips it and reads the token before it, so its logits will differ from those computed here"
                )
        if class_names:
            self.model.config.id2label = dict(enumerate(class_names))
            self.model.config.label2id = {name: index for index, name in enumerate(class_names)}
        save_hugging_face(self.model, self.tokenizer_name, directory)

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self(batch), batch["label"])

    def new_metrics(self) -> MetricCollection:
        known: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
            "f1": F1(self.num_classes),
            "matthews": Matthews(self.num_classes),
        }
        return MetricCollection({name: known[name] for name in self.metric_names})

    def evaluate(self, batch: Batch) -> Evaluation:
        return evaluate_classes(self(batch), batch)

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        return class_rows(self(batch), batch)

    def token_mask(self, batch: Batch) -> Tensor:
        return real_tokens(batch["attention_mask"])

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.tokenizer_name)


def _reads_last_token(config: PretrainedConfig, head_names: Sequence[str]) -> bool:
    if "sequence_summary" in head_names:  # XLNet's reads the last column, which may be padding
        return config.summary_type == "last"
    if config.model_type in _FIRST_TOKEN_READERS or config.is_encoder_decoder:
        return False
    return "score" in head_names or config.model_type in _OTHER_LAST_TOKEN_READERS
