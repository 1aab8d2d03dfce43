import csv
import json
from pathlib import Path

import pytest

from datamodules import GlueDataModule
from datamodules.glue import data_module as glue
from datamodules.glue.custom import CustomSentences

ROWS = [("Good, really good.", "pos"), ('He said "no"\tand left.', "neg"), ('"Quoted"', "pos"), ("two\nlines", "neg")]
TRAIN = [*ROWS, *((f"sentence {number}", ("pos", "neg")[number % 2]) for number in range(16))]


def write_table(path, rows, columns=("sentence", "label"), **options):
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.writer(file, **options)
        writer.writerows([columns, *rows])


def write_list(path, rows, columns=("sentence", "label")):
    path.write_text(json.dumps([dict(zip(columns, row, strict=True)) for row in rows]), encoding="utf-8")


def write_lines(path, rows, columns=("sentence", "label")):
    lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")


WRITERS = {
    "tsv": lambda path, rows: write_table(path.with_suffix(".tsv"), rows, delimiter="\t"),
    "tsv, all quoted": lambda path, rows: write_table(path.with_suffix(".tsv"), rows, delimiter="\t", quoting=csv.QUOTE_ALL),
    "csv": lambda path, rows: write_table(path.with_suffix(".csv"), rows),
    "csv with semicolons": lambda path, rows: write_table(path.with_suffix(".csv"), rows, delimiter=";"),
    "csv with byte-order mark": lambda path, rows: write_table(path.with_suffix(".csv"), rows, encoding="utf-8-sig"),
    "csv with line feeds": lambda path, rows: write_table(path.with_suffix(".CSV"), rows, lineterminator="\n"),
    "json": lambda path, rows: write_list(path.with_suffix(".json"), rows),
    "json lines": lambda path, rows: write_lines(path.with_suffix(".jsonl"), rows),
    "json lines in a .json": lambda path, rows: write_lines(path.with_suffix(".json"), rows),
}


def texts(path, text):
    """A directory with a train and a dev file of these texts."""
    path.mkdir(exist_ok=True)
    for name, content in zip(("train.tsv", "dev.tsv"), (text, text), strict=True):
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("writer", WRITERS)
def test_every_kind_of_file_gives_the_same_examples(tmp_path, writer):
    for name in ("train", "dev"):
        WRITERS[writer](tmp_path / name, TRAIN)
    source = CustomSentences(tmp_path)
    examples = source.load("train")
    assert examples.sentences == ([sentence for sentence, _ in TRAIN],)
    assert examples.labels == [("neg", "pos").index(label) for _, label in TRAIN]
    assert examples.ids[:2] == ["train/0", "train/1"]
    assert source.task.class_names == ("neg", "pos")
    assert source.load("validation").ids[0] == "validation/0"


def test_kinds_may_be_mixed_and_other_files_are_named(tmp_path):
    write_lines(tmp_path / "Train.jsonl", TRAIN)
    write_table(tmp_path / "validation.csv", TRAIN)
    write_table(tmp_path / "train2.csv", TRAIN)
    (tmp_path / "README.md").write_text("about")
    source = CustomSentences(tmp_path)
    assert source.splits == {"train", "validation"}
    assert source.origin == f"'{tmp_path}' (Train.jsonl, validation.csv; not read: train2.csv)"


def test_pairs_and_further_columns(tmp_path):
    columns = ("number", "sentence2", "label", "sentence1")
    for name in ("train.csv", "dev.csv"):
        write_table(tmp_path / name, [(1, "b", "yes", "a"), (2, "d", "no", "c")], columns)
    examples = CustomSentences(tmp_path).load("train")
    assert (examples.sentences, examples.labels) == ((["a", "c"], ["b", "d"]), [1, 0])


def test_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "mine [v2] *?"
    folder.mkdir()
    for name in ("train.csv", "dev.csv"):
        write_table(folder / name, TRAIN)
    assert len(CustomSentences(folder).load("train")) == len(TRAIN)


@pytest.mark.parametrize("blank", ["pos ", " pos", "pos\u00a0", "pos\u3000"])
def test_white_space_around_a_label_makes_no_class(tmp_path, blank):
    for name in ("train.csv", "dev.csv"):
        write_table(tmp_path / name, [("a", "pos"), ("b", blank), ("c", "neg")], ("sentence ", " label"))
    source = CustomSentences(tmp_path)
    assert source.task.class_names == ("neg", "pos")
    assert source.load("validation").labels == [1, 1, 0]


def test_numbers_and_booleans_are_labels_in_json(tmp_path):
    for name in ("train.json", "dev.json"):
        write_list(tmp_path / name, [("a", 1), ("b", 1.0), ("c", "1"), ("d", True), ("e", 0.5)])
    assert CustomSentences(tmp_path).task.class_names == ("0.5", "1", "true")


