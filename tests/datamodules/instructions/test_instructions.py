import json
import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from support import REPOSITORY
from support.recorder import Recorder, trainer
from torch.utils.data import DistributedSampler

from datamodules import CommonsenseDataModule, InstructionDataModule, MathReasoningDataModule
from datamodules.instructions import data_module as instructions
from datamodules.instructions import dataset
from datamodules.instructions.answers.rules import NUMBER
from datamodules.instructions.benchmarks import COMMONSENSE, COMMONSENSE_TRAIN, MATH
from datamodules.instructions.mixture.loading import load_examples
from datamodules.instructions.mixture.mixing import evaluation_sources, train_sources
from datamodules.instructions.mixture.overlap import count_overlaps, question_key
from datamodules.instructions.reading.records import Record
from datamodules.instructions.reading.source import LocalFiles, PinnedFiles
from datamodules.shared.tokenizers import load_tokenizer

REAL = REPOSITORY.parent / "shared/data/llm_adapters"


def record(question, answer="true", output=None):
    return {"instruction": question, "input": "", "output": output or f"the correct answer is {answer}", "answer": answer}


def questions(prefix, count, answer="true"):
    return [record(f"{prefix} {number}?", answer) for number in range(count)]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture
def directory(tmp_path):
    write(tmp_path / "dataset/boolq/train.json", questions("train", 20))
    write(tmp_path / "dataset/boolq/test.json", [*questions("test", 6), record("TRAIN, 3", "false"), record("train 19 ?")])
    write(tmp_path / "ft-training_set/commonsense_15k.json", questions("mixed", 10, "answer2"))
    write(tmp_path / "openbookqa/test.json", questions("other", 3, "answer1"))
    return tmp_path


@pytest.fixture
def messages(monkeypatch):
    told = []
    monkeypatch.setattr(instructions, "rank_zero_info", told.append)
    return told


def module(directory=None, kind=CommonsenseDataModule, **arguments):
    given = {"train": "boolq", "test": ["boolq"], "tokenizer": "bytes", "num_workers": 0, "batch_size": 4, "validation_size": 0}
    given |= {"max_length": 400, "prompt": "plain"}
    return kind(directory=None if directory is None else str(directory), **(given | arguments))


def fitted(directory, **arguments):
    data = module(directory, **arguments)
    data.setup("fit")
    return data


def seen(data):
    return [id_ for batch in data.train_dataloader() for id_ in batch["id"]]


