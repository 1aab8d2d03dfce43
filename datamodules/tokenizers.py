"""Tokenizers: the one place that loads them, for data that tokenises and for language models that read their own output.

The only module that tasks take from this package: text means nothing without the tokenizer of the model that reads it.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

BYTES = "bytes"

_REASON_CHARACTERS = 200  # of an error from below


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model, with a padding token.

    Args:
        name: the model's name on the hub, its directory, or `bytes`: one token per byte, without files (for tiny untrained
            models; 384 ids).

    Raises:
        ValueError: if there is none of that name here, or it cannot be fetched or read.
    """
    if name == BYTES:
        return ByT5Tokenizer()
    if is_path(name) and not Path(name).expanduser().is_dir():
        raise ValueError(f"tokenizer={name!r}: no such directory; give a directory with a tokenizer, or a name on the hub")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name).expanduser()) if is_path(name) else name)
    except Exception as error:  # files that are damaged or not there give errors of many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_REASON_CHARACTERS]
        raise ValueError(
            f"tokenizer={name!r} cannot be loaded ({reason}); give a Hugging Face name that this machine can fetch, or a "
            "directory with a tokenizer's files"
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one up for a BERT without its files
        raise ValueError(
            f"tokenizer={name!r} knows no words, only {len(tokenizer)} special tokens: its files (tokenizer.json, vocab.txt) "
            "are missing; copy them there, or give another tokenizer"
        )
    if tokenizer.pad_token is None:  # LLaMA has none; what it stands for is masked everywhere
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.eos_token is None else tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"tokenizer={name!r} has no pad, eos or unk token to pad with; give its tokenizer_config.json a pad_token"
        )
    return tokenizer


def check_max_length(max_length: int, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that the tokenizer's model takes texts of so many tokens.

    Raises:
        ValueError: if it does not.
    """
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens that the model of tokenizer "
            f"'{name}' takes"
        )


def is_path(name: str) -> bool:
    """Whether a model name is meant as a directory."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).expanduser().is_dir()
