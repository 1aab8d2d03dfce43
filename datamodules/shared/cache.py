"""Token ids on disk: made once, and found again under a key of all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import tokenizers
import transformers
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, uint8
from transformers import PreTrainedTokenizerBase

from fourier_moe.errors import UserError
from fourier_moe.files.writing import write_file

_VERSION = "5"  # raise it when the same inputs would give other files
_CHECKSUM = "sha256"  # key of the file's metadata


def load_or_make(cache_directory: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors stored under a key; make and write them if there are none, or if their file is damaged.

    Processes that read the same file share its memory. Of processes that write it at the same time the last one wins; none
    ever reads a part of a file.

    Raises:
        UserError: the directory cannot be written to.
    """
    path = cache_directory / f"{key}.safetensors"
    if path.is_file():
        try:
            return _load_checked(path)
        except Exception as error:  # a damaged header gives errors of many kinds
            reason = " ".join(str(error).split())
            rank_zero_warn(f"token cache: '{path}' is damaged ({reason}); the texts are tokenized again")
    tensors = make()
    content = save(tensors, metadata={_CHECKSUM: _checksum(tensors)})
    try:
        write_file(path, content)  # other users may read it, unlike what `save_file` writes
    except OSError as error:
        problem = f"cannot be written to ({error.strerror})"
        raise UserError(f"cache_directory '{cache_directory}' {problem}; give another") from error
    return load_file(path)


def _load_checked(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        expected = (file.metadata() or {}).get(_CHECKSUM)
    tensors = load_file(path)
    if _checksum(tensors) != expected:
        raise UserError("its checksum differs")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def cache_key(tokenizer: PreTrainedTokenizerBase, settings: object, *columns: Iterable[str]) -> str:
    """Return a name for tokenized texts: a hash of them, of the tokenizer, of other settings and of library versions."""
    digest = hashlib.sha256()
    _update(digest, [_VERSION, transformers.__version__, tokenizers.__version__, json.dumps(settings), _describe(tokenizer)])
    for column in columns:
        _update(digest, column)
    return digest.hexdigest()[:32]


def _update(digest: hashlib._Hash, texts: Iterable[str]) -> None:
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    digest.update(b"\xff" * 8)  # the end of a column: no text has this length


def _describe(tokenizer: PreTrainedTokenizerBase) -> str:
    parts = [
        type(tokenizer).__name__,
        json.dumps(tokenizer.model_input_names),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),  # a chat template writes them
        json.dumps(tokenizer.get_vocab(), sort_keys=True),
    ]
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend.update(truncation=None, padding=None)  # left over from the last call
        parts.append(json.dumps(backend, sort_keys=True))
    return "\n".join(parts)
