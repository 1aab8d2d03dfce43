import json

import pytest

from datamodules.instructions.reading.records import Record, read_records

GOOD = {"instruction": "2 + 2?", "input": "", "output": "The answer is 4.", "answer": "4"}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_json_and_jsonl_give_the_same_records(tmp_path):
    other = {**GOOD, "instruction": "one\nline \U0001f600", "answer": 4.5}  # json writes the emoji as a pair of surrogates
    expected = [Record("2 + 2?", "", "The answer is 4.", "4"), Record("one\nline \U0001f600", "", "The answer is 4.", "4.5")]
    assert read_records(write(tmp_path / "a.json", [GOOD, other]), needs_answer=True) == expected
    lines = "\ufeff" + json.dumps(GOOD) + "\r\n\r\n" + json.dumps(other) + "\n"
    assert read_records(write(tmp_path / "a.jsonl", lines), needs_answer=True) == expected


def test_lists_and_lines_are_told_apart_by_what_is_in_the_file(tmp_path):
    expected = [Record("2 + 2?", "", "The answer is 4.", "4")] * 2
    lines = json.dumps(GOOD) + "\n" + json.dumps(GOOD)
    assert read_records(write(tmp_path / "lines.json", lines), needs_answer=True) == expected
    assert read_records(write(tmp_path / "list.jsonl", json.dumps([GOOD, GOOD], indent=2)), needs_answer=True) == expected


def test_input_may_be_absent_and_answer_too_in_own_files(tmp_path):
    path = write(tmp_path / "own.json", [{"instruction": "Say hi", "output": "hi"}])
    assert read_records(path, needs_answer=False) == [Record("Say hi", "", "hi", "hi")]
    with pytest.raises(ValueError, match=r"empty.json' record 1: 'output' is empty, and there is no 'answer'"):
        read_records(write(tmp_path / "empty.json", [{"instruction": "Say hi", "output": ""}]), needs_answer=False)
    with pytest.raises(ValueError, match=r"own.json' record 1 has no 'answer'; its fields are instruction, output"):
        read_records(path, needs_answer=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{]", r"a.json' is not valid JSON: .* at line 1 column 3"),
        ("a.json", "", "a.json' has no records"),
        ("a.json", "[]", "a.json' has no records"),
        ("a.jsonl", "\n\n", "a.jsonl' has no records"),
        (
            "a.json",
            json.dumps(GOOD, indent=1),
            "a.json' holds a single object; expected a list of objects, or one object a line",
        ),
        ("a.json", "[" * 100_000, "a.json' is not valid JSON: it is nested too deeply"),
        ("a.json", '[{"instruction": "a", "instruction": "b"}]', "a.json': the key 'instruction' is there twice in one object"),
        ("a.json", json.dumps(GOOD) + "\n{", "a.json' line 2 is not valid JSON"),
        ("a.json", [{**GOOD, "answer": float("nan")}], "record 1 has no 'answer'"),
        ("a.json", "[1, \0]", r"a.json' line 1 has a NUL character"),
        ("a.json", [{**GOOD, "instruction": "cut \ud83d"}], r"a.json' has half of a character, '\\ud83d', as of an emoji"),
        ("a.jsonl", json.dumps(GOOD) + '\n{"\\uDE00": 1}', r"a.jsonl' line 2 has half of a character, '\\ude00'"),
        ("a.jsonl", '{"answer": ' + "1" * 5000 + "}", r"a.jsonl' line 1 cannot be read: Exceeds the limit"),
        ("a.json", [GOOD, "text"], r"record 2 is 'text'; expected an object"),
        ("a.json", [GOOD, {**GOOD, "output": None}], "record 2 has no 'output'"),
        ("a.json", [{}], "record 1 has no 'instruction'; its fields are none"),
        ("a.json", [{**GOOD, "instruction": 7}], r"record 1: 'instruction' is 7; expected text"),
        ("a.json", [{**GOOD, "instruction": "  "}], r"record 1: 'instruction' is empty"),
        ("a.json", [{**GOOD, "answer": " "}], r"record 1: 'answer' is empty"),
        ("a.json", [{**GOOD, "answer": True}], r"record 1: 'answer' is True; expected text"),
        ("a.json", [{**GOOD, "answer": ["4"]}], r"record 1: 'answer' is \['4'\]; expected text"),
        ("a.jsonl", json.dumps(GOOD) + "\n{", r"a.jsonl' line 2 is not valid JSON"),
        ("a.jsonl", "7", r"line 1 is 7; expected an object"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_records(write(tmp_path / name, content), needs_answer=True)
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    for content, message in (
        (
            b'[{"instruction":\n"\xff"}]',
            "a.json' is not UTF-8 text: line 2 has the byte 0xff, as in Windows-1252; save the file",
        ),
        ("[]".encode("utf-16"), "a.json' is not UTF-8 text but UTF-16; save the file as UTF-8"),
    ):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_records(tmp_path / "a.json", needs_answer=True)