def test_label_may_hold_invisible_joiners_as_persian_and_emojis_do(tmp_path):
    labels = ("\u0645\u06cc\u200c\u0631\u0648\u0645", "\U0001f468\u200d\U0001f469")
    source = CustomSentences(texts(tmp_path / "mine", f"sentence\tlabel\na\t{labels[0]}\nb\t{labels[1]}\n"))
    assert source.task.class_names == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence\tlabel\na\t1\nb\t1.0\n", r"line 2 has label '1', '.*train.tsv' line 3 '1.0': they would be two classes"),
        ("sentence\tlabel\na\tPos\nb\tpos\n", r"line 2 has label 'Pos', '.*train.tsv' line 3 'pos': .*; write them alike"),
        ("sentence\tlabel\na\tcafé\nb\tcafe\u0301\n", "they would be two classes"),
        ("sentence\tlabel\na\tpos\nb\tneg\n\t pos\n", r"train.tsv' line 4: sentence is empty"),
        ("sentence\tlabel\na\tpos\n \u00a0\tneg\n", r"line 3: sentence is empty"),
        ("sentence\tlabel\na\tpos\nb\t \n", r"line 3: label is ' '; expected the name of a class"),
        ("sentence\tlabel\na\tpos\nb\tne\x1b[31mg\n", r"line 3: label is 'ne\\x1b\[31mg'; expected the name"),
        ("sentence\tlabel\na\tpos\n\nb\n", r"line 4 has 1 fields where 2 are expected: sentence, label"),
        ("sentence\tlabel\na\tb\tpos\n", r"line 2 has 3 fields where 2 are expected"),
        ("sentence\tlabel\tlabel\na\tpos\tneg\n", r"train.tsv' has more than one column 'label'"),
        (
            "text\tlabel\na\tpos\n",
            r"train.tsv' has columns text, label; expected sentence, or sentence1 and sentence2, and label",
        ),
        ("sentence,label\na,pos\n", r"train.tsv' has columns sentence,label; expected"),
        ("sentence\tsentence1\tsentence2\tlabel\na\tb\tc\tpos\n", "has both sentence and sentence1, sentence2"),
        ("sentence\tlabel\na\tpos\nb\tpos\n", r"line 2: label 'pos' is the only one in this file; two or more are needed"),
        ("sentence\tlabel\n", r"train.tsv' has columns none"),
        ("", r"train.tsv' has columns none"),
        (
            'sentence\tlabel\n"Go," he said.\tpos\n',
            r"line 2: .*; a field that begins with one, or holds the delimiter, is put in",
        ),
        ('sentence\tlabel\na\tpos\n"Go, he said.\tpos\nHe said "no"\tneg\n', r"train.tsv' line 3: "),
        (
            'sentence\tlabel\n"Go, he said.\tpos\nno"\tneg\n',
            r"line 2: a field begins with a quotation mark that is closed lines",
        ),
        ('sentence\tlabel\na\tpos\n"Go, he said.\tpos\n', r"line 3: unexpected end of data"),
        (
            "sentence\tlabel\nb\tneg\ncaf\u00e9\tpos\n".encode("cp1252"),
            r"train.tsv' is not UTF-8 text: line 3 has the byte 0xe9",
        ),
        ("sentence\tlabel\na\tpos\n".encode("utf-16"), r"train.tsv' is not UTF-8 text but UTF-16; save the file as UTF-8"),
        ("sentence\tlabel\na\tpos\nb\0\tneg\n", r"train.tsv' line 3 has a NUL character"),
        ("sentence\tlabel\na\tpos\n".encode("utf-16-le"), r"train.tsv' line 1 has a NUL character"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        GlueDataModule("custom", "bytes", directory=str(texts(tmp_path / "mine", text)))
    assert "\n" not in str(error.value)


def test_line_ends_of_windows_and_old_macs_are_no_data(tmp_path):
    for end in ("\r\n", "\r"):
        source = CustomSentences(texts(tmp_path / "mine", end.join(["sentence\tlabel", "a\tpos", "b\tneg", ""])))
        assert source.load("train").sentences == (["a", "b"],)
        assert source.task.class_names == ("neg", "pos")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"sentence": "a"}, r"record 3 has no label; its columns are sentence"),
        ({"sentence": None, "label": "pos"}, r"record 3 has no sentence"),
        ({"sentence": 7, "label": "pos"}, r"record 3: sentence is 7; expected text"),
        ({"sentence": "a", "label": ["pos"]}, r"record 3: label is \['pos'\]; expected the name of a class"),
        (["a", "pos"], r"record 3 is \['a', 'pos'\]; expected an object such as"),
    ],
)
def test_json_of_another_form_is_named(tmp_path, record, message):
    good = [{"sentence": "a", "label": "pos"}, {"sentence": "b", "label": "neg"}]
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text(json.dumps([*good, record]))
    with pytest.raises(ValueError, match=message):
        CustomSentences(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"needs train.tsv \(or .csv, .json, .jsonl, .ndjson\) in directory '.*'; there is no such file"),
        (["training.csv"], "there is training.csv"),
        (["train.csv"], "has nothing to test beside its train file; add a dev file, or a test file with labels"),
        (["train.csv", "train.tsv", "dev.csv"], "has train.csv and train.tsv; leave one train file"),
        (["train.csv", "dev.csv", "val.csv"], "has dev.csv and val.csv; leave one validation file"),
    ],
)
def test_files_that_are_missing_or_too_many_are_named(tmp_path, names, message):
    for name in names:
        write_table(tmp_path / name, TRAIN, delimiter="\t" if name.endswith("tsv") else ",")
    with pytest.raises(ValueError, match=message):
        CustomSentences(tmp_path)
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        CustomSentences(Path("nowhere"))


