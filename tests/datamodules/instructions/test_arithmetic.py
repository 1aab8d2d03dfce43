"""The demo's generated arithmetic: its records are right, and the test asks what training never did."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import torch
from support import REPOSITORY

from datamodules.instructions.arithmetic import TASKS, TEST_EXAMPLES, TRAIN_EXAMPLES, ArithmeticDataModule, write_arithmetic
from lightning_modules.tasks import CausalLanguageModel
from lightning_modules.tasks.generation import GenerationSettings, generate

EXAMPLE = REPOSITORY / "examples/arithmetic_model"
NAMES = [task.name for task in TASKS]
SOLVE = {
    "addition": sum,
    "subtraction": lambda numbers: numbers[0] - numbers[1],
    "comparison": max,
    "recall": lambda numbers: numbers[1],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("arithmetic")
    write_arithmetic(directory)
    return directory


def train(directory: Path, name: str) -> list[dict[str, str]]:
    return json.loads((directory / "ft-training_set" / f"{name}.json").read_text(encoding="utf-8"))


def test(directory: Path, name: str) -> list[dict[str, str]]:
    return json.loads((directory / "dataset" / name / "test.json").read_text(encoding="utf-8"))


test.__test__ = False


def numbers(record: dict[str, str]) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", record["instruction"]))


@pytest.mark.parametrize("name", NAMES)
def test_sets_have_their_sizes_and_the_fields_of_the_format(directory, name):
    records = train(directory, name), test(directory, name)
    assert [len(part) for part in records] == [TRAIN_EXAMPLES, TEST_EXAMPLES]
    for record in records[0] + records[1]:
        assert set(record) == {"instruction", "input", "output", "answer"}
        assert record["output"] == f"The answer is {record['answer']}"
        assert "{" not in record["instruction"]


@pytest.mark.parametrize("name", SOLVE)
def test_answers_are_right(directory, name):
    for record in train(directory, name) + test(directory, name):
        assert SOLVE[name](numbers(record)) == int(record["answer"]), record["instruction"]


def test_answers_of_doubling_are_twice_the_number_of_things(directory):
    for record in train(directory, "doubling") + test(directory, "doubling"):
        things = re.search(r"(?:has|gets|hold) (\d+)", record["instruction"])
        assert 2 * int(things[1]) == int(record["answer"]), record["instruction"]


@pytest.mark.parametrize("name", NAMES)
def test_no_pair_of_numbers_of_a_test_question_was_trained_on(directory, name):
    trained, tested = ({numbers(record) for record in part(directory, name)} for part in (train, test))
    assert len(trained) > 100
    assert not trained & tested


@pytest.mark.parametrize("name", NAMES)
def test_no_test_question_comes_twice(directory, name):
    assert len({record["instruction"] for record in test(directory, name)}) == TEST_EXAMPLES


def test_every_wording_comes_in_training_and_test(directory):
    for task in TASKS:
        for part in (train, test):
            patterns = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(way)) for way in task.ways]
            found = {p for p in patterns for record in part(directory, task.name) if re.fullmatch(p, record["instruction"])}
            assert found == set(patterns)


def test_the_seed_decides_what_is_written(tmp_path, directory):
    for seed in (1, 2):
        write_arithmetic(tmp_path / str(seed), seed)
    for name in NAMES:
        assert train(tmp_path / "1", name) == train(directory, name)
        assert train(tmp_path / "2", name) != train(directory, name)


def test_data_module_mixes_the_kinds_by_their_weights():
    data = ArithmeticDataModule(tokenizer="bytes", train={"addition": 1.0, "recall": 0.5}, num_workers=0, validation_size=0)
    data.setup("fit")
    tasks = [task for batch in data.train_dataloader() for task in batch["task"]]
    assert tasks.count("addition") == TRAIN_EXAMPLES
    assert tasks.count("recall") == pytest.approx(TRAIN_EXAMPLES / 2, abs=1)


def test_right_responses_are_graded_as_right_and_others_as_wrong():
    data = ArithmeticDataModule(tokenizer="bytes", num_workers=0)
    data.setup("test")
    loaders = data.test_dataloader()
    assert list(loaders) == NAMES
    for name, loader in loaders.items():
        examples = [
            (benchmark, answer)
            for batch in loader
            for benchmark, answer in zip(batch["benchmark"], batch["answer"], strict=True)
        ]
        assert len(examples) == TEST_EXAMPLES
        for benchmark, answer in examples:
            assert benchmark.name == name
            assert benchmark.grade(f"The answer is {answer}", answer).correct
            assert not benchmark.grade(f"The answer is {answer}0", answer).correct
    assert data.evaluation_notes == {}  # no question is in the training sets, none is missing


def test_a_directory_is_read_instead_of_generating(directory, tmp_path):
    data = ArithmeticDataModule(tokenizer="bytes", directory=str(directory), test=["addition"], num_workers=0)
    data.setup("test")
    prompts = [prompt for batch in data.test_dataloader()["addition"] for prompt in batch["prompt"]]
    assert prompts == [f"Question: {record['instruction']}\nAnswer:" for record in test(directory, "addition")]
    with pytest.raises(ValueError, match="synthetic cannot be used together"):
        ArithmeticDataModule(tokenizer="bytes", directory=str(tmp_path), synthetic=True)


def test_an_unknown_kind_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"division.*addition"):
        ArithmeticDataModule(tokenizer="bytes", test=["division"])


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location("pretrain_arithmetic_model", EXAMPLE / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_model_is_small_and_knows_what_it_was_pretrained_on():
    assert sum(file.stat().st_size for file in EXAMPLE.iterdir() if file.is_file()) < 2_000_000
    task = CausalLanguageModel(str(EXAMPLE), tokenizer="bytes")
    model = task.build()
    prompts = ["7+5=", "12-5=", "max(3,11)=", "2*9="]
    results = []
    for prompt in prompts:
        ids = torch.tensor([task.tokenizer(prompt, add_special_tokens=False).input_ids])
        results += [generate(model, task.tokenizer, ids, torch.ones_like(ids), GenerationSettings(max_new_tokens=4))]
    assert [result[0].partition(";")[0] for result in results] == ["12", "7", "11", "18"]


def test_pretraining_is_right_and_has_no_questions(pretrain):
    rng = random.Random(0)
    for kind in pretrain.KINDS:
        for _ in range(100):
            text = "".join(part for pair in kind(rng) for part in pair)
            assert "?" not in text
            assert "nswer" not in text
    for _ in range(100):
        for left, right in pretrain.equations(rng):
            assert eval(left.removesuffix("=")) == int(right.removesuffix(";"))


def test_pretraining_batches_weigh_results_above_text(pretrain):
    ids, weights = pretrain.batch(random.Random(0))
    assert ids.shape == weights.shape == (pretrain.BATCH, pretrain.LENGTH)
    assert weights.unique().tolist() == pytest.approx([pretrain.TEXT_WEIGHT, 1.0])
    assert (weights[ids == pretrain.END] == 1).all()
