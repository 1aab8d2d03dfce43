"""Tables that strangers' names cannot turn into formulas or terminal commands."""

import csv

import pytest

from fourier_moe.errors import printable
from lightning_modules.adaptation import _agree
from lightning_modules.tables import csv_line, markdown_table, write_table


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ('=HYPERLINK("http://x")', '"\'=HYPERLINK(""http://x"")"'),
        ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-2+3", "'-2+3"),
        ("-0.5", "-0.5"),
        ("+1e-05", "+1e-05"),
        (-0.5, "-0.5"),
        ("p(=x)", "p(=x)"),
        ("a, b", '"a, b"'),
        ("ungerade ü", "ungerade ü"),
        ("\x1b]0;title\x07x", r"\x1b]0;title\x07x"),
        ("two\r\nlines", r"two\x0d\x0alines"),
        ("\t=1", r"\x09=1"),
        ("caf\udce9", r"caf\xe9"),
    ],
)
def test_cell_is_neither_a_formula_nor_a_command(cell, written):
    assert csv_line([cell, "x"]) == f"{written},x\r\n"


def test_table_is_read_back_by_the_csv_module(tmp_path):
    write_table(tmp_path / "x.csv", ["name", "value"], [["a\nb", 1], ["=1+1", "0.5"]])
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["name", "value"], [r"a\x0ab", "1"], ["'=1+1", "0.5"]]


def test_cells_of_a_printed_table_stay_in_their_cells():
    table = markdown_table(["set", "x"], [["a|b", "1"], ["\x1b[2Jc\n", "2"]])
    assert [line.replace(" ", "") for line in table.split("\n")] == [
        "|set|x|",
        "|------------|-|",
        r"|a\|b|1|",
        r"|\x1b[2Jc\x0a|2|",
    ]
    assert len({len(line) for line in table.split("\n")}) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢 👩‍🔬", "plain ü 漢 👩‍🔬"),  # a joiner is part of the last one
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b31m", r"\x9b31m"),
        ("\u2028", r"\u2028"),
        ("\ud800", r"\ud800"),
    ],
)
def test_text_is_shown_without_control_characters(text, shown):
    assert printable(text) == shown


def test_class_names_in_an_error_are_escaped():
    with pytest.raises(ValueError, match=r"2 classes \(\\x1b\[2J, b\)") as caught:
        _agree("the adapter", ["\x1b[2J", "b"], "the data", ["a"])
    assert "\x1b" not in str(caught.value)
