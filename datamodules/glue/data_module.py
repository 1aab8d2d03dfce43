"""The GLUE tasks as one LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import datasets
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.glue.benchmarks import find_task
from datamodules.glue.custom import CustomSentences
from datamodules.glue.dataset import PadBatch, TextDataset
from datamodules.glue.directory import open_directory
from datamodules.glue.parquet import HubFiles
from datamodules.glue.source import Examples, GlueSource
from datamodules.glue.summary import SetSummary, summarize
from datamodules.glue.synthetic import write_tsv_files
from datamodules.glue.tokenization import TokenizedExamples, tokenize
from datamodules.shared.arguments import require
from datamodules.shared.custom import CUSTOM, current_name
from datamodules.shared.data_module import TextDataModule, incomplete, one_or_all
from datamodules.shared.sampling import hold_out
from datamodules.shared.splits import PREDICT, TEST, TRAIN, VALIDATION
from fourier_moe.errors import UserError

MAX_SELECTION = 5000
SELECTION, TESTED = "selection", "tested"  # parts of the data beside the splits
_PARTS_OF_STAGE = {
    "fit": (TRAIN, SELECTION, TESTED),  # the last to be read before hours of training rather than after
    "validate": (SELECTION,),
    "test": (TESTED,),
    "predict": (PREDICT,),
}
_ROLES = {TRAIN: "train", SELECTION: "val", TESTED: "test", PREDICT: "predict"}


class GlueDataModule(TextDataModule):
    """Sentences or sentence pairs and class labels of a GLUE task, from the Hugging Face hub, a directory, or generated.

    A batch is a dict, padded on the right to its longest example: `input_ids` and `attention_mask` int64 (B, T),
    `token_type_ids` likewise if the tokenizer gives them; `label` int64 (B,), absent for GLUE's test split; `id` list
    of B strings such as `train/17`.

    GLUE hides the labels of its test split, so what is tested (and published) is its validation split: one set, or for mnli
    a dict of loaders, `matched` and `mismatched`. Which checkpoint is best is decided elsewhere, on examples held out of
    train, unless `selection` says otherwise. `predict` goes through the test split.

    Args:
        dataset: cola, sst2, mrpc, qqp, mnli, qnli or rte; or custom, for labeled sentences of one's own in `directory`:
            `train.tsv` and `dev.tsv`, perhaps `test.tsv` (or .csv, .json, .jsonl), with columns `sentence`, or
            `sentence1` and `sentence2`, and `label`. With labels, the test file is what is tested.
        tokenizer: name or directory of a Hugging Face model whose tokenizer is taken, or bytes (a token per byte).
        directory: local directory to read instead of the hub: the task's folder, or the parent of one called like the task
            (`CoLA`). It has GLUE's official files (`train.tsv`, `dev.tsv`, perhaps `test.tsv`) or the hub's parquet
            files.
        revision: branch, tag or commit of the hub's data set; None for the newest commit.
        max_length: most tokens of an example; longer ones are cut.
        batch_size: examples a batch and process.
        num_workers: loading processes of each loader; 0 loads in the main process.
        selection: what the validation loader, which decides on the best checkpoint, goes through: train (a part held out of
            it) or validation (what is tested, as many publications do: its best epoch is then an optimistic figure). Data of
            one's own with a dev file and a labeled test file are selected on the dev file in any case.
        selection_fraction: share of train that is held out, at most 5,000 examples.
        seed: decides which examples are held out. Their order in training follows the run's own seed.
        cache_directory: where token ids are kept from run to run; None for the cache of the `datasets` library. Those of
            generated data go with them.
        predict_split: test or validation; None for test where there is one, else validation.
        synthetic: generate a tiny data set and read that, for trying things out without data.

    Raises:
        UserError: an argument is invalid, or the directory holds nothing of the task.
    """

    def __init__(
        self,
        dataset: str,
        tokenizer: str | None = None,
        directory: str | None = None,
        revision: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        selection: Literal["train", "validation"] = "train",
        selection_fraction: float = 0.1,
        seed: int = 0,
        cache_directory: str | None = None,
        predict_split: Literal["test", "validation"] | None = None,
        synthetic: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            max_length,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            directory=directory,
            synthetic=synthetic,
            revision=revision,
        )
        require("max_length", max_length, max_length >= 8, "8 or more")
        require("selection", selection, selection in (TRAIN, VALIDATION), "train or validation")
        require("selection_fraction", selection_fraction, 0 < selection_fraction < 1, "between 0 and 1, exclusive")
        require("predict_split", predict_split, predict_split in (None, TEST, VALIDATION), "test, validation or null")
        dataset = current_name(dataset, former="own")
        if dataset == CUSTOM:
            if directory is None:
                raise UserError(f"dataset '{CUSTOM}' needs directory, the folder of its train and dev files")
            custom = CustomSentences(Path(directory).expanduser())
            if selection == VALIDATION and VALIDATION not in custom.splits:
                raise UserError(f"selection=validation needs a dev file; {custom.missing(VALIDATION)}, or leave selection out")
            self.dataset, self._task = CUSTOM, custom.task
        else:
            custom = None
            self.dataset, self._task = find_task(dataset)

        self.selection = selection
        self.selection_fraction = selection_fraction
        self._cache_directory = None if cache_directory is None else Path(cache_directory).expanduser()
        self._predict_split = predict_split
        self._source: GlueSource | None = custom
        self._splits: dict[str, tuple[Examples, TokenizedExamples]] = {}
        self._datasets: dict[str, dict[str, TextDataset]] = {}
        if self._directory is not None:
            self._open()

    @property
    def dataset_name(self) -> str:
        return self.dataset

    @property
    def batch_keys(self) -> tuple[str, ...]:
        return "input_ids", "attention_mask", "label"

    @property
    def class_names(self) -> list[str]:
        """The name of each class, by label."""
        return list(self._task.class_names)

    @property
    def metrics(self) -> list[str]:
        """GLUE's metrics for the task: accuracy, and perhaps f1 (of the second class) or matthews."""
        return list(self._task.metrics)

    @property
    def data_revision(self) -> str | None:
        """The commit of the hub's data set that was read; None for other data."""
        return None if self._source is None else self._source.revision

    @property
    def evaluation_notes(self) -> dict[str, str]:
        """What a reader of the results has to know, by name of the test set; a single set is called test."""
        sets = self._task.splits(VALIDATION)
        notes = {"test" if len(sets) == 1 else name: self._incomplete(split) for name, split in sets.items()}
        return {name: note for name, note in notes.items() if note}

    def prepare_data(self) -> None:
        """Download and tokenize, in one process, what this run needs."""
        stage = None if self.trainer is None else self.trainer.state.fn
        if stage is None or self.synthetic:  # every process generates its own files
            return
        self._open().look_up()
        for part in _PARTS_OF_STAGE[stage.value]:
            for split in self._splits_of(part).values():
                self._load(split)

    def setup(self, stage: str) -> None:
        """Load what the stage needs, once.

        Raises:
            UserError: the tokenizer cannot be loaded or does not take max_length tokens, a split is missing or has no
                examples, a line or label cannot be read, or the hub cannot be reached.
        """
        parts = [part for part in _PARTS_OF_STAGE[stage] if part not in self._datasets]
        for part in parts:
            self._datasets[part] = {name: self._build(part, split) for name, split in self._splits_of(part).items()}
        if parts:
            rank_zero_info(self._summary(parts))

    def forget(self) -> None:
        self._source = None
        self._splits.clear()
        self._datasets.clear()

    def datasets(self, part: str) -> dict[str, TextDataset]:
        """After `setup`: the sets of `train`, `selection`, `tested` or `predict`; more than one for mnli."""
        return self._datasets[part]

    @property
    def collate(self) -> PadBatch:
        return PadBatch(self.load_tokenizer().pad_token_id)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        dataset = self.datasets(TRAIN)[TRAIN]
        return self.train_loader(dataset, lengths=dataset.lengths)

    def val_dataloader(self) -> Any:
        return one_or_all(self.evaluation_loaders(self.datasets(SELECTION)))

    def test_dataloader(self) -> Any:
        return one_or_all(self.evaluation_loaders(self.datasets(TESTED)))

    def predict_dataloader(self) -> Any:
        return one_or_all(self.evaluation_loaders(self.datasets(PREDICT)))

    def _open(self) -> GlueSource:
        """Open the data wherever they are, once."""
        if self._source is None:
            if self.synthetic:
                self._source = open_directory(self._generate(), self.dataset, self._task)
            elif self._directory is not None:
                self._source = open_directory(self._directory, self.dataset, self._task)
            else:
                self._source = HubFiles(self.dataset, self._task, self._revision)
        return self._source

    def _generate(self) -> Path:
        root = self.generated_directory()
        self._cache_directory = root / "cache"
        folder = root / self._task.folder
        folder.mkdir()
        write_tsv_files(folder, self._task)
        return folder

    def _load(self, split: str) -> tuple[Examples, TokenizedExamples]:
        if split not in self._splits:
            source = self._open()
            if split not in source.splits:
                raise UserError(f"{self.dataset} has no {split} split in {source.origin}; {source.missing(split)}")
            examples = source.load(split)
            cache = self._cache_directory or Path(datasets.config.HF_DATASETS_CACHE, "fourier_moe_tokens")
            tokens = tokenize(examples, self.load_tokenizer(), self.max_length, cache)
            self._splits[split] = replace(examples, sentences=()), tokens  # the text, hundreds of megabytes, is done with
        return self._splits[split]

    def _splits_of(self, part: str) -> dict[str, str]:
        """Return the splits that a part of the data is taken from, by the name of the evaluation set."""
        if part == SELECTION:
            part = self._selection
        elif part == TESTED:
            part = self._task.tested
        elif part == PREDICT:
            has_test = self._open().splits >= set(self._task.splits(TEST).values())
            part = self._predict_split or (TEST if has_test else VALIDATION)
        return self._task.splits(part)

    @property
    def _selection(self) -> str:
        """The split that decides on the best checkpoint: a dev file where there is a test file to be tested."""
        has_both = self._task.tested == TEST and VALIDATION in self._open().splits
        return VALIDATION if has_both else self.selection

    def _incomplete(self, split: str) -> str:
        """Return how many examples a split has if the table says another number; empty for a complete one."""
        count = len(self._splits[split][0]) if split in self._splits else None
        return incomplete(count, self._task.sizes.get(split), "examples")

    def _build(self, part: str, split: str) -> TextDataset:
        examples, tokens = self._load(split)
        indices: Sequence[int] = range(len(examples))
        if split == TRAIN and self._selection == TRAIN:
            assert examples.labels is not None
            fraction = min(self.selection_fraction, MAX_SELECTION / len(examples))
            indices = hold_out(examples.labels, fraction, self.seed)[part == SELECTION]
        sentences = self._open().load(split).sentences if part == PREDICT else ()  # predictions show what they are of
        return TextDataset(examples, tokens, indices, sentences)

    def _summary(self, parts: list[str]) -> str:
        """Return a summary of the data, for the log."""
        sets = [
            SetSummary(
                _ROLES[part] if name == split else f"{_ROLES[part]}/{name}",
                split,
                len(self._datasets[part][name]),
                is_selection=part == SELECTION,
                is_tested=split in self._splits_of(TESTED).values(),
                owner="its own" if self.dataset == CUSTOM else "GLUE's",
            )
            for part in parts
            for name, split in self._splits_of(part).items()
        ]
        splits = [self._splits[split] for split in sorted({summary.split for summary in sets})]
        if self.synthetic:
            return summarize(self.dataset, self.class_names, sets, splits, self.max_length, f"generated {self._open().origin}")
        found = {summary.split: self._incomplete(summary.split) for summary in sets}
        notes = [f"{split} has {note}" for split, note in found.items() if note]
        return summarize(self.dataset, self.class_names, sets, splits, self.max_length, self._open().origin, notes)
