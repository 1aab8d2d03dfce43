"""Streamed training sets: every row once a pass, shared without duplicates, resumed exactly."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from lightning import Callback
from lightning.pytorch.loops.progress import _BatchProgress
from support.language_models import ADAPTER, TinyLanguageModel, language_trainer

from datamodules import InstructionDataModule
from datamodules.instructions import streaming
from datamodules.instructions.reading.rows import stream_rows
from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup

ROWS = [{"instruction": f"{number} + 1?", "output": str(number + 1)} for number in range(40)]
ARGUMENTS = {"tokenizer": "bytes", "prompt": "plain", "num_workers": 0, "batch_size": 2, "validation_size": 0}
ARGUMENTS |= {"streaming": True, "max_length": 100}
RATES = Optimization(experts=ParameterGroup(0.05))
SILENT = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture
def directory(tmp_path):
    lines = [*map(json.dumps, [*ROWS[:20], SILENT, *ROWS[20:]])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


def module(folder, trainer, **arguments):
    data = InstructionDataModule(**({"train": "custom", "directory": str(folder)} | ARGUMENTS | arguments))
    data.trainer = trainer
    data.setup("fit")
    return data


class Trainer:
    """What a DataModule reads of a trainer, of one of two processes."""

    def __init__(self, rank=0, world_size=1, max_steps=10, accumulate=1):
        self.world_size, self.max_steps, self.accumulate_grad_batches = world_size, max_steps, accumulate
        self.distributed_sampler_kwargs = {"num_replicas": world_size, "rank": rank} if world_size > 1 else None
        self.callbacks, self.strategy = [], self
        self.overfit_batches = 0
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=_BatchProgress()))
        self.state = type("State", (), {"fn": "fit"})

    def broadcast(self, value):
        return torch.initial_seed()


def ids(data):
    return [batch["id"] for batch in data.train_dataloader()]


def test_rows_come_once_a_pass_shuffled_and_the_first_are_held_out(directory, monkeypatch):
    monkeypatch.setattr(streaming, "SHUFFLED", 8)
    data = module(directory, Trainer(max_steps=36), validation_size=4)
    found = [id_ for batch in ids(data) for id_ in batch]
    everything = {f"custom/{number}" for number in range(4, 41)} - {"custom/20"}
    for one in (found[:36], found[36:]):
        assert set(one) == everything
        assert len(one) == 36
    assert found[:36] != found[36:]
    assert found[:36] != sorted(found[:36], key=lambda id_: int(id_.partition("/")[2]))
    assert {id_ for batch in data.val_dataloader() for id_ in batch["id"]} == {f"custom/{number}" for number in range(4)}
    assert Counter(found).most_common(1)[0][1] == 2


@pytest.mark.parametrize(("files", "num_workers"), [(0, 0), (0, 2), (1, 2), (2, 2)])
def test_processes_and_workers_share_the_stream_of_one(directory, monkeypatch, files, num_workers):
    """`files` of a set of the hub, which `datasets` would share among workers by itself; 0 is a local file."""
    (directory / "owner/rows").mkdir(parents=True)
    for number in range(files):
        shard = datasets.Dataset.from_list(ROWS).shard(files, number, contiguous=True)
        shard.to_parquet(directory / f"owner/rows/train-{number:05d}-of-{files:05d}.parquet")
    monkeypatch.chdir(directory)
    given = {"train": "hub:owner/rows" if files else "custom", "validation_size": 4}
    whole = ids(module(directory, Trainer(max_steps=9), batch_size=4, **given))
    shares = [ids(module(directory, Trainer(rank, 2, 9), num_workers=num_workers, **given)) for rank in range(2)]
    together = [[id_ for pair in zip(*batches, strict=True) for id_ in pair] for batches in zip(*shares, strict=True)]
    assert [sorted(batch) for batch in together] == [sorted(batch) for batch in whole]
    found = {int(id_.partition("/")[2]) for batch in whole for id_ in batch}
    assert found == set(range(4, 40)) if files else found == set(range(4, 41)) - {20}


def test_it_resumes_at_the_next_batch(directory):
    loader, other = (module(directory, Trainer(accumulate=2)).train_dataloader() for _ in range(2))
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    other.load_state_dict(loader.state_dict())
    rest = [batch["id"] for batch in batches]
    assert [batch["id"] for batch in other] == rest
    assert len(rest) == 17


class SaveAtStep2(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "2.ckpt")


def test_a_run_that_resumes_from_a_checkpoint_ends_with_the_same_weights(directory):
    def run(*callbacks, checkpoint=None):
        data = InstructionDataModule("custom", **ARGUMENTS, directory=str(directory))
        adapted = AdaptationModule(TinyLanguageModel(), ADAPTER, RATES)
        language_trainer(directory, *callbacks, max_steps=4).fit(adapted, data, ckpt_path=checkpoint)
        return {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}

    whole = run(SaveAtStep2())
    resumed = run(checkpoint=directory / "2.ckpt")
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_epochs_and_a_finished_run_that_goes_on_begin_behind_the_last_example(directory, monkeypatch):
    monkeypatch.setattr(streaming, "SHUFFLED", 4)

    class Seen(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.extend(batch["id"])

    def run(checkpoint=None, **options):
        data = InstructionDataModule("custom", **ARGUMENTS, directory=str(directory))
        trainer = language_trainer(directory, Seen(), SaveAtStep2(), **options)
        trainer.fit(AdaptationModule(TinyLanguageModel(), ADAPTER, RATES), data, ckpt_path=checkpoint)
        return trainer

    whole = ids(module(directory, Trainer(max_steps=8)))
    seen = []
    run(max_steps=3, limit_train_batches=1).save_checkpoint(directory / "3.ckpt")
    run(directory / "3.ckpt", max_steps=8, limit_train_batches=3)
    assert seen == [id_ for batch in whole for id_ in batch]
    seen.clear()
    run(directory / "2.ckpt", max_steps=4)
    assert seen == [id_ for batch in whole[2:4] for id_ in batch]


def test_other_files_are_streamed_too(directory, tmp_path, monkeypatch):
    folder = tmp_path / "owner/rows"
    folder.mkdir(parents=True)
    (tmp_path / "rows.parquet").rename(folder / "train-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    for file in ("owner/rows/train-00000-of-00001.parquet", "hub:owner/rows:train"):
        assert [row.item() for row in stream_rows(file)] == ROWS
    found = ids(module(directory, Trainer(), train="hub:owner/rows", directory=None))
    assert len({id_ for batch in found for id_ in batch}) == 20


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, {"max_steps": -1}, "streaming has no end, and trainer.max_steps is -1; set it to the number of optimizer steps"),
        (None, {"overfit_batches": 2}, "streaming and trainer.overfit_batches=2 cannot be used together"),
        (None, {"validation_size": 50}, "validation_size=50 would hold out all 40 training examples"),
        (None, {"validation_size": 40}, "has nothing to train on: the first 41 of its 41 records are held out; give a smaller"),
        ("", {}, "train.jsonl' has nothing to train on: it has no records"),
        ("", {"validation_size": 1}, "train.jsonl' has nothing to train on: it has no records"),
        (json.dumps(SILENT), {"validation_size": 1}, "train.jsonl' has nothing to train on: no record that has a response"),
        (json.dumps(ROWS), {}, r"train.jsonl' is a JSON list, which can only be read whole; write one object a line"),
        (json.dumps(SILENT), {}, "train.jsonl' has nothing to train on: no record that has a response to learn"),
        ("{", {}, "train.jsonl' line 1 is not valid JSON"),
        (b'{"instruction": "\xff"}', {}, "train.jsonl' line 1 is not UTF-8 text"),
    ],
)
def test_mistakes_are_named(directory, content, arguments, message):
    if content is not None:
        (directory / "train.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())

    def read():
        trainer = Trainer(max_steps=4)
        of_trainer = {name: value for name, value in arguments.items() if hasattr(trainer, name)}
        vars(trainer).update(of_trainer)
        given = {name: value for name, value in arguments.items() if name not in of_trainer}
        next(iter(module(directory, trainer, **given).train_dataloader()))

    with pytest.raises(ValueError, match=message):
        read()
