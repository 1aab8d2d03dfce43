import pickle
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from support import REPOSITORY
from support.recorder import Recorder, trainer

from datamodules import GlueDataModule
from datamodules.glue import data_module as glue
from datamodules.glue import tokenization
from datamodules.glue.benchmarks import TASKS
from datamodules.glue.synthetic import write_tsv_files
from datamodules.shared.tokenizers import load_tokenizer

SHARED = REPOSITORY.parent / "shared"


def module(dataset="rte", tokenizer: str | None = "bytes", **arguments) -> GlueDataModule:
    return GlueDataModule(dataset, tokenizer, **{"batch_size": 4, **arguments})


def loaded(stage, dataset="rte", **arguments) -> GlueDataModule:
    data = module(dataset, **arguments)
    data.setup(stage)
    return data


def ids(loader) -> list[str]:
    return [name for batch in loader for name in batch["id"]]


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(glue, "rank_zero_info", told.append)
    return told


@pytest.fixture
def directory(tmp_path) -> Path:
    """The parent of the folders of two tasks."""
    for name in ("rte", "mnli"):
        folder = tmp_path / "glue" / TASKS[name].folder
        folder.mkdir(parents=True)
        write_tsv_files(folder, TASKS[name])
    return tmp_path / "glue"


class GlueRecorder(Recorder):
    def __init__(self):
        super().__init__("label")

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        assert "label" not in batch
        self.seen += batch["id"]


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "wnli"}, r"dataset 'wnli' is unknown .*choose one of cola, sst2, mrpc, qqp, mnli, qnli, rte"),
        ({"tokenizer": None}, "tokenizer is missing; give the name or directory of a Hugging Face model, or bytes"),
        ({"max_length": 7}, "max_length must be 8 or more, got 7"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"selection": "test"}, "selection must be train or validation, got test"),
        ({"selection_fraction": 1.0}, "selection_fraction must be between 0 and 1, exclusive, got 1.0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"predict_split": "train"}, "predict_split must be test, validation or null, got train"),
        ({"directory": "no/where"}, "directory 'no/where' does not exist; expected a directory with RTE's files"),
        ({"directory": ".", "synthetic": True}, r"directory '\.' and synthetic cannot be used together"),
    ],
)
def test_invalid_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


def test_arguments_come_from_yaml_with_their_documentation():
    parser = ArgumentParser()
    parser.add_class_arguments(GlueDataModule, "data")
    assert "selection" in parser.format_help()
    data = parser.instantiate(parser.parse_object({"data": {"dataset": "CoLA", "tokenizer": "bytes"}})).data
    assert (data.dataset, data.num_classes, data.class_names) == ("cola", 2, ["unacceptable", "acceptable"])


def test_construction_needs_neither_hub_nor_tokenizer_files():
    data = module("mnli", "roberta-large")
    assert (data.num_classes, data.class_names) == (3, ["entailment", "neutral", "contradiction"])
    assert {name: module(name).metrics[1:] for name in TASKS if len(module(name).metrics) > 1} == {
        "cola": ["matthews"],
        "mrpc": ["f1"],
        "qqp": ["f1"],
    }


def test_missing_tokenizer_directory_stops_setup_in_one_line(directory):
    with pytest.raises(ValueError, match=r"tokenizer='\./nowhere'") as error:
        loaded("fit", tokenizer="./nowhere", directory=str(directory))
    assert "\n" not in str(error.value)


def test_more_tokens_than_the_model_takes_are_refused(directory, words):
    with pytest.raises(ValueError, match=r"max_length=65 is more than the 64 tokens that the model of tokenizer '.*' takes"):
        loaded("test", tokenizer=words, directory=str(directory), max_length=65)


# Splits


def test_fit_holds_a_part_of_train_out_and_says_so_once(directory, messages):
    data = loaded("fit", directory=str(directory))
    data.setup("fit")
    train, held_out = ids(data.train_dataloader()), ids(data.val_dataloader())
    assert (len(train), len(held_out)) == (72, 8)
    assert sorted(train + held_out) == sorted(f"train/{row}" for row in range(80))
    assert messages == [
        "rte: train 72 (GLUE's train split), val 8 (held out of train), test 16 (GLUE's validation split); "
        "2 classes: entailment, not_entailment; none over 128 tokens; train has 80 of the complete set's 2,490 examples; "
        f"validation has 16 of the complete set's 277 examples; from '{directory / 'RTE'}'"
    ]
    assert data.evaluation_notes == {"test": "16 of the complete set's 277 examples"}