class InstructionRecorder(Recorder):
    def __init__(self):
        super().__init__("input_ids")
        self.validated, self.tested = Counter(), {}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated[dataloader_idx] += len(batch["id"])

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        graded = [rule.grade(answer, answer).correct for rule, answer in zip(batch["benchmark"], batch["answer"], strict=True)]
        self.tested.setdefault(dataloader_idx, []).extend(graded)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": None}, "tokenizer is missing"),
        ({"prompt": "alpaca"}, "prompt must be one of llm_adapters, plain, chat, got 'alpaca'"),
        ({"max_length": 1}, "max_length must be 2 or more, got 1"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"validation_size": -1}, "validation_size must be 0 or more, got -1"),
        ({"directory": "/nowhere"}, "directory '/nowhere' is no directory"),
        ({"directory": "/", "synthetic": True}, "directory '/' and synthetic cannot be used together"),
        ({"test": []}, "test is empty; choose from boolq, piqa"),
        ({"test": ["BoolQ"]}, "test: 'BoolQ' is unknown; choose from boolq, piqa"),
        ({"test": ["boolq", "boolq"]}, "test: 'boolq' is there more than once"),
        ({"test": ["/nowhere/own.json"]}, "test: there is no file '/nowhere/own.json'"),
        ({"validation_sets": ["gsm8k"]}, "validation_sets: 'gsm8k' is unknown"),
        ({"train": {"boolq": "2"}}, "train: the weight of 'boolq' must be a positive number, got '2'"),
        ({"train": []}, "train is empty; choose from commonsense_170k"),
        ({"train": "math_10k"}, "train: 'math_10k' is unknown; choose from commonsense_170k"),
        ({"train": "own.jsonl"}, "train: there is no file 'own.jsonl'"),
        ({"train": ["boolq", "boolq"]}, "train: 'boolq' is there more than once"),
        ({"train": {"boolq": 0}}, "train: the weight of 'boolq' must be a positive number, got 0"),
        ({"train": {"boolq": float("nan")}}, "train: the weight of 'boolq' must be a positive number, got nan"),
    ],
)
def test_mistakes_are_named_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        module(**{"directory": None, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("train", ["boolq", ["boolq", "piqa"], {"boolq": 1.0, "piqa": 0.5}])
def test_the_command_line_reads_every_form_of_train(train):
    parser = ArgumentParser()
    parser.add_class_arguments(CommonsenseDataModule, "data")
    parsed = parser.parse_object({"data": {"train": train, "tokenizer": "bytes"}})
    assert parsed.data.train == train
    assert parsed.data.max_length == 256
    names = [row.name for row in parser.instantiate(parsed).data._sources]
    assert names == ([train] if isinstance(train, str) else list(train))


def test_text_has_no_classes():
    assert (module().num_classes, module().class_names) == (None, [])


# Training


def test_every_example_comes_once_an_epoch_and_the_log_says_what_there_is(directory, messages):
    data = fitted(directory, train=["boolq", "commonsense_15k"])
    assert sorted(seen(data)) == sorted([f"boolq/{n}" for n in range(20)] + [f"commonsense_15k/{n}" for n in range(10)])
    (message,) = messages
    assert "train boolq: 20 (the complete set has 9,427)" in message
    assert "train commonsense_15k: 10\n" in message
    assert "30 to train on, 0 held out" in message
    assert "0 questions and 0 responses cut" in message
    assert "test boolq: 8 (the complete set has 3,270)" in message
    assert "2 question(s) of test boolq are in train boolq" in message


def test_weights_are_the_times_an_epoch_and_batches_say_their_task(directory, messages):
    data = fitted(directory, train={"boolq": 0.5, "commonsense_15k": 3})
    tasks = Counter(task for batch in data.train_dataloader() for task in batch["task"])
    assert tasks["commonsense_15k"] == 30
    assert tasks["boolq"] == 10
    assert "commonsense_15k: 10, 3 times an epoch" in messages[0]


def test_held_out_examples_are_not_trained_on_and_fixed_by_the_seed(directory):
    data = fitted(directory, validation_size=5)
    held_out = [id_ for batch in data.val_dataloader() for id_ in batch["id"]]
    assert len(held_out) == 5
    assert sorted(seen(data) + held_out) == sorted(f"boolq/{n}" for n in range(20))
    again = module(directory, validation_size=5)
    again.setup("validate")
    assert [id_ for batch in again.val_dataloader() for id_ in batch["id"]] == held_out
    other = fitted(directory, validation_size=5, seed=1)
    assert [id_ for batch in other.val_dataloader() for id_ in batch["id"]] != held_out


def test_held_out_examples_of_a_mixed_set_are_graded_by_their_own_form(directory):
    data = fitted(directory, train=["boolq", "commonsense_15k"], validation_size=29)
    examples = [item for batch in data.val_dataloader() for item in zip(batch["benchmark"], batch["answer"], strict=True)]
    assert {answer for _, answer in examples} == {"true", "answer2"}
    for benchmark, answer in examples:
        assert benchmark.name == {"true": "boolq", "answer2": "commonsense_15k"}[answer]
        assert benchmark.grade(f"the correct answer is {answer}", answer).correct
        assert not benchmark.grade("the correct answer is answer1 or false", answer).correct


def write_own(path, count, **fields):
    """Alpaca's records: no `answer`, one object a line, whatever the file is called."""
    records = [{"instruction": f"{path.stem} {number}?", "output": f"It is {number}.", **fields} for number in range(count)]
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


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


def test_holding_out_everything_is_an_error(directory):
    with pytest.raises(ValueError, match="validation_size=20 would hold out all 20 training examples"):
        fitted(directory, validation_size=20)


def test_what_is_cut_is_counted(directory, messages):
    fitted(directory, max_length=54)
    assert "longer than 54 tokens: 10 questions and 0 responses cut" in messages[0]  # "train 10?" is longer than "train 1?"


def test_own_files_train_and_test(directory, messages):
    own = directory / "own.jsonl"
    own.write_text(
        "\n".join(json.dumps({"instruction": f"say {n}", "output": f"it is {n}"}) for n in range(4)), encoding="utf-8"
    )
    test = write(directory / "letters.json", [record("which?", "B"), record("how many?", "7")])
    data = fitted(directory, train=["boolq", str(own)], test=[str(test)], validation_sets=[str(own)])
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


# Bad data


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
def test_bad_files_are_found_before_training(directory, file, records, message):
    write(directory / file, records)
    with pytest.raises(ValueError, match=message):
        fitted(directory)


@pytest.mark.parametrize(("name", "answer", "message"), [("AQuA", "F", "a letter from A to E"), ("gsm8k", "many", "a number")])
def test_an_answer_of_the_wrong_form_is_named(tmp_path, name, answer, message):
    write(tmp_path / name / "test.json", [record("?", answer)])
    with pytest.raises(ValueError, match=f"record 1: the answer '{answer}' is not {message}, as in {name}"):
        module(tmp_path, MathReasoningDataModule, train="math_10k", test=[name]).setup("test")


def test_a_set_that_the_directory_lacks_is_named(directory):
    with pytest.raises(ValueError, match=r"has no dataset/piqa/test.json"):
        fitted(directory, test=["boolq", "piqa"])


def test_test_needs_no_training_files(directory):
    data = module(directory, train="piqa", test=["openbookqa"])
    data.setup("test")
    assert len(data.test_dataloader()["openbookqa"].dataset) == 3


def test_more_tokens_than_the_model_takes_are_refused(directory, monkeypatch):
    tokenizer = load_tokenizer("bytes")
    tokenizer.model_max_length = 300
    monkeypatch.setattr("datamodules.shared.data_module.load_tokenizer", lambda name: tokenizer)
    with pytest.raises(
        ValueError, match="max_length=400 is more than the 300 tokens that the model of tokenizer 'bytes' takes"
    ):
        module(directory).prepare_data()


def test_a_file_cannot_take_the_name_of_the_held_out_examples(directory):
    own = write(directory / "held_out.json", questions("own", 3))
    with pytest.raises(ValueError, match="'held_out' is what the examples held out of train are called; rename the file"):
        module(directory, validation_sets=[str(own)])
    assert module(directory, test=[str(own)])._test_sources[0].name == "held_out"


# Notes


def test_notes_say_contamination_overlap_and_missing_questions(directory):
    data = module(directory, validation_sets=["boolq"], test=["boolq", "openbookqa"])
    data.setup("test")
    assert data.evaluation_notes == {
        "boolq": "8 of the official 3,270 questions; 2 of its questions also in train boolq; also validated on",
        "openbookqa": "3 of the official 500 questions",
    }


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 12 - 7?", "what is 12-7", True),
        ("What is 12 - 7?", "What is 12 + 7?", False),
        ("What is 1.2 times 3?", "What is 12 times 3?", False),
        ("It's well-known. Why?", "Its well known: why", True),
    ],
)
def test_punctuation_counts_only_in_numbers(one, other, same):
    assert (question_key(Record(one, "", "", "")) == question_key(Record(other, "", "", ""))) is same


