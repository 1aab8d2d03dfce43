"""Adapters on the Hugging Face hub: an adapter directory is a repository there."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from fourier_moe.errors import UserError
from fourier_moe.files.format import CARD, DESCRIPTION, TENSORS, read
from fourier_moe.files.hub_files import HubError, Repository
from fourier_moe.files.peft_files import PEFT_CONFIG, PEFT_TENSORS
from fourier_moe.files.retrying import retry, status_of

_log = logging.getLogger(__name__)

SCHEME = "hf://"
_ID = r"[\w.-]+/[\w.-]+"
_REPOSITORY = re.compile(rf"(?P<id>{_ID})(@(?P<revision>[^@\s]+))?")


def local_directory(path: str | os.PathLike[str]) -> Path:
    """Return where an adapter is on this machine.

    Args:
        path: a directory, or `hf://owner/name[@revision]`, of which the adapter's files are fetched unless the Hugging Face
            cache has them; the revision is a branch, tag or commit.

    Raises:
        UserError: if the hub has no such repository or revision, or it cannot be reached.
    """
    text = os.fspath(path)
    if not text.startswith(SCHEME):
        return Path(text).expanduser()
    match = _REPOSITORY.fullmatch(text.removeprefix(SCHEME))
    if match is None:
        raise UserError(f"adapter path {text!r} must be hf://owner/name or hf://owner/name@revision")
    try:
        listing = Repository(match["id"], revision=match["revision"]).look_up(_log.warning)
        absent = [file for file in (TENSORS, DESCRIPTION) if file not in listing.sizes]
        if absent:
            raise HubError(f"it has no {' and no '.join(absent)}", "give a repository that push_adapter wrote")
        return listing.fetch([TENSORS, DESCRIPTION], _log.warning)[0].parent
    except HubError as error:
        otherwise = "" if error.remedy else " (fetch it where there is a network, and give its directory)"
        raise UserError(f"{text} cannot be fetched: {error}{otherwise}") from error


def check_repo_id(repo_id: str) -> None:
    """Refuse invalid names of repositories.

    Raises:
        UserError: with the valid form.
    """
    if not re.fullmatch(_ID, repo_id):
        raise UserError(f"repo_id={repo_id!r} must be owner/name")


def push_adapter(
    directory: str | os.PathLike[str], repo_id: str, *, private: bool = True, commit_message: str | None = None
) -> str:
    """Put an adapter directory on the Hugging Face hub, as a new repository or a new commit of one.

    Its adapter.safetensors, adapter.json, README.md and PEFT's files are sent, nothing else; PEFT's files of an older adapter
    are removed there. Log in first: `hf auth login`, or HF_TOKEN.

    Args:
        repo_id: `owner/name`.
        private: whether a new repository is seen by its owner alone; one that is there stays as it is.
        commit_message: None names the adapter's method.

    Returns:
        The path to load it by, `hf://owner/name@commit`.

    Raises:
        UserError: if there is no adapter, a damaged one, or the hub refuses it.
    """
    check_repo_id(repo_id)
    description, _ = read(Path(directory))
    stale = [name for name in (PEFT_TENSORS, PEFT_CONFIG) if not (Path(directory) / name).exists()]
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="fourier_moe")

    def push() -> str:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(directory),
            allow_patterns=[TENSORS, DESCRIPTION, CARD, PEFT_TENSORS, PEFT_CONFIG],
            delete_patterns=stale or None,
            commit_message=commit_message or f"Adapter: {type(description.config).__name__}",
        )
        return f"{SCHEME}{repo_id}@{commit.oid}"

    try:
        return retry(push, f"pushing to {repo_id}", _log.warning)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise UserError(f"{directory} cannot be pushed to {repo_id}: {_refusal(error, repo_id)}") from error


def _refusal(error: Exception, repo_id: str) -> str:
    """Return what the hub's answer to a push means, and what to do."""
    owner, status = repo_id.partition("/")[0], status_of(error)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        return "the hub knows no such login (401); log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
    if status in (403, 404):
        return (
            f"this login may not write to {owner} ({status}); use a token with write permission, and your own name or that of "
            "an organization that you belong to"
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; nothing here is lost, push again"