def test_held_out_part_keeps_the_shares_of_the_classes_and_follows_its_seed(directory):
    data = [loaded("fit", directory=str(directory), selection_fraction=0.25, seed=seed) for seed in (0, 0, 1)]
    chosen = [ids(part.val_dataloader()) for part in data]
    assert chosen[0] == chosen[1] != chosen[2]
    labels = Counter(label for batch in data[0].val_dataloader() for label in batch["label"].tolist())
    assert labels == {0: 10, 1: 10}


def test_validate_alone_is_the_same_as_in_fit(directory):
    stages = [loaded(stage, directory=str(directory)) for stage in ("fit", "validate")]
    assert ids(stages[0].val_dataloader()) == ids(stages[1].val_dataloader())


def test_held_out_part_has_at_most_so_many_examples(directory, monkeypatch):
    monkeypatch.setattr(glue, "MAX_SELECTION", 6)
    data = loaded("fit", directory=str(directory), selection_fraction=0.5)
    assert (len(ids(data.val_dataloader())), len(ids(data.train_dataloader()))) == (6, 74)


def test_validation_split_may_choose_the_checkpoint_and_train_is_whole_then(directory, messages):
    data = loaded("fit", directory=str(directory), selection="validation")
    assert len(ids(data.train_dataloader())) == 80
    assert ids(data.val_dataloader()) == ids(data.test_dataloader()) == [f"validation/{row}" for row in range(16)]
    assert "val 16 (GLUE's validation split, the one that is tested)" in messages[0]


def test_mnli_is_tested_on_two_sets_and_selected_on_one(directory):
    data = loaded("fit", "mnli", directory=str(directory))
    data.setup("test")
    data.setup("predict")
    tested, predicted = data.test_dataloader(), data.predict_dataloader()
    assert list(tested) == list(predicted) == ["matched", "mismatched"]
    assert ids(tested["mismatched"]) == [f"validation_mismatched/{row}" for row in range(16)]
    assert ids(predicted["matched"]) == [f"test_matched/{row}" for row in range(8)]
    assert len(ids(data.val_dataloader())) == 8
    both = loaded("validate", "mnli", directory=str(directory), selection="validation").val_dataloader()
    assert list(both) == ["matched", "mismatched"]


