import pytest
from support.instructions import questions, record, write

from datamodules.instructions import data_module as instructions


@pytest.fixture
def question_directory(tmp_path):
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
