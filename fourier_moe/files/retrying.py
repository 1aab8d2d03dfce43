"""Retries of calls that fail because of the network."""

from __future__ import annotations

import http.client
import time
import urllib.error
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
Say = Callable[[str], None]

FIRST_WAIT_SECONDS = 1.0  # doubled with every attempt


class IncompleteFileError(OSError):
    """A response ended before its Content-Length."""


_TEMPORARY_STATUS = (408, 425, 429, 500, 502, 503, 504)
_NETWORK_ERRORS = (IncompleteFileError, ConnectionError, TimeoutError, http.client.HTTPException, urllib.error.URLError)
_NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def retry(call: Callable[[], T], what: str, say: Say, attempts: int = 4) -> T:
    """Call again after temporary errors: server errors, connections that are refused or break off, incomplete files.

    Args:
        what: what is being done, for the log.
        say: called with one line for every failed attempt.
        attempts: number of calls in all.

    Raises:
        Exception: the last attempt's, or the first that is not temporary.
    """
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            if attempt == attempts - 1 or not is_temporary(error):
                raise
            wait = FIRST_WAIT_SECONDS * 2**attempt
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            say(f"{what}: {reason}; trying again in {wait:g} s")
            time.sleep(wait)
    raise AssertionError("attempts is 1 or more")


def is_temporary(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    if any(type(cause).__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError") for cause in causes(error)):
        return False  # forbidden, or tried six times by huggingface_hub
    status = status_of(error)
    if status is not None:
        return status in _TEMPORARY_STATUS
    for cause in causes(error):
        if isinstance(cause, _NETWORK_ERRORS) or type(cause).__name__ == "XetDownloadError":
            return True
        if type(cause).__module__.partition(".")[0] in _NETWORK_LIBRARIES or "Consistency check failed" in str(cause):
            return True
    return False


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error or one of its causes reports."""
    for cause in causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None) or getattr(cause, "code", None)
        if isinstance(status, int):
            return status
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, what it came from, and so on."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
