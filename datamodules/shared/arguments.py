"""What all DataModules say about wrong arguments."""

from __future__ import annotations

from fourier_moe.errors import UserError


def require(name: str, value: object, valid: bool, expected: str) -> None:
    """Refuse an argument that is not valid.

    Raises:
        UserError: naming the argument, what is expected and what it is.
    """
    if not valid:
        raise UserError(f"{name} must be {expected}, got {value}")


def require_one_origin(directory: str | None, synthetic: bool, revision: str | None = None) -> None:
    """Refuse local data and generated data at once, and a revision of either.

    Args:
        revision: of the hub's data set.

    Raises:
        UserError: if two of them are asked for.
    """
    if revision is not None and (directory is not None or synthetic):
        other = f"directory '{directory}'" if directory is not None else "synthetic"
        raise UserError(f"revision '{revision}' is one of the hub's data set, and {other} reads no hub; leave one of them out")
    if directory is not None and synthetic:
        raise UserError(f"directory '{directory}' and synthetic cannot be used together; give one of them")
