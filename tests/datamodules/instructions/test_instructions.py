from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from support.instructions import InstructionRecorder, fitted, module, questions, record, seen, write
from support.recorder import trainer
from torch.utils.data import DistributedSampler

from datamodules import CommonsenseDataModule, MathReasoningDataModule
from datamodules.instructions import data_module as instructions
from datamodules.instructions import dataset
from datamodules.shared.tokenizers import load_tokenizer


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


def test_every_example_comes_once_an_epoch_and_the_log_says_what_there_is(question_directory, messages):
    data = fitted(question_directory, train=["boolq", "commonsense_15k"])
    assert sorted(seen(data)) == sorted([f"boolq/{n}" for n in range(20)] + [f"commonsense_15k/{n}" for n in range(10)])
    (message,) = messages
    assert "train boolq: 20 (the complete set has 9,427)" in message
    assert "train commonsense_15k: 10\n" in message
    assert "30 to train on, 0 held out" in message
    assert "0 questions and 0 responses cut" in message
    assert "test boolq: 8 (the complete set has 3,270)" in message
    assert "2 question(s) of test boolq are in train boolq" in message


def test_weights_are_the_times_an_epoch_and_batches_say_their_task(question_directory, messages):
    data = fitted(question_directory, train={"boolq": 0.5, "commonsense_15k": 3})
    tasks = Counter(task for batch in data.train_dataloader() for task in batch["task"])
    assert tasks["commonsense_15k"] == 30
    assert tasks["boolq"] == 10
    assert "commonsense_15k: 10, 3 times an epoch" in messages[0]


def test_held_out_examples_are_not_trained_on_and_fixed_by_the_seed(question_directory):
    data = fitted(question_directory, validation_size=5)
    held_out = [id_ for batch in data.val_dataloader() for id_ in batch["id"]]
    assert len(held_out) == 5
    assert sorted(seen(data) + held_out) == sorted(f"boolq/{n}" for n in range(20))
    again = module(question_directory, validation_size=5)
    again.setup("validate")
    assert [id_ for batch in again.val_dataloader() for id_ in batch["id"]] == held_out
    other = fitted(question_directory, validation_size=5, seed=1)
    assert [id_ for batch in other.val_dataloader() for id_ in batch["id"]] != held_out


def test_held_out_examples_of_a_mixed_set_are_graded_by_their_own_form(question_directory):
    data = fitted(question_directory, train=["boolq", "commonsense_15k"], validation_size=29)
    examples = [item for batch in data.val_dataloader() for item in zip(batch["benchmark"], batch["answer"], strict=True)]
    assert {answer for _, answer in examples} == {"true", "answer2"}
    for benchmark, answer in examples:
        assert benchmark.name == {"true": "boolq", "answer2": "commonsense_15k"}[answer]
        assert benchmark.grade(f"the correct answer is {answer}", answer).correct
        assert not benchmark.grade("the correct answer is answer1 or false", answer).correct


def test_holding_out_everything_is_an_error(question_directory):
    with pytest.raises(ValueError, match="validation_size=20 would hold out all 20 training examples"):
        fitted(question_directory, validation_size=20)


def test_what_is_cut_is_counted(question_directory, messages):
    fitted(question_directory, max_length=54)
    assert "longer than 54 tokens: 10 questions and 0 responses cut" in messages[0]  # "train 10?" is longer than "train 1?"


def test_test_needs_no_training_files(question_directory):
    data = module(question_directory, train="piqa", test=["openbookqa"])
    data.setup("test")
    assert len(data.test_dataloader()["openbookqa"].dataset) == 3


def test_more_tokens_than_the_model_takes_are_refused(question_directory, monkeypatch):
    tokenizer = load_tokenizer("bytes")
    tokenizer.model_max_length = 300
    monkeypatch.setattr("datamodules.shared.data_module.load_tokenizer", lambda name: tokenizer)
    with pytest.raises(
        ValueError, match="max_length=400 is more than the 300 tokens that the model of tokenizer 'bytes' takes"
    ):
        module(question_directory).prepare_data()


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
def test_several_validation_sets_are_named_and_none_is_possible(question_directory):
    data = fitted(question_directory, validation_size=5, validation_sets=["openbookqa"])
    assert {name: len(loader.dataset) for name, loader in data.val_dataloader().items()} == {"held_out": 5, "openbookqa": 3}
    model = InstructionRecorder()
    trainer().fit(model, module(question_directory, validation_size=0))
    assert (len(model.seen), model.validated) == (20, {})


def test_predict_goes_through_the_test_sets(question_directory):
    data = module(question_directory, test=["boolq", "openbookqa"])
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


def test_a_large_training_set_is_tokenized_once_before_setup_and_then_found(question_directory, tmp_path, monkeypatch):
    tokenized, original = [], dataset._tokenize
    monkeypatch.setattr(dataset, "_tokenize", lambda *words: tokenized.append(len(words[0])) or original(*words))
    monkeypatch.setattr(instructions, "_WORTH_CACHING", 15)
    data = module(question_directory, cache_directory=str(tmp_path / "cache"), validation_size=5)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), distributed_sampler_kwargs=None, world_size=1)
    data.prepare_data()
    assert tokenized == [15]
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 1
    data.setup("fit")
    assert tokenized == [15, 5]  # the held-out ones are few
    alone = fitted(question_directory, validation_size=5)
    for ours, theirs in zip(data.train_dataloader(), alone.train_dataloader(), strict=True):
        assert ours["id"] == theirs["id"]
        assert torch.equal(ours["labels"], theirs["labels"])
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
