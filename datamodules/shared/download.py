"""Fetching one file over HTTP: retried, resumed where it broke off, and complete."""

from __future__ import annotations

import sys
import time
import urllib.request
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from fourier_moe.files.retrying import IncompleteFileError, retry

LOG_SECONDS = 20.0  # between two lines of progress in a log

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 20.0


def download(url: str, path: Path, label: str) -> None:
    """Fetch `url` to `path`, an empty file.

    Args:
        label: what it is called in the log.

    Raises:
        OSError: the last attempt's, with the status or the number of bytes that came.
        http.client.HTTPException: an answer that is none.
    """
    retry(lambda: _continue(url, path, label), label, rank_zero_info)


def _continue(url: str, path: Path, label: str) -> None:
    """Fetch what is missing at the end of the file; a server that knows no ranges sends all of it again."""
    start = path.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response, path.open("r+b") as file:
        start = start if response.status == 206 else 0
        file.seek(start)
        file.truncate()
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        last_report = time.monotonic()
        with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=label, leave=False, disable=None) as bar:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
                if not sys.stderr.isatty() and time.monotonic() - last_report > LOG_SECONDS:
                    last_report = time.monotonic()
                    rank_zero_info(f"  {label}: {file.tell() / 1e6:.0f}" + (f" of {total / 1e6:.0f} MB" if total else " MB"))
        if total is not None and file.tell() != total:
            raise IncompleteFileError(f"the connection ended after {file.tell():,} of {total:,} bytes")
