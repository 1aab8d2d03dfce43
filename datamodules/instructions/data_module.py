"""The LightningDataModule of instruction data: trains on a mix of sets, evaluates several sets side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.instructions.benchmarks import Benchmark, TrainSet
from datamodules.instructions.dataset import Collator, EvaluationDataset, Example, TrainDataset
from datamodules.instructions.mixture.checks import check_columns, check_streaming
from datamodules.instructions.mixture.inventory import Inventory
from datamodules.instructions.mixture.mixing import (
    HELD_OUT,
    Source,
    choices,
    custom_tests,
    evaluation_sources,
    hold_out,
    train_sources,
)
from datamodules.instructions.packing import PackedDataset
from datamodules.instructions.reading.rows import HUB, HubSplit
from datamodules.instructions.reading.source import Files, LocalFiles, PinnedFiles
from datamodules.instructions.streaming import Stream, StreamedDataset, StreamShare, num_batches
from datamodules.instructions.synthetic import write_synthetic
from datamodules.instructions.tokenizing.chat import CHAT, ChatTokenizer
from datamodules.instructions.tokenizing.prompts import STYLES
from datamodules.instructions.tokenizing.templates import template_text
from datamodules.instructions.tokenizing.text import ExampleTokenizer, InstructionTokenizer
from datamodules.shared.arguments import require
from datamodules.shared.data_module import TextDataModule, one_or_all
from datamodules.shared.loading import TrainLoader
from datamodules.shared.sampling import num_shares, run_seed
from datamodules.shared.user_cache import default_cache_directory
from fourier_moe.errors import UserError

_WORTH_CACHING = 20_000  # training examples; fewer are tokenized in seconds


class InstructionDataModule(TextDataModule):
    """Questions with gold answers for language models: a user's own, or as the base of the benchmarks' DataModules, which bring
    the tables.

    A training batch is a dict: `input_ids`, `attention_mask` and `labels` int64 (B, T), right-padded, with labels -100 where
    there is no loss; `id` and `task` (the source), lists of B strings; of packed rows also `position_ids` int64 (B, T). An
    evaluation batch adds `prompt_ids` and `prompt_mask` int64 (B, T), left-padded, and the lists `prompt`, `answer`,
    `benchmark`, `choices`, `responses` and `end_tokens`; it has the first three tensors only where the set has right responses.

    Args:
        train: what to train on: names from the table, custom (train.json, .jsonl, .ndjson or .parquet in `directory`), paths of
            such files (with instruction, output, perhaps input and answer; or with messages, or ShareGPT's conversations), or
            data sets on the hub (hub:owner/name, behind it @revision, /config and :split where they are needed); one, a list,
            or each with its weight, the number of times that each of its examples comes in an epoch (on average; 0.5 is every
            other epoch).
        test: which sets to test on: names from the table, custom (test.json in `directory`), or paths; null for all of the
            table, and without a table for custom if there is such a file. Training on files of your own
            alone fetches none of them: they are fetched when they are tested.
        tokenizer: name or directory of a Hugging Face tokenizer, or bytes. The command line takes the model's own.
        directory: local directory with LLM-Adapters' files, dataset/<set>/test.json and ft-training_set/<name>.json, or with
            the files of custom. Without it LLM-Adapters' files are fetched from LLM-Adapters' repository.
        base_url: address of a mirror of LLM-Adapters' repository, where its files are below dataset/ and ft-training_set/;
            None for GitHub. The files are checked in any case.
        cache_directory: where fetched files are kept, and the token ids of large training sets (Commonsense170K takes minutes),
            instead of the user's cache directory.
        max_length: of prompt and response in training, in tokens; see InstructionTokenizer for what is cut.
        batch_size: examples a batch and process.
        eval_batch_size: of validation, test and predict; null is batch_size.
        num_workers: loading processes of each loader; 0 loads in the main process.
        train_on_prompt: whether the prompt's tokens have a loss, too (LLM-Adapters' default).
        prompt: llm_adapters, the published figures' prompts with their white space; plain, a short one; or chat, the
            tokenizer's chat template, which conversations need. Every turn of the assistant has a loss.
        validation_size: training examples held out for validation; 0 for none.
        validation_sets: further sets to validate on, as in test.
        seed: decides which examples are held out. Their order in training follows the run's own seed (seed_everything).
        synthetic: generate tiny files in the official layout and read those.
        columns: what the fields of custom data are called there: instruction and output, perhaps input and answer, or messages
            for conversations, perhaps system and tools; null for these names themselves (and conversations for ShareGPT's).
        chat_template: with prompt chat: plain (User: ... Assistant: ...), or the path of a Jinja file, instead of the
            tokenizer's own template.
        packing: put several examples of a source into each row of up to `max_length` tokens in training, none of which sees
            another; `batch_size` then counts rows. A model that cannot keep them apart is refused.
        streaming: read the training set while training, for one that does not fit: one source of JSON lines, parquet or the
            hub. It needs trainer.max_steps; rows are shuffled among 10,000, the first `validation_size` are held out, and
            every process reads the whole stream.

    Raises:
        UserError: an argument is invalid.
    """

    benchmarks: ClassVar[Mapping[str, Benchmark]] = {}
    train_sets: ClassVar[Sequence[TrainSet]] = ()
    keeps_workers = False  # those of many test sets would all stay

    def __init__(
        self,
        train: dict[str, float] | list[str] | str,
        test: list[str] | None = None,
        tokenizer: str | None = None,
        directory: str | None = None,
        base_url: str | None = None,
        cache_directory: str | None = None,
        max_length: int = 512,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        train_on_prompt: bool = False,
        prompt: Literal["llm_adapters", "plain", "chat"] = "llm_adapters",
        validation_size: int = 120,
        validation_sets: list[str] | None = None,
        seed: int = 0,
        synthetic: bool = False,
        columns: dict[str, str] | None = None,
        chat_template: str | None = None,
        packing: bool = False,
        streaming: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            max_length,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            directory=directory,
            synthetic=synthetic,
        )
        if prompt not in (*STYLES, CHAT):
            raise UserError(f"prompt must be one of {', '.join(STYLES)}, {CHAT}, got {prompt!r}")
        if chat_template is not None and prompt != CHAT:
            raise UserError(f"chat_template '{chat_template}' has no effect with prompt {prompt}; set prompt to {CHAT}")
        require("max_length", max_length, max_length >= 2, "2 or more")
        require("eval_batch_size", eval_batch_size, eval_batch_size is None or eval_batch_size >= 1, "1 or more")
        require("validation_size", validation_size, validation_size >= 0, "0 or more")
        is_address = base_url is None or base_url.startswith(("http://", "https://"))
        require("base_url", base_url, is_address, "an address that begins with http:// or https://")
        if self._directory is not None and not self._directory.is_dir():
            raise UserError(f"directory '{directory}' is no directory; expected LLM-Adapters' dataset/ and ft-training_set/")
        if test is not None and not test:
            raise UserError(f"test is empty; {choices(self.benchmarks)}")
        self._sources = train_sources(train, self.train_sets, self._directory)
        if test is None:
            test = list(self.benchmarks) or custom_tests(self._directory)
        self._test_sources = evaluation_sources("test", test, self.benchmarks, self._directory)
        self._validation_sources = evaluation_sources(
            "validation_sets", validation_sets or [], self.benchmarks, self._directory
        )
        if streaming:
            check_streaming(self._sources, packing)
        check_columns(columns, [*self._sources, *self._test_sources, *self._validation_sources])

        self.eval_batch_size = eval_batch_size or batch_size
        self.train_on_prompt = train_on_prompt
        self.prompt = prompt
        self.packing, self.streaming = packing, streaming
        self.validation_size = validation_size
        self._cache_directory = default_cache_directory() if cache_directory is None else Path(cache_directory).expanduser()
        self._base_url = base_url
        self._files: Files | None = None
        self._train: TrainDataset | PackedDataset | StreamedDataset | None = None
        self._validation: dict[str, EvaluationDataset] = {}
        self._test: dict[str, EvaluationDataset] = {}
        self._columns = columns
        self.chat_template = None if chat_template is None else template_text(chat_template)
        self._inventory = self._new_inventory()
        self._stream = Stream(self._sources[0], columns)

    @property
    def evaluation_notes(self) -> dict[str, str]:
        """What a reader of the results has to know, by name of the test set; sets without a note are left out."""
        validated = {source.name for source in self._validation_sources}
        notes = {
            source.name: self._inventory.note(source, is_validated=source.name in validated) for source in self._test_sources
        }
        return {name: note for name, note in notes.items() if note}

    @property
    def data_revision(self) -> str | None:
        """The revision of the hub's data set, where `train` names it."""
        on_hub = [HubSplit.parse(source.file) for source in self._sources if source.file.startswith(HUB)]
        return on_hub[0].revision if len(on_hub) == len(self._sources) == 1 else None

    def prepare_data(self) -> None:
        """Fetch the files and the tokenizer that this run needs, and tokenize a large training set, in one process."""
        self._coder()
        stage = None if self.trainer is None else self.trainer.state.fn
        trains = stage in (None, "fit") or (stage == "validate" and self.validation_size > 0)
        if self.trainer is not None and stage == "fit" and self.streaming:
            num_batches(self.trainer)
        sources = self._sources if trains else []
        if stage in (None, "fit", "validate"):
            sources = sources + self._validation_sources
        if stage != "validate":
            sources = sources + self._tests_of(stage)
        for source in sources:
            if not source.custom:
                self._open().get(source.file)
            elif source.file.startswith(HUB) and not (self.streaming and source in self._sources):
                HubSplit.parse(source.file).load()
        if stage == "fit" and not self.streaming:
            examples = self._new_inventory().read(self._sources, self._open(), "train")
            if len(examples) >= _WORTH_CACHING:
                self._train_dataset(hold_out(examples, self.validation_size, self.seed)[0])

    def setup(self, stage: str) -> None:
        """Read, check and tokenize what the stage needs, once. "fit" checks the test sets, too.

        Raises:
            UserError: a file is missing or malformed, files or tokenizer cannot be fetched, or max_length is too small for the
                prompt.
        """
        inventory, files = self._inventory, self._open()
        inventory.lines.clear()
        train: list[Example] = []
        tests: dict[str, list[Example]] = {}
        trains = stage == "fit" and self._train is None
        if trains or (stage == "validate" and not self._validation and self.validation_size):
            if self.streaming:
                held_out = self._stream.hold_out(self.validation_size) if self.validation_size else []
                inventory.lines.append(f"  train {self._stream.source.name}: streamed, its first {len(held_out)} held out")
            else:
                train = inventory.read(self._sources, files, "train")
                kept, held_out = hold_out(train, self.validation_size, self.seed)
        if trains and self.streaming:
            self._train = self._streamed_dataset()
        elif trains:
            dataset = self._train_dataset(kept)
            inventory.lines.append(self._describe_train(dataset))
            self._train = self._packed(dataset) if self.packing else dataset
        if stage in ("fit", "validate") and not self._validation:
            sets = {HELD_OUT: held_out} if self.validation_size else {}
            sets |= {source.name: inventory.read([source], files, "validation") for source in self._validation_sources}
            self._validation = {name: self._evaluation_dataset(examples) for name, examples in sets.items()}
        new = [] if stage == "validate" else [test for test in self._tests_of(stage) if not inventory.is_compared(test)]
        if new:
            tests = {source.name: inventory.read([source], files, "test") for source in new}
            inventory.compare(train or self._train_without_network(), tests)
        if stage in ("test", "predict") and not self._test_sources:
            raise UserError(f"test is missing, and {stage} has nothing to read; {choices(self.benchmarks)}")
        if stage in ("test", "predict") and not self._test:
            for source in self._test_sources:
                examples = tests[source.name] if source.name in tests else inventory.read([source], files, "test")
                self._test[source.name] = self._evaluation_dataset(examples)
        if inventory.lines:
            head = f"{type(self).__name__}: tokenizer {self.tokenizer}, prompt {self.prompt}"
            rank_zero_info("\n".join([head, *inventory.lines]))

    def forget(self) -> None:
        self._files = None

    @property
    def batch_keys(self) -> tuple[str, ...]:
        return ("input_ids", "attention_mask", "labels", *(("position_ids",) if self.packing else ()))

    @property
    def collate(self) -> Collator:
        return Collator(self.load_tokenizer().pad_token_id)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self._train is not None
        if isinstance(self._train, StreamedDataset):
            assert self.trainer is not None
            share = StreamShare(len(self._train), self.batch_size, self.trainer)
            return TrainLoader(sampler=share, generator=torch.Generator(), **self._loader_options(self._train, self.batch_size))
        weight_of = {source.name: source.weight for source in self._sources}
        weights = None if set(weight_of.values()) == {1.0} else [weight_of[str(task)] for task in self._train.tasks]
        return self.train_loader(self._train, lengths=self._train.lengths, weights=weights)

    def val_dataloader(self) -> Any:
        return one_or_all(self._evaluation_loaders(self._validation)) if self._validation else []

    def test_dataloader(self) -> dict[str, DataLoader[dict[str, Any]]]:
        return self._evaluation_loaders(self._test)

    def predict_dataloader(self) -> dict[str, DataLoader[dict[str, Any]]]:
        return self._evaluation_loaders(self._test)

    def _evaluation_loaders(self, sets: Mapping[str, EvaluationDataset]) -> dict[str, DataLoader[dict[str, Any]]]:
        return self.evaluation_loaders(sets, self.eval_batch_size)

    def _train_dataset(self, examples: Sequence[Example]) -> TrainDataset:
        cache = self._cache_directory / "tokens" if len(examples) >= _WORTH_CACHING else None
        return TrainDataset(examples, self._coder(), train_on_prompt=self.train_on_prompt, cache_directory=cache)

    def _streamed_dataset(self) -> StreamedDataset:
        assert self.trainer is not None, "the trainer knows max_steps"
        return StreamedDataset(
            self._stream,
            self._coder(),
            seed=run_seed(self.trainer),
            length=num_batches(self.trainer) * self.batch_size * num_shares(self.trainer),
            train_on_prompt=self.train_on_prompt,
        )

    def _packed(self, examples: TrainDataset) -> PackedDataset:
        packed = PackedDataset(examples, self.max_length)
        filled = sum(packed.lengths) / (len(packed) * self.max_length)
        self._inventory.lines.append(
            f"  packed into {len(packed):,} rows of {self.max_length} tokens, {filled:.0%} of them filled"
        )
        return packed

    def _evaluation_dataset(self, examples: Sequence[Example]) -> EvaluationDataset:
        return EvaluationDataset(examples, self._coder(), train_on_prompt=self.train_on_prompt)

    def _new_inventory(self) -> Inventory:
        return Inventory(self._sources, self.train_sets, self._columns)

    def _coder(self) -> ExampleTokenizer:
        if self.prompt == CHAT:
            return ChatTokenizer(self.load_tokenizer(), self.chat_template, self.max_length)
        return InstructionTokenizer(self.load_tokenizer(), STYLES[self.prompt], self.max_length)

    def _open(self) -> Files:
        if self._files is None:
            if self.synthetic:
                self._files = LocalFiles(self._generate())
            elif self._directory is not None:
                self._files = LocalFiles(self._directory)
            else:
                self._files = PinnedFiles(self._cache_directory, self._base_url)
        return self._files

    def _generate(self) -> Path:
        root = self.generated_directory()
        self.write_synthetic(root)
        return root

    def write_synthetic(self, directory: Path) -> None:
        """Write a tiny generated file for every row of the tables."""
        write_synthetic(directory, self.benchmarks.values(), self.train_sets)

    def _describe_train(self, train: TrainDataset) -> str:
        cut = (
            f"longer than {self.max_length} tokens: {train.questions_cut:,} questions and {train.responses_cut:,} responses cut"
        )
        longest = f"median length {sorted(train.lengths)[len(train) // 2]} tokens"
        return f"  {len(train):,} to train on, {self.validation_size:,} held out; {longest}; {cut}"

    def _tests_of(self, stage: str | None) -> list[Source]:
        """Return the test sets that a stage reads: of training on one's own files alone, those for which nothing is fetched."""
        if stage != "fit" or not all(source.custom for source in self._sources):
            return self._test_sources
        return [source for source in self._test_sources if source.custom or self._open().has(source.file)]

    def _train_without_network(self) -> list[Example]:
        """Return the training examples for test and predict, which need them only for a note; none if they are not on disk."""
        if self.streaming or not all(source.custom or self._open().has(source.file) for source in self._sources):
            return []
        return self._new_inventory().read(self._sources, self._open(), "train")