def test_predict_goes_through_the_test_split_without_labels(directory):
    batch = next(iter(loaded("predict", directory=str(directory)).predict_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "id", "text"}
    assert batch["id"] == ["test/0", "test/1", "test/2", "test/3"]


def test_predict_goes_through_the_validation_split_where_there_is_no_test_split_or_it_is_asked_for(directory):
    asked = loaded("predict", directory=str(directory), predict_split="validation")
    (directory / "RTE/test.tsv").unlink()
    for data in (asked, loaded("predict", directory=str(directory))):
        batch = next(iter(data.predict_dataloader()))
        assert batch["id"][0] == "validation/0"
        assert "label" in batch
    with pytest.raises(ValueError, match=r"rte has no test split in '.*RTE'; expected test\.tsv there"):
        loaded("predict", directory=str(directory), predict_split="test")


def test_test_alone_needs_no_train_file_and_fit_needs_both(directory):
    (directory / "RTE/train.tsv").unlink()
    assert len(ids(loaded("test", directory=str(directory)).test_dataloader())) == 16
    with pytest.raises(ValueError, match=r"rte has no train split in '.*RTE'; expected train\.tsv there"):
        loaded("fit", directory=str(directory))


def test_broken_validation_file_stops_fit_before_the_training(directory):
    with (directory / "RTE/dev.tsv").open("a") as file:
        file.write("17\tonly\tthree\n")
    with pytest.raises(ValueError, match=r"dev\.tsv', line 18: 3 fields where 4 are expected"):
        loaded("fit", directory=str(directory))


# Order, batches, cache


def test_train_order_follows_the_seed_of_the_run_only(directory):
    def order(seed, drawn=0):
        torch.manual_seed(seed)
        data = loaded("fit", directory=str(directory))
        torch.rand(drawn)
        loader = data.train_dataloader()
        return ids(loader), loader.sampler.set_epoch(1), ids(loader)

    assert order(0) == order(0, drawn=3)
    assert order(0)[0] != order(0)[2]
    assert order(0)[0] != order(1)[0]


def test_train_batches_hold_similar_lengths_and_evaluation_keeps_the_order(directory):
    data = loaded("fit", directory=str(directory))
    padded = [1 - batch["attention_mask"].float().mean().item() for batch in data.train_dataloader()]
    unsorted = [1 - batch["attention_mask"].float().mean().item() for batch in data.test_dataloader()]
    assert sum(padded) / len(padded) < 0.05 < sum(unsorted) / len(unsorted)
    assert ids(data.test_dataloader()) == [f"validation/{row}" for row in range(16)]


def test_sentences_and_labels_stay_together(directory):
    data = loaded("fit", directory=str(directory))
    tokenizer = load_tokenizer("bytes")
    rows = [line.split("\t") for line in (directory / "RTE/train.tsv").read_text().splitlines()[1:]]
    for batch in data.train_dataloader():
        for name, tokens, label in zip(batch["id"], batch["input_ids"], batch["label"], strict=True):
            _, first, second, text = rows[int(name.removeprefix("train/"))]
            assert tokenizer.decode(tokens, skip_special_tokens=True) == first + second
            assert data.class_names[label] == text


def test_cut_examples_are_counted(directory, messages):
    loaded("fit", directory=str(directory), max_length=8)
    assert "; 96 of 96 longer than 8 tokens, cut; " in messages[0]


def test_left_out_lines_are_counted(write, messages):
    rows = [["0", "1", "2", "a", "b", "1"], ["1", "3", "4", "c", "d", "0"], ["2", "5"]]
    folder = write("qqp", "dev.tsv", [list(TASKS["qqp"].tsv.columns), *rows])
    loaded("test", "qqp", directory=str(folder))
    assert "; 1 line(s) with missing fields left out; " in messages[0]


def test_second_run_tokenizes_nothing(directory, tmp_path, monkeypatch):
    arguments = {"directory": str(directory), "cache_directory": str(tmp_path / "cache")}
    first = ids(loaded("fit", **arguments).val_dataloader())
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(tokenization, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    assert ids(loaded("fit", **arguments).val_dataloader()) == first


def test_workers_give_the_same_batches(directory):
    torch.manual_seed(0)
    data = loaded("fit", directory=str(directory), num_workers=1)
    assert data.train_dataloader().persistent_workers
    same = loaded("fit", directory=str(directory))
    for ours, theirs in zip(data.train_dataloader(), same.train_dataloader(), strict=True):
        assert ours["id"] == theirs["id"]
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_module_can_be_sent_to_another_process(directory):
    data = loaded("test", directory=str(directory))
    assert ids(pickle.loads(pickle.dumps(data)).test_dataloader()) == ids(data.test_dataloader())


# Generated data, and the trainer


def test_generated_data_go_at_teardown_and_come_back_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = loaded("test", synthetic=True)
    before = ids(data.test_dataloader())
    assert len(list(tmp_path.iterdir())) == 1
    data.teardown("test")
    assert not list(tmp_path.iterdir())
    data.setup("test")
    assert ids(data.test_dataloader()) == before
    del data
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cola", "mnli"])
def test_trainer_fits_tests_and_predicts_generated_data_one_after_the_other(name):
    data, model = module(name, synthetic=True), GlueRecorder()
    trainer().fit(model, data)
    assert len(model.seen) == 72
    model.seen.clear()
    trainer().test(model, data, verbose=False)
    trainer().predict(model, data)
    sets = len(TASKS[name].splits("test"))
    assert len(set(model.seen)) == (16 + 8) * sets


def test_prepare_data_tokenizes_so_that_setup_finds_it(directory, monkeypatch):
    data = module(directory=str(directory))
    seen: list[int] = []
    original = tokenization._tokenize
    monkeypatch.setattr(tokenization, "_tokenize", lambda *words: seen.append(len(data._datasets)) or original(*words))
    trainer().test(GlueRecorder(), data, verbose=False)
    assert seen == [0]  # one split, before setup built anything


# Real files


@pytest.mark.skipif(not (SHARED / "data/glue").is_dir(), reason="the real files are not here")
@pytest.mark.parametrize(("name", "sizes"), [("cola", (8551, 1043)), ("rte", (2490, 277))])
def test_real_files_are_complete(name, sizes, tmp_path):
    tokenizer = SHARED / "models/minilm-l6"
    data = loaded("fit", name, tokenizer=str(tokenizer), directory=str(SHARED / "data/glue"), cache_directory=str(tmp_path))
    counts = [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert (counts[0] + counts[1], counts[2]) == sizes == (TASKS[name].sizes["train"], TASKS[name].sizes["validation"])
    share = Counter(label for batch in data.test_dataloader() for label in batch["label"].tolist())
    assert share == {"cola": {1: 721, 0: 322}, "rte": {0: 146, 1: 131}}[name]
