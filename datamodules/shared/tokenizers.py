"""Tokenizers: the one place that loads them, for data that tokenizes and for language models that read their own output.

The only module that tasks take from this package: text means nothing without the tokenizer of the model that reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from fourier_moe.errors import UserError
from fourier_moe.files.hub_files import HubError, Repository

BYTES = "bytes"

SMALL_FILE = re.compile(r"[^/]+\.(json|txt|model|jinja)")  # a model's configs and its tokenizer, not its weights

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_REASON_CHARACTERS = 200  # of an error from below


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a Hugging Face model, with a padding token.

    Args:
        name: the model's name on the hub, its directory, or `bytes`: one token per byte, without files (for tiny untrained
            models; 384 ids).

    Raises:
        UserError: if there is none of that name here, or it cannot be fetched or read.
    """
    if name == BYTES:
        return ByT5Tokenizer()
    if is_path(name) and not Path(name).expanduser().is_dir():
        raise UserError(f"tokenizer={name!r}: no such directory; give a directory with a tokenizer, or a name on the hub")
    on_hub = not is_path(name)
    if on_hub:
        try:
            Repository(name).fetch(_tokenizer_files, rank_zero_info, look_up=False)
        except HubError as error:
            otherwise = "" if error.remedy else "; give a Hugging Face name that this machine can fetch, or a directory"
            raise UserError(f"tokenizer={name!r} cannot be fetched ({error}){otherwise}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name if on_hub else str(Path(name).expanduser()), local_files_only=on_hub)
    except Exception as error:  # files that are damaged or not there give errors of many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_REASON_CHARACTERS]
        raise UserError(
            f"tokenizer={name!r} cannot be loaded ({reason}); give a Hugging Face name that this machine can fetch, or a "
            "directory with a tokenizer's files"
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one up for a BERT without its files
        raise UserError(
            f"tokenizer={name!r} knows no words, only {len(tokenizer)} special tokens: its files (tokenizer.json, vocab.txt) "
            "are missing; copy them there, or give another tokenizer"
        )
    if tokenizer.pad_token is None:  # LLaMA has none; what it stands for is masked everywhere
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.eos_token is None else tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"tokenizer={name!r} has no pad, eos or unk token to pad with; give its tokenizer_config.json a pad_token"
        )
    return tokenizer


def _tokenizer_files(sizes: Mapping[str, int]) -> list[str]:
    if not any(path in _VOCABULARIES for path in sizes):
        raise HubError(f"it has no tokenizer, {' or '.join(_VOCABULARIES)}", "give a model with a tokenizer")
    return [path for path in sizes if SMALL_FILE.fullmatch(path)]


def check_max_length(max_length: int, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that the tokenizer's model takes texts of so many tokens.

    Raises:
        UserError: if it does not.
    """
    if max_length > tokenizer.model_max_length:
        raise UserError(
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens that the model of tokenizer "
            f"'{name}' takes"
        )


def is_path(name: str) -> bool:
    """Return whether a model name is meant as a directory."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).expanduser().is_dir()
