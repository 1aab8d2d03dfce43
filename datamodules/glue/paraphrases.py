"""MRPC as Microsoft publishes it. GLUE's validation split is a part of that train file, listed in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from datamodules.glue.benchmarks import TEST, TRAIN, VALIDATION, GlueTask
from datamodules.glue.files import TsvFiles, read_tsv
from datamodules.glue.source import Examples
from datamodules.shared.text_files import read_text

_TRAIN_FILE, _TEST_FILE, _LIST = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"


class ParaphraseFiles(TsvFiles):
    """msr_paraphrase_train.txt, dev_ids.tsv (pairs of sentence ids: GLUE's validation split) and msr_paraphrase_test.txt."""

    def load(self, split: str) -> Examples:
        """The examples of a split; train and validation are told apart by the list, without which neither is there."""
        path = self._files[split]
        if split == TEST:
            return read_tsv(path, self._task, split)
        listed = {tuple(line.split("\t")) for line in read_text(path.parent / _LIST).splitlines()}

        def accept(row: Mapping[str, str]) -> bool:
            return ((row["#1 ID"], row["#2 ID"]) in listed) == (split == VALIDATION)

        return read_tsv(path, self._task, split, accept)

    def missing(self, split: str) -> str:
        return f"expected {_TEST_FILE if split == TEST else f'{_TRAIN_FILE} and {_LIST}'}, or GLUE's own files, there"


def find_paraphrase_files(folder: Path, task: GlueTask) -> ParaphraseFiles | None:
    """Microsoft's files, if there are any."""
    train, test = folder / _TRAIN_FILE, folder / _TEST_FILE
    if not (train.is_file() or test.is_file()):
        return None
    files = {TEST: test} if test.is_file() else {}
    if train.is_file() and (folder / _LIST).is_file():
        files |= {TRAIN: train, VALIDATION: train}
    return ParaphraseFiles(task, files, folder)
