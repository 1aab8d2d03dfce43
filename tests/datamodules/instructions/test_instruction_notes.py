import pytest
from support import REPOSITORY
from support.instructions import module

from datamodules import MathReasoningDataModule
from datamodules.instructions.benchmarks import COMMONSENSE, COMMONSENSE_TRAIN, MATH
from datamodules.instructions.mixture.loading import load_examples
from datamodules.instructions.mixture.mixing import evaluation_sources, train_sources
from datamodules.instructions.mixture.overlap import count_overlaps, question_key
from datamodules.instructions.reading.records import Record
from datamodules.instructions.reading.source import LocalFiles

REAL = REPOSITORY.parent / "shared/data/llm_adapters"


def test_notes_say_contamination_overlap_and_missing_questions(question_directory):
    data = module(question_directory, validation_sets=["boolq"], test=["boolq", "openbookqa"])
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
