"""Tiny GLUE files and a tokenizer on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from datamodules.glue.benchmarks import TASKS

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(20))]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A TSV file ``<folder>/<name>`` from rows of fields; the folder is returned."""

    def write(task: str, name: str, rows: list[list[str]], encoding: str = "utf-8", newline: str = "\n") -> Path:
        folder = tmp_path / "glue" / TASKS[task].folder
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join("\t".join(row) + newline for row in rows)
        (folder / name).write_bytes(text.encode(encoding))
        return folder

    return write


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tokenizer of words that joins pairs as BERT's does, with token types, padded on the LEFT."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        padding_side="left",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    directory = tmp_path_factory.mktemp("words")
    tokenizer.save_pretrained(directory)
    return str(directory)
