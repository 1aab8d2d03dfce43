"""Data sets on the Hugging Face hub: the parquet files of the splits in use, and no others."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from fourier_moe.files.hub_files import HubError, Listing, Repository


class HubDataset:
    """The parquet files of one data set.

    Args:
        name: what it is called here, for errors.
        hub_id: what it is called on the hub.
        folders: where its files may be there, the first choice first; "" is the top.
        revision: branch, tag or commit; None for the newest commit.
        otherwise: what to do without the hub, for errors.
    """

    def __init__(self, name: str, hub_id: str, folders: Sequence[str], revision: str | None, otherwise: str) -> None:
        self._name, self._folders, self._otherwise = name, folders, otherwise
        self._repository = Repository(hub_id, "dataset", revision)
        self._listing: Listing | None = None

    @property
    def origin(self) -> str:
        """Where the files come from, in words."""
        at = f" at {self.commit[:7]}" if self.commit else ""
        return f"hub id '{self._repository.name}'{at}"

    @property
    def commit(self) -> str | None:
        """The commit that files are taken from; None before the first of them."""
        return None if self._listing is None else self._listing.commit

    def look_up(self) -> None:
        """Ask the hub for the newest files of the revision.

        Raises:
            HubError: the hub does not answer, and nothing is in the cache.
        """
        try:
            self._listing = self._repository.look_up(rank_zero_info)
        except HubError as error:
            raise self._failed(error) from error

    def files(self, splits: Collection[str]) -> dict[str, list[Path]]:
        """Return the files of each split, in row order; fetch those that are not in the cache.

        Raises:
            HubError: they cannot be fetched, or there are none of a split.
        """
        if self._listing is None:
            self._listing = self._in_cache(splits)
        if self._listing is None:
            self.look_up()
        assert self._listing is not None
        try:
            paths = {split: split_files(self._listing.sizes, self._folders, split) for split in splits}
            found = iter(self._listing.fetch([path for of_split in paths.values() for path in of_split], rank_zero_info))
        except HubError as error:
            raise self._failed(error, self._listing.problem) from error
        return {split: [next(found) for _ in of_split] for split, of_split in paths.items()}

    def _in_cache(self, splits: Collection[str]) -> Listing | None:
        """Return what a process that asked the hub has left in the cache; None if something is missing."""
        listing = self._repository.cached()
        try:
            complete = listing is not None and all(split_files(listing.sizes, self._folders, split) for split in splits)
        except HubError:
            complete = False
        return listing if complete else None

    def _failed(self, error: HubError, problem: str | None = None) -> HubError:
        incomplete = f"; the cache is all there is, because of {problem}" if problem else ""
        return HubError(
            f"dataset '{self._name}' cannot be loaded from the Hugging Face hub as '{self._repository}' ({error}{incomplete}). "
            f"{self._otherwise}"
        )


def split_files(paths: Mapping[str, int] | Collection[str], folders: Sequence[str], split: str) -> list[str]:
    """Return a split's parquet files in row order: `train.parquet`, or `train-00000-of-00002.parquet` and so on.

    Raises:
        HubError: there are none, or not all of the numbered ones.
    """
    name = re.compile(rf"{re.escape(split)}(?:-(\d+)-of-(\d+))?(?:-[0-9a-f]{{16}})?\.parquet")
    for folder in folders:
        beside = [path for path in paths if str(Path(path).parent) == (folder or ".")]
        found = {path: match for path in sorted(beside) if (match := name.fullmatch(Path(path).name))}
        if found:
            count = int(next(iter(found.values()))[2] or 1)
            if len(found) != count:
                raise HubError(f"{len(found)} of the {count} files of the {split} split are there")
            return list(found)
    where = " or ".join(f"{folder}/" if folder else "the top" for folder in folders)
    raise HubError(f"there are no files {split}*.parquet in {where}")