def test_labels_of_dev_are_those_of_train(tmp_path):
    write_table(tmp_path / "train.csv", TRAIN)
    write_table(tmp_path / "dev.csv", [("a", "Pos")])
    with pytest.raises(ValueError, match=r"dev.csv' line 2: label 'Pos' is not among those of '.*train.csv': neg, pos"):
        CustomSentences(tmp_path)


# What is tested


def sizes(data):
    return {part: [len(dataset) for dataset in data.datasets(part).values()] for part in ("train", "selection", "tested")}


def ready(directory, monkeypatch, **arguments):
    told = []
    monkeypatch.setattr(glue, "rank_zero_info", told.append)
    data = GlueDataModule("custom", "bytes", directory=str(directory), batch_size=4, **arguments)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    return data, told[0]


def test_without_a_test_file_dev_is_tested_and_a_part_of_train_decides(tmp_path, monkeypatch):
    write_table(tmp_path / "train.csv", TRAIN)
    write_table(tmp_path / "dev.csv", TRAIN[:6])
    data, told = ready(tmp_path, monkeypatch)
    assert sizes(data) == {"train": [18], "selection": [2], "tested": [6]}
    assert "val 2 (held out of train), test 6 (its own validation split); 2 classes: neg, pos;" in told


def test_test_file_with_labels_is_tested_and_dev_decides(tmp_path, monkeypatch):
    write_table(tmp_path / "train.csv", TRAIN)
    write_table(tmp_path / "dev.csv", TRAIN[:6])
    write_lines(tmp_path / "test.jsonl", TRAIN[:5])
    data, told = ready(tmp_path, monkeypatch)
    assert sizes(data) == {"train": [20], "selection": [6], "tested": [5]}
    assert "train 20 (its own train split), val 6 (its own validation split), test 5 (its own test split);" in told
    batch = next(iter(data.test_dataloader()))
    assert (batch["id"][0], batch["label"].tolist()) == ("test/0", [1, 0, 1, 0])
    assert next(iter(data.predict_dataloader()))["id"][0] == "test/0"


def test_test_file_with_labels_may_stand_beside_train_alone(tmp_path, monkeypatch):
    write_table(tmp_path / "train.csv", TRAIN)
    write_table(tmp_path / "test.csv", TRAIN[:5])
    data, _ = ready(tmp_path, monkeypatch)
    assert sizes(data) == {"train": [18], "selection": [2], "tested": [5]}
    with pytest.raises(ValueError, match=r"selection=validation needs a dev file; expected dev.tsv or validation.tsv"):
        GlueDataModule("custom", "bytes", directory=str(tmp_path), selection="validation")


def test_the_former_name_still_works(tmp_path):
    write_table(tmp_path / "train.csv", TRAIN)
    write_table(tmp_path / "dev.csv", TRAIN[:6])
    assert GlueDataModule("own", "bytes", directory=str(tmp_path)).dataset_name == "custom"


def test_test_file_with_some_labels_is_refused(tmp_path):
    write_table(tmp_path / "train.csv", TRAIN)
    write_table(tmp_path / "dev.csv", TRAIN[:6])
    (tmp_path / "test.jsonl").write_text('{"sentence": "a"}\n{"sentence": "b", "label": "pos"}')
    with pytest.raises(ValueError, match=r"line 2 has a label, and '.*test.jsonl' line 1 has none; give all examples"):
        CustomSentences(tmp_path)


def test_test_file_without_labels_is_for_predict(tmp_path, monkeypatch):
    write_table(tmp_path / "train.csv", TRAIN)
    write_table(tmp_path / "dev.csv", TRAIN[:6])
    write_table(tmp_path / "test.csv", [("a",), ("b",)], ("sentence",))
    data, _ = ready(tmp_path, monkeypatch)
    assert sizes(data)["tested"] == [6]
    batch = next(iter(data.predict_dataloader()))
    assert batch["id"] == ["test/0", "test/1"]
    assert "label" not in batch
