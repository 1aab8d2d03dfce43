"""Where the files come from: a local directory, or LLM-Adapters' repository at one commit, checked and kept in a cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

from lightning.pytorch.utilities import rank_zero_info

from datamodules.shared.download import download
from fourier_moe.errors import UserError

COMMIT = "816657208af4db747803f87ba40a4c71383fed7a"
BASE_URL = f"https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/{COMMIT}"

# Git's name for the content of each file: SHA-1 of "blob <size>\0" and the bytes.
BLOB_IDS = {
    "dataset/AQuA/test.json": "731fbb456f7a93bb4121125de09c4adcf42e5dab",
    "dataset/ARC-Challenge/test.json": "9540685439144200b5a7e48dab9ca4655be2af09",
    "dataset/ARC-Challenge/train.json": "d7e080b04bff9fd16dd85455fb04481807a088d8",
    "dataset/ARC-Easy/test.json": "6c0d30aaedaeca148df6bcd7aaacf7c31e6ad70f",
    "dataset/ARC-Easy/train.json": "488a8e5e5bbbd7a630ebbfe07a1fd91b7d9d8c9b",
    "dataset/AddSub/test.json": "f3996cdf4159b4e1e4b6768865a4db72105f4e2f",
    "dataset/MultiArith/test.json": "08e996c6cd8c633cc977f5c50709a8bbfc8fadff",
    "dataset/SVAMP/test.json": "98b8f1872db596f8aaff2c95d1d698a9fa13b94f",
    "dataset/SingleEq/test.json": "cce7a868400323e30e2094a15d482c1aa743dbb0",
    "dataset/boolq/test.json": "6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3",
    "dataset/boolq/train.json": "87a7beee26b49f81c450641ef2ff84f55611321f",
    "dataset/gsm8k/test.json": "57a7a08e10e12e975e1f972d2b8125c0d4c722b1",
    "dataset/hellaswag/test.json": "183c4920415f83ba4b793c4873a33e7e10bd1be5",
    "dataset/hellaswag/train.json": "ca68dc85fc2a2f73c9b1b8b0823cc41a8f669718",
    "dataset/openbookqa/test.json": "a6e69676104bcb77237388c3b5a3f0dcbb81d1e2",
    "dataset/openbookqa/train.json": "75bcd5eb9f5e77a3796c05e6bb38f169d19563fc",
    "dataset/piqa/test.json": "f7a1c260692ef31796d4763cb6334f316a754fed",
    "dataset/piqa/train.json": "44326ba946f8bd645bfa7a189e619d29b5bc17e5",
    "dataset/social_i_qa/test.json": "eadf221799ca394367b144c0f86ee0436db409d2",
    "dataset/social_i_qa/train.json": "bd524129d80efdfabc8476bbedc4f41b400cfda0",
    "dataset/winogrande/test.json": "21257263593dd4d00546e1918c88ca0f357b08ad",
    "dataset/winogrande/train.json": "0b56375ac6b4464fa97abfb72812f15c772ba305",
    "ft-training_set/commonsense_15k.json": "3716afef6d384c475dba13f88a5a96c8032dafe2",
    "ft-training_set/commonsense_170k.json": "529e426b33d4cdb1d0c4a275a1a7245ad081fd91",
    "ft-training_set/math_10k.json": "27dba77d6ed80aa118d78fbafa5cecd651f6d463",
    "ft-training_set/math_14k.json": "7dc3a2312d83bd5cd6388ecd5d530f2ff6ed1ad6",
    "ft-training_set/math_7k.json": "fd93bf268b53bb644b38e71270cdf633951ba3e0",
}

_CHUNK_BYTES = 1 << 20


class Files(ABC):
    """Files by their path in LLM-Adapters' layout: `dataset/<set>/test.json`, `ft-training_set/<name>.json`."""

    @abstractmethod
    def has(self, file: str) -> bool:
        """Return whether `get` needs no network."""

    @abstractmethod
    def get(self, file: str) -> Path:
        """Return where the file lies on this machine."""


class LocalFiles(Files):
    """Files of a directory in LLM-Adapters' layout; its first folder (`dataset/`, `ft-training_set/`) may be left out."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def has(self, file: str) -> bool:
        return self._find(file) is not None

    def get(self, file: str) -> Path:
        """Return where the file lies.

        Raises:
            UserError: it is not there.
        """
        found = self._find(file)
        if found is None:
            raise UserError(
                f"directory '{self._directory}' has no {file} (nor {_without_first_folder(file)}); add it or leave its set out"
            )
        return found

    def _find(self, file: str) -> Path | None:
        candidates = (self._directory / file, self._directory / _without_first_folder(file))
        return next((path for path in candidates if path.is_file()), None)


class PinnedFiles(Files):
    """Files of LLM-Adapters' repository at one commit, fetched when they are first needed.

    Args:
        cache_directory: where they are kept.
        base_url: a mirror of the repository at this commit; None for GitHub.
    """

    def __init__(self, cache_directory: Path, base_url: str | None = None) -> None:
        self._base_url = base_url
        self._cache = cache_directory / f"LLM-Adapters-{COMMIT[:12]}"

    def has(self, file: str) -> bool:
        path = self._cache / file
        return path.is_file() and blob_id(path) == BLOB_IDS[file]

    def get(self, file: str) -> Path:
        """Return where the file lies, after it was fetched and checked, if it was not there.

        Raises:
            UserError: it cannot be fetched, or what was fetched is another file.
        """
        path = self._cache / file
        if not self.has(file):
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(file, path, (self._base_url or BASE_URL).rstrip("/"))
        return path


def blob_id(path: Path) -> str:
    """Return Git's name for the content of a file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _download(file: str, path: Path, base_url: str) -> None:
    """Fetch to a temporary file beside `path`, which appears complete and checked or not at all."""
    rank_zero_info(f"Fetching {file} from LLM-Adapters to {path.parent}")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        try:
            download(f"{base_url}/{file}", Path(name), file)
        except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
            raise UserError(
                f"{file} cannot be fetched from {base_url} ({error}). Give a mirror of it as --data.base_url, or, without a "
                "network, fetch LLM-Adapters' dataset/ and ft-training_set/ elsewhere and give --data.directory"
            ) from error
        if (got := blob_id(Path(name))) != BLOB_IDS[file]:
            raise UserError(
                f"{file} from {base_url} is not the file of commit {COMMIT[:12]}: git blob {got}, expected {BLOB_IDS[file]}; "
                "is there a proxy that answers in its place?"
            )
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _without_first_folder(file: str) -> str:
    return str(PurePosixPath(*PurePosixPath(file).parts[1:]))
