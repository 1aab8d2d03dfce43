import json
import os
from collections import Counter

import pytest
from support.instructions import InstructionRecorder, fitted, module, questions, record, seen, write, write_own
from support.recorder import trainer

from datamodules import InstructionDataModule, MathReasoningDataModule
from datamodules.instructions.answers.rules import NUMBER
from datamodules.instructions.reading.source import PinnedFiles


def test_instructions_of_ones_own_need_no_benchmark(tmp_path, messages):
    train, test = write_own(tmp_path / "mine.json", 12), write_own(tmp_path / "held.jsonl", 3, input="")
    data = InstructionDataModule(train, [test], "bytes", num_workers=0, batch_size=4, validation_size=2, prompt="plain")
    for stage in ("fit", "test"):
        data.setup(stage)
    assert len(seen(data)) == 10
    (batch,) = data.test_dataloader()["held"]
    assert batch["answer"] == ["It is 0.", "It is 1.", "It is 2."]
    assert batch["benchmark"][0].grade("It is 0.", "It is 0.").correct
    assert "test held: 3" in messages[0]


def test_set_of_a_file_whose_name_is_not_utf8_has_a_name_that_is(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.json")
    path.write_text(json.dumps([{"instruction": "1?", "output": "1"}]), encoding="utf-8")
    data = InstructionDataModule(write_own(tmp_path / "mine.json", 5), [str(path)], "bytes", num_workers=0, validation_size=0)
    data.setup("test")
    (name,) = data.test_dataloader()
    assert name == r"caf\xe9"


def test_without_test_sets_training_works_and_testing_says_what_is_missing(tmp_path):
    data = InstructionDataModule(write_own(tmp_path / "mine.json", 5), tokenizer="bytes", num_workers=0, validation_size=0)
    data.setup("fit")
    assert len(seen(data)) == 5
    with pytest.raises(ValueError, match="test is missing, and test has nothing to read; give custom"):
        data.setup("test")


@pytest.mark.parametrize("test", [None, ["boolq", "piqa"]])
def test_training_on_own_files_fetches_no_benchmark(tmp_path, monkeypatch, test):
    fetched = []

    def get(self, file):
        fetched.append(file)
        return write(tmp_path / file, questions("test", 3, "solution1" if "piqa" in file else "true"))

    monkeypatch.setattr(PinnedFiles, "get", get)
    data = module(train=write_own(tmp_path / "mine.json", 12), test=test, cache_directory=str(tmp_path / "cache"))
    trainer().fit(InstructionRecorder(), data)
    assert fetched == []
    if test:
        trainer().test(InstructionRecorder(), data, verbose=False)
        assert set(fetched) == {"dataset/boolq/test.json", "dataset/piqa/test.json"}
        assert list(data.test_dataloader()) == test


def test_a_file_may_be_called_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine [v2].JSON", "folder/questions.txt", "plain"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_own(tmp_path / name, 5)
        assert len(seen(fitted(None, train=name, test=[name]))) == 5
    with pytest.raises(ValueError, match="train: 'folder' is a directory; give the path of a JSON or parquet file in it"):
        module(train="folder")


def test_custom_is_the_file_of_a_split_in_the_directory(tmp_path):
    for name, count in {"train.jsonl": 6, "dev.json": 3, "test.json": 2}.items():
        write_own(tmp_path / name, count)
    data = fitted(tmp_path, kind=InstructionDataModule, train={"custom": 2.0}, test=["custom"], validation_sets=["custom"])
    assert Counter(seen(data)) == dict.fromkeys((f"custom/{number}" for number in range(6)), 2)
    data.setup("test")
    assert [len(loader.dataset) for loader in (data.val_dataloader(), data.test_dataloader()["custom"])] == [3, 2]
    write_own(tmp_path / "val.json", 1)
    with pytest.raises(ValueError, match=r"validation_sets: 'custom' needs one dev.json .*there is dev.json, val.json"):
        module(tmp_path, validation_sets=["custom"])
    with pytest.raises(ValueError, match=r"train: 'custom' needs directory, a folder with train.json"):
        module(train="custom")


def test_own_files_train_and_test(question_directory, messages):
    own = question_directory / "own.jsonl"
    own.write_text(
        "\n".join(json.dumps({"instruction": f"say {n}", "output": f"it is {n}"}) for n in range(4)), encoding="utf-8"
    )
    test = write(question_directory / "letters.json", [record("which?", "B"), record("how many?", "7")])
    data = fitted(question_directory, train=["boolq", str(own)], test=[str(test)], validation_sets=[str(own)])
    assert Counter(data._train.tasks) == {"boolq": 20, "own": 4}
    batch = next(iter(data.val_dataloader()))
    assert batch["benchmark"][0].grade("it is 0", batch["answer"][0]).correct
    data.setup("test")
    (batch,) = data.test_dataloader()["letters"]
    assert [
        benchmark.grade(f"the answer is {answer}", answer).correct
        for benchmark, answer in zip(batch["benchmark"], "B7", strict=True)
    ]
    assert batch["benchmark"][1].rule is NUMBER


@pytest.mark.parametrize(
    ("file", "records", "message"),
    [
        ("dataset/boolq/test.json", [], "boolq/test.json' has no records"),
        (
            "dataset/boolq/test.json",
            [record("?", "maybe")],
            "boolq/test.json' record 1: the answer 'maybe' is not among .* true, false",
        ),
        ("dataset/boolq/train.json", [{"instruction": "?", "output": "x"}], "boolq/train.json' record 1 has no 'answer'"),
        (
            "dataset/boolq/train.json",
            [record("? Answer format: answer1/answer2", "answer3")],
            "train.json' record 1: the answer 'answer3' is not among the question's choices, answer1, answer2",
        ),
    ],
)
def test_bad_files_are_found_before_training(question_directory, file, records, message):
    write(question_directory / file, records)
    with pytest.raises(ValueError, match=message):
        fitted(question_directory)


@pytest.mark.parametrize(("name", "answer", "message"), [("AQuA", "F", "a letter from A to E"), ("gsm8k", "many", "a number")])
def test_an_answer_of_the_wrong_form_is_named(tmp_path, name, answer, message):
    write(tmp_path / name / "test.json", [record("?", answer)])
    with pytest.raises(ValueError, match=f"record 1: the answer '{answer}' is not {message}, as in {name}"):
        module(tmp_path, MathReasoningDataModule, train="math_10k", test=[name]).setup("test")


def test_a_set_that_the_directory_lacks_is_named(question_directory):
    with pytest.raises(ValueError, match=r"has no dataset/piqa/test.json"):
        fitted(question_directory, test=["boolq", "piqa"])


def test_a_file_cannot_take_the_name_of_the_held_out_examples(question_directory):
    own = write(question_directory / "held_out.json", questions("own", 3))
    with pytest.raises(ValueError, match="'held_out' is what the examples held out of train are called; rename the file"):
        module(question_directory, validation_sets=[str(own)])
    assert module(question_directory, test=[str(own)])._test_sources[0].name == "held_out"
