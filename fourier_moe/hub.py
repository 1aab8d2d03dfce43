"""Adapters on the Hugging Face hub: an adapter directory is a repository there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fourier_moe.adapter_format import CARD, DESCRIPTION, TENSORS, read

SCHEME = "hf://"
_ID = r"[\w.-]+/[\w.-]+"
_REPOSITORY = re.compile(rf"(?P<id>{_ID})(@(?P<revision>[^@\s]+))?")


def local_directory(path: str | os.PathLike[str]) -> Path:
    """Where an adapter is on this machine.

    Args:
        path: a directory, or `hf://owner/name[@revision]`, of which the adapter's files are fetched unless the Hugging Face
            cache has them; the revision is a branch, tag or commit.

    Raises:
        ValueError: if the hub has no such repository or revision, or it cannot be reached.
    """
    text = os.fspath(path)
    if not text.startswith(SCHEME):
        return Path(text).expanduser()
    match = _REPOSITORY.fullmatch(text.removeprefix(SCHEME))
    if match is None:
        raise ValueError(f"adapter path {text!r} must be hf://owner/name or hf://owner/name@revision")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                match["id"], revision=match["revision"], allow_patterns=[TENSORS, DESCRIPTION], library_name="fourier_moe"
            )
        )
    except Exception as error:  # the hub's client raises errors of several libraries
        raise _failed(
            f"{text} cannot be fetched", error, "fetch it where there is a network, and give its directory"
        ) from error


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        ValueError: with its form.
    """
    if not re.fullmatch(_ID, repo_id):
        raise ValueError(f"repo_id={repo_id!r} must be owner/name")


def push_adapter(
    directory: str | os.PathLike[str], repo_id: str, *, private: bool = True, commit_message: str | None = None
) -> str:
    """Put an adapter directory on the Hugging Face hub, as a new repository or a new commit of one.

    Its adapter.safetensors, adapter.json and README.md are sent, nothing else. Log in first: `hf auth login`, or HF_TOKEN.

    Args:
        repo_id: `owner/name`.
        private: whether a new repository is seen by its owner alone; one that is there stays as it is.
        commit_message: None names the adapter's method.

    Returns:
        The path to load it by, `hf://owner/name@commit`.

    Raises:
        ValueError: if there is no adapter, a damaged one, or the hub refuses it.
    """
    check_repo_id(repo_id)
    description, _ = read(Path(directory))
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="fourier_moe")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(directory),
            allow_patterns=[TENSORS, DESCRIPTION, CARD],
            commit_message=commit_message or f"Adapter: {type(description.config).__name__}",
        )
    except Exception as error:
        raise _failed(f"{directory} cannot be pushed to {repo_id}", error, "log in with `hf auth login`") from error
    return f"{SCHEME}{repo_id}@{commit.oid}"


def _failed(what: str, error: Exception, otherwise: str) -> ValueError:
    """One line of what are often several."""
    return ValueError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]} ({otherwise})")
