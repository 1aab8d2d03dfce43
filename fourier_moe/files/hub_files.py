"""Files of a repository on the Hugging Face hub: looked up once, fetched with retries, or taken from the hub's cache.

Adapters, models and data sets come through here. The `huggingface_hub` client resumes a file that breaks off, but ends at one
server error and waits minutes for a network that does not answer.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fourier_moe.errors import UserError
from fourier_moe.files.retrying import Say, causes, retry, status_of
from fourier_moe.files.writing import write_file

Select = Callable[[Mapping[str, int]], Sequence[str]]

TIMEOUT_SECONDS = 10.0  # of the look-up
LOG_SECONDS = 20.0  # between two lines of progress in a log

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(UserError, RuntimeError):
    """What a repository could not give, in one line.

    Attributes:
        remedy: what to do about it; None where the network or the server is at fault.
    """

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.remedy = remedy


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit.

    Attributes:
        repository: where they are.
        commit: 40 hexadecimal digits.
        sizes: bytes by path; in the cache, those of the files that are there.
        problem: why this is the cache's listing, None for the hub's own.
    """

    repository: Repository
    commit: str
    sizes: Mapping[str, int]
    problem: str | None = None

    def fetch(self, paths: Sequence[str], say: Say) -> list[Path]:
        """Return where files are on this machine, after those that the cache lacks were fetched.

        Raises:
            HubError: if they cannot be fetched, or do not fit on the disk.
        """
        folder = self.repository.cache / "snapshots" / self.commit
        missing = sorted((path for path in paths if not (folder / path).exists()), key=lambda path: self.sizes[path])
        if missing:
            num_bytes = sum(self.sizes[path] for path in missing)
            _require_space(self.repository, num_bytes)
            size, number = _readable(num_bytes), f"{len(missing)} file{'s' if len(missing) > 1 else ''}"
            say(f"Fetching {number}, {size}, of {self.repository} at {self.commit[:7]} to {self.repository.cache}")
        for done, path in enumerate(missing):
            say(f"  {path}, {_readable(self.sizes[path])} ({done + 1} of {len(missing)})")
            self.repository.download(path, self.commit, say)
        try:
            self.repository.remember(self.commit)
        except OSError as error:  # a cache that others share may be read-only
            say(f"{self.repository} is not found offline: its commit cannot be noted in the cache ({error.strerror})")
        return [folder / path for path in paths]