@pytest.mark.parametrize(("train", "noted"), [("math_10k", {"AddSub", "MultiArith", "SingleEq"}), ("math_7k", set())])
def test_the_contaminated_sets_are_known_without_any_file(train, noted):
    data = module(
        kind=MathReasoningDataModule, train={train: 2}, test=["AddSub", "AQuA", "gsm8k", "MultiArith", "SingleEq", "SVAMP"]
    )
    assert set(data.evaluation_notes) == noted
    assert all("MAWPS" in note for note in data.evaluation_notes.values())


# The trainer


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", [CommonsenseDataModule, MathReasoningDataModule])
def test_synthetic_data_go_through_the_trainer(kind, num_workers):
    data = kind(tokenizer="bytes", synthetic=True, num_workers=num_workers, batch_size=8, prompt="plain", validation_sets=None)
    model, run = InstructionRecorder(), trainer()
    run.fit(model, data)
    assert len(model.seen) == len(set(model.seen)) > 30
    assert model.validated == {0: 120 + 16}  # with the two batches of the check before training
    run.test(model, data)
    assert len(model.tested) == len(data.benchmarks)
    assert all(correct == [True] * 8 for correct in model.tested.values())
    assert list(run.test_dataloaders) == list(data.benchmarks)
    files = data._remove_generated
    assert files is None


@pytest.mark.filterwarnings("ignore:Total length of `list`")
def test_several_validation_sets_are_named_and_none_is_possible(directory):
    data = fitted(directory, validation_size=5, validation_sets=["openbookqa"])
    assert {name: len(loader.dataset) for name, loader in data.val_dataloader().items()} == {"held_out": 5, "openbookqa": 3}
    model = InstructionRecorder()
    trainer().fit(model, module(directory, validation_size=0))
    assert (len(model.seen), model.validated) == (20, {})


def test_predict_goes_through_the_test_sets(directory):
    data = module(directory, test=["boolq", "openbookqa"])
    data.setup("predict")
    assert list(data.predict_dataloader()) == ["boolq", "openbookqa"]


