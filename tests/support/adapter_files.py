"""Reading and rewriting adapter files as some other program could."""

import hashlib
import json

from safetensors import safe_open
from safetensors.torch import load_file, save

TENSORS, DESCRIPTION, CARD = "adapter.safetensors", "adapter.json", "README.md"


def embedded(directory):
    with safe_open(directory / TENSORS, "pt") as file:
        return file.metadata()["fourier_moe"]


def rewrite(directory, **changes):
    """Another description in the file, with a valid checksum, as some other program could write it."""
    raw = json.loads(embedded(directory))
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    raw["sha256"] = "0" * 64
    data = save(load_file(directory / TENSORS), metadata={"fourier_moe": json.dumps(raw)})
    (directory / TENSORS).write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1))
    (directory / DESCRIPTION).unlink(missing_ok=True)