@dataclass(frozen=True)
class Repository:
    """A repository on the Hugging Face hub.

    Attributes:
        name: `owner/name`.
        kind: model or dataset.
        revision: branch, tag or commit; None for the newest commit.
    """

    name: str
    kind: Literal["model", "dataset"] = "model"
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def cache(self) -> Path:
        """Where huggingface_hub keeps it: `snapshots/<commit>/<path>`, and the commit of a branch in `refs/<branch>`."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE, f"{self.kind}s--{self.name.replace('/', '--')}")

    def fetch(self, select: Select, say: Say, *, look_up: bool) -> list[Path]:
        """Return where some files are on this machine, after those that the cache lacks were fetched.

        Args:
            select: picks paths of those that there are, or raises HubError for what is missing.
            look_up: ask the hub for the newest version; without it only where the cache lacks one of them.

        Raises:
            HubError: if they cannot be fetched.
        """
        listing = None if look_up else self.cached()
        if listing is not None:
            with contextlib.suppress(HubError):
                return listing.fetch(select(listing.sizes), say)
        listing = self.look_up(say)
        try:
            return listing.fetch(select(listing.sizes), say)
        except HubError as error:
            if listing.problem is None:
                raise
            raise HubError(f"{error}; the cache is all there is, because of {listing.problem}", error.remedy) from error

    def look_up(self, say: Say) -> Listing:
        """Ask the hub once for the files; where it does not answer, take those of the cache and say so.

        Raises:
            HubError: if the hub does not answer and the cache has nothing, or there is no such repository or revision.
        """
        import huggingface_hub

        cached = self.cached()

        def ask() -> Any:
            api = huggingface_hub.HfApi(library_name="fourier_moe")
            return api.repo_info(
                self.name, repo_type=self.kind, revision=self.revision, timeout=TIMEOUT_SECONDS, files_metadata=True
            )

        try:
            info = retry(ask, f"looking up {self}", say, attempts=4 if cached is None else 2)
        except Exception as error:  # the client raises errors of several libraries
            problem = explain(error, self)
            if cached is None:
                raise problem from error
            say(f"{self} cannot be looked up ({problem}): taking commit {cached.commit[:7]} from {self.cache}")
            return Listing(self, cached.commit, cached.sizes, str(problem))
        return Listing(self, info.sha, {file.rfilename: file.size or 0 for file in info.siblings})

    def cached(self) -> Listing | None:
        """Return what the cache has of the revision, perhaps not all of it; None if it has nothing."""
        commit = self.revision or "main"
        reference = self.cache / "refs" / commit
        if reference.is_file():
            commit = reference.read_text(encoding="utf-8").strip()
        folder = self.cache / "snapshots" / commit
        files = [path for path in folder.rglob("*") if path.is_file()]
        return (
            Listing(self, commit, {path.relative_to(folder).as_posix(): path.stat().st_size for path in files})
            if files
            else None
        )

    def download(self, path: str, commit: str, say: Say) -> None:
        """Fetch one file into the cache.

        Raises:
            HubError: if it cannot be fetched.
        """
        import huggingface_hub

        def fetch() -> str:
            return huggingface_hub.hf_hub_download(
                self.name,
                path,
                repo_type=self.kind,
                revision=commit,
                library_name="fourier_moe",
                tqdm_class=None if sys.stderr.isatty() else _log_progress(path, say),
            )

        try:
            retry(fetch, path, say)
        except Exception as error:
            problem = explain(error, self)
            raise HubError(f"{path}: {problem}", problem.remedy) if problem.remedy is None else problem from error

    def remember(self, commit: str) -> None:
        """Note the commit of the revision, as huggingface_hub does, once its files are here: offline they are found by it."""
        reference = self.cache / "refs" / (self.revision or "main")
        if not _COMMIT.fullmatch(self.revision or "") and not (reference.is_file() and reference.read_text() == commit):
            write_file(reference, commit)


def explain(error: BaseException, repository: Repository) -> HubError:
    """Return what an error of the client means, and what to do about it."""
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    status = status_of(error)
    for cause in causes(error):
        if isinstance(cause, errors.GatedRepoError):
            page = f"{constants.ENDPOINT}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}"
            return HubError(
                f"access to {repository.name} is restricted ({status})", f"accept its terms at {page}, then {log_in}"
            )
        if isinstance(cause, errors.RepositoryNotFoundError):
            kind = "data set" if repository.kind == "dataset" else repository.kind
            reason = f"the hub has no {kind} {repository.name!r}, or it is private ({status})"
            return HubError(reason, f"check the name; for a private one {log_in}")
        if isinstance(cause, errors.RevisionNotFoundError):
            reason = f"{repository.name} has no revision {repository.revision!r} (404)"
            return HubError(reason, "give a branch, a tag or a commit of it")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return HubError("HF_HUB_OFFLINE forbids to ask the hub")
    if status == 401:
        return HubError(f"the hub does not accept the token for {repository.name} (401)", log_in)
    if status == 403:
        remedy = f"use a token that may read it: {log_in}"
        return HubError(f"the hub refuses access to {repository.name} (403)", remedy)
    everything = list(causes(error))
    root = next((cause for cause in everything if getattr(cause, "response", None) is not None), everything[-1])
    return HubError(f"{type(root).__name__}: {' '.join(str(root).split())[:200]}")


def _require_space(repository: Repository, num_bytes: int) -> None:
    existing = next(folder for folder in (repository.cache, *repository.cache.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise HubError(
            f"{repository} needs {_readable(num_bytes)} in {repository.cache}, where {_readable(free)} are free",
            "make room, or set HF_HOME to a directory on a larger disk",
        )


def _readable(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def _log_progress(path: str, say: Say) -> Any:
    """Return the class of a progress bar that writes a line now and then, where there is no terminal to draw in."""
    from tqdm import tqdm

    class Progress(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            known = {name: options[name] for name in ("total", "initial") if name in options}
            super().__init__(*args, **known, mininterval=LOG_SECONDS, delay=LOG_SECONDS / 2)

        def display(self, *_: Any, **__: Any) -> None:
            if self.total and self.n < self.total:
                say(f"  {path}: {_readable(self.n)} of {_readable(self.total)}")

    return Progress