def test_prepare_data_fetches_what_the_run_needs(monkeypatch):
    asked = []
    monkeypatch.setattr(instructions.PinnedFiles, "get", lambda self, file: asked.append(file))
    data = module(train="commonsense_170k", test=["piqa"], validation_sets=["boolq"])
    data.prepare_data()
    assert asked == ["ft-training_set/commonsense_170k.json", "dataset/boolq/test.json", "dataset/piqa/test.json"]


def test_validation_without_held_out_examples_needs_no_training_files(monkeypatch):
    asked = []
    monkeypatch.setattr(instructions.PinnedFiles, "get", lambda self, file: asked.append(file))
    data = module(validation_sets=["boolq"])
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"))
    data.prepare_data()
    assert asked == ["dataset/boolq/test.json"]


@pytest.mark.parametrize("weights", [{"boolq": 1}, {"boolq": 2}])
def test_each_process_has_its_own_examples_and_little_padding(tmp_path, weights):
    long_and_short = [record(f"{'word ' * (number * 7 % 61)}{number}?") for number in range(64)]
    write(tmp_path / "dataset/boolq/train.json", long_and_short)
    write(tmp_path / "dataset/boolq/test.json", questions("test", 2))
    shares, real, padded = [], 0, 0
    for rank in range(2):
        data = fitted(tmp_path, train=weights, max_length=1000)
        division = {"num_replicas": 2, "rank": rank}
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs=division, world_size=2, strategy=SimpleNamespace(broadcast=lambda seed: seed)
        )
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, DistributedSampler)  # Lightning takes any other for undivided, and shuffles it again
        batches = list(loader)
        shares.append([id_ for batch in batches for id_ in batch["id"]])
        real += sum(int(batch["attention_mask"].sum()) for batch in batches)
        padded += sum(batch["attention_mask"].numel() for batch in batches)
    assert Counter(shares[0] + shares[1]) == {f"boolq/{number}": weights["boolq"] for number in range(64)}
    assert real / padded > 0.9


def test_a_large_training_set_is_tokenized_once_before_setup_and_then_found(directory, tmp_path, monkeypatch):
    tokenized, original = [], dataset._tokenize
    monkeypatch.setattr(dataset, "_tokenize", lambda *words: tokenized.append(len(words[0])) or original(*words))
    monkeypatch.setattr(instructions, "_WORTH_CACHING", 15)
    data = module(directory, cache_directory=str(tmp_path / "cache"), validation_size=5)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), distributed_sampler_kwargs=None, world_size=1)
    data.prepare_data()
    assert tokenized == [15]
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 1
    data.setup("fit")
    assert tokenized == [15, 5]  # the held-out ones are few
    alone = fitted(directory, validation_size=5)
    for ours, theirs in zip(data.train_dataloader(), alone.train_dataloader(), strict=True):
        assert ours["id"] == theirs["id"]
        assert torch.equal(ours["labels"], theirs["labels"])
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


# Real data

COUNTS = {
    "boolq": 3270,
    "piqa": 1838,
    "social_i_qa": 1954,
    "winogrande": 1267,
    "ARC-Easy": 2376,
    "ARC-Challenge": 1172,
    "openbookqa": 500,
    "AddSub": 395,
    "AQuA": 254,
    "gsm8k": 1319,
    "MultiArith": 600,
    "SingleEq": 508,
    "SVAMP": 1000,
}


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real files")
def test_real_sets_have_the_official_counts_and_their_gold_responses_are_right():
    files, found, tests = LocalFiles(REAL), {}, {}
    for source in evaluation_sources("test", list(COUNTS), {**COMMONSENSE, **MATH}):
        examples, _ = load_examples(source, files, is_train=False)
        tests[source.name] = examples
        found[source.name] = len(examples)
        assert source.count == len(examples)
        grades = [example.benchmark.grade(example.record.output, example.record.answer) for example in examples]
        if source.benchmark.has_gold_output:
            assert all(grade.correct and grade.strict_correct for grade in grades)
        else:  # rationales are a model's, some wrong
            assert 0.4 < sum(grade.correct for grade in grades) / len(grades) < 1
        told = [
            example.benchmark.grade(f"The answer is {example.record.answer}", example.record.answer) for example in examples
        ]
        assert all(grade.strict_correct for grade in told)
    assert found == COUNTS
    train = [
        example
        for source in train_sources(["boolq", "ARC-Easy", "ARC-Challenge", "openbookqa"], COMMONSENSE_TRAIN)
        for example in load_examples(source, files, is_train=True)[0]
    ]
    overlaps = {name: sources for name, sources in count_overlaps(train, tests).items() if sources}
    assert overlaps == {"boolq": {"boolq": 6}, "ARC-Easy": {"ARC-Easy": 2}}
