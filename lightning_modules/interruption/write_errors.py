"""Errors of a full or lost disk, from any writer: checkpoints, adapters, TensorBoard."""

from __future__ import annotations

import errno
import threading

_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}


def write_error(error: BaseException | None) -> OSError | None:
    """Return the error in a chain of causes that says a disk is full, over quota, read-only or lost; None if there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _ERRORS:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def quiet_writer_threads() -> None:
    """Suppress the traceback of a thread that meets a full disk: TensorBoard's passes the error to the main thread."""
    before = threading.excepthook
    if getattr(before, "quiet_about_write_errors", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if write_error(args.exc_value) is None:
            before(args)

    hook.quiet_about_write_errors = True  # type: ignore[attr-defined]
    threading.excepthook = hook
