"""Rows on disk that count only if this user wrote them for the same evaluation and no bit has changed since."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

from datamodules.shared.user_cache import default_cache_directory

Row = dict[str, Any]

_KEY_BYTES = 32


class SealedRows:
    """Rows as lines of JSON, `["<seal>", {<row>}]`, where the seal is an HMAC-SHA256 of the row's text.

    Args:
        key: see `user_key`.
        about: identifies the evaluation; rows of another one are refused.
    """

    def __init__(self, key: bytes, about: str) -> None:
        self._key = hmac.digest(key, about.encode(), "sha256")

    def line(self, set_name: str, row: Row) -> str:
        """Return a row of a set as one line, without its end."""
        return self._sealed(set_name, json.dumps(row, ensure_ascii=False).encode()).decode()

    def read(self, set_name: str, line: bytes) -> Row | None:
        """Return the row in a line; None if `line` did not make it."""
        text = line[len(self._sealed(set_name, b"")) - 1 : -1]
        if not hmac.compare_digest(line, self._sealed(set_name, text)):
            return None
        row = json.loads(text)
        assert isinstance(row, dict), "only rows are sealed"
        return row

    def _sealed(self, set_name: str, text: bytes) -> bytes:
        seal = hmac.new(self._key, f"{set_name}\n".encode() + text, "sha256").hexdigest()
        return f'["{seal}", '.encode() + text + b"]"


def user_key() -> bytes:
    """Return a random key that only this user knows, made on first use; a key of this process if none can be stored.

    The key tells rows of the user's own runs from rows in files of others.
    """
    path = default_cache_directory() / "evaluation_key"
    try:
        if not path.is_file() or path.stat().st_size != _KEY_BYTES:
            _make_key(path)
        key = path.read_bytes()
        return key if len(key) == _KEY_BYTES else secrets.token_bytes(_KEY_BYTES)
    except OSError:  # the home directory is not writable: nothing can be resumed
        return secrets.token_bytes(_KEY_BYTES)


def _make_key(path: Path) -> None:
    """Write a key atomically; if several processes do so at the same time, the first one's key stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        if path.is_file() and path.stat().st_size != _KEY_BYTES:
            path.unlink()
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink()
