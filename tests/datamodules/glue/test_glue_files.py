import pytest

from datamodules.glue.benchmarks import TASKS, find_task
from datamodules.glue.directory import open_directory
from datamodules.glue.synthetic import NUM_EXAMPLES, write_tsv_files
from datamodules.glue.tsv import read_tsv

RTE_HEADER = ["index", "sentence1", "sentence2", "label"]


# The table


def test_labels_are_in_the_hubs_order():
    assert {name: task.class_names for name, task in TASKS.items()} == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "qqp": ("not_duplicate", "duplicate"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
    }


@pytest.mark.parametrize(("name", "key"), [("cola", "cola"), ("CoLA", "cola"), ("SST-2", "sst2"), ("MNLI", "mnli")])
def test_task_is_found_in_any_case(name, key):
    assert find_task(name) == (key, TASKS[key])


def test_unknown_task_names_those_that_there_are():
    with pytest.raises(
        ValueError, match=r"dataset 'qqnli' is unknown \(did you mean qnli or mnli\?\); choose one of cola, sst2, mrpc"
    ):
        find_task("qqnli")


# Single lines


def test_cola_has_no_header_and_its_test_file_has_one(write):
    folder = write("cola", "train.tsv", [["gj04", "1", "", "He sleeps."], ["gj04", "0", "*", "Him sleep."]])
    write("cola", "test.tsv", [["index", "sentence"], ["0", "She runs."]])
    train = read_tsv(folder / "train.tsv", TASKS["cola"], "train")
    assert train.sentences == (["He sleeps.", "Him sleep."],)
    assert train.labels == [1, 0]
    assert train.ids == ["train/0", "train/1"]
    test = read_tsv(folder / "test.tsv", TASKS["cola"], "test")
    assert (test.sentences, test.labels, test.ids) == ((["She runs."],), None, ["test/0"])


def test_quotes_unicode_separators_and_spaces_are_data(write):
    sentences = ['He said "go', '"', "one\u2028line\x85still", " spaces kept ", ""]
    folder = write("sst2", "train.tsv", [["sentence", "label"], *([sentence, "1"] for sentence in sentences)])
    assert read_tsv(folder / "train.tsv", TASKS["sst2"], "train").sentences == (sentences,)


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8-sig", "\r\n")])
def test_byte_order_mark_and_windows_line_ends_are_no_data(write, encoding, newline):
    rows = [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", "a", "b"], ["0", "9", "1", "c", "d"]]
    folder = write("mrpc", "train.tsv", rows, encoding, newline)
    examples = read_tsv(folder / "train.tsv", TASKS["mrpc"], "train")
    assert (examples.sentences, examples.labels) == ((["a", "c"], ["b", "d"]), [1, 0])


def test_byte_order_mark_before_a_file_without_header_is_no_data(write):
    folder = write("cola", "dev.tsv", [["gj04", "1", "", "He sleeps."]], "utf-8-sig")
    assert len(read_tsv(folder / "dev.tsv", TASKS["cola"], "validation")) == 1


def test_columns_are_found_by_name_whatever_their_order(write):
    folder = write("mnli", "train.tsv", [["gold_label", "label5", "sentence2", "sentence1"], ["neutral", "x", "b", "a"]])
    examples = read_tsv(folder / "train.tsv", TASKS["mnli"], "train")
    assert (examples.sentences, examples.labels) == ((["a"], ["b"]), [1])


def test_short_lines_of_qqp_are_left_out_counted_and_keep_their_number(write):
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    rows = [["0", "1", "2", "a", "b", "1"], ["1", "3", "4", "c"], ["d", "0"], ["2", "5", "6", "e", "f", "0"]]
    folder = write("qqp", "train.tsv", [header, *rows])
    examples = read_tsv(folder / "train.tsv", TASKS["qqp"], "train")
    assert examples.skipped == 2
    assert examples.ids == ["train/0", "train/3"]
    assert (examples.sentences, examples.labels) == ((["a", "e"], ["b", "f"]), [1, 0])


@pytest.mark.parametrize("task", ["rte", "qqp"])
def test_line_with_too_many_fields_is_an_error(write, task):
    columns = list(TASKS[task].tsv.columns)
    folder = write(task, "train.tsv", [columns, [*columns, "more"]])
    with pytest.raises(ValueError, match=rf"train.tsv', line 2: {len(columns) + 1} fields where {len(columns)} are expected"):
        read_tsv(folder / "train.tsv", TASKS[task], "train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([RTE_HEADER, ["0", "a", "b", "entailment"], [], ["1", "a", "entailment"]], r"train.tsv', line 4: 3 fields where 4"),
        (
            [RTE_HEADER, ["0", "a", "b", "maybe"]],
            r"line 2: label 'maybe' is unknown; RTE has entailment, not_entailment in column 4",
        ),
        ([RTE_HEADER, ["0", "a", "b", ""]], r"line 2: label '' is unknown"),
        (
            [["index", "sentence1", "label"], ["0", "a", "entailment"]],
            r"no column 'sentence2'; its first line should be 'index'",
        ),
        ([["0", "a", "b", "entailment"]], r"no column 'sentence1', 'sentence2', 'label'"),
        ([RTE_HEADER], r"train.tsv' has no examples of train; download it again"),
        ([], r"train.tsv' has no examples of train"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(write, rows, message):
    folder = write("rte", "train.tsv", rows)
    with pytest.raises(ValueError, match=message) as error:
        read_tsv(folder / "train.tsv", TASKS["rte"], "train")
    assert "\n" not in str(error.value)


def test_file_that_is_no_utf_8_is_named(write):
    folder = write("cola", "train.tsv", [["gj04", "1", "", "café"]], "latin-1")
    with pytest.raises(ValueError, match=r"train.tsv' is not UTF-8 text: line 1 has the byte 0xe9, as in Windows-1252; save"):
        read_tsv(folder / "train.tsv", TASKS["cola"], "train")


def test_file_of_another_task_is_refused(write):
    folder = write("cola", "train.tsv", [RTE_HEADER, ["0", "a", "b", "entailment"]])
    with pytest.raises(ValueError, match=r"line 1: label 'sentence1' is unknown; CoLA has 0, 1 in column 2"):
        read_tsv(folder / "train.tsv", TASKS["cola"], "train")


# Directories


def test_directory_is_the_tasks_folder_or_its_parent_in_any_case(write, tmp_path):
    folder = write("cola", "train.tsv", [["gj04", "1", "", "He sleeps."]])
    assert open_directory(folder, "cola", TASKS["cola"]).load("train").ids == ["train/0"]
    assert open_directory(folder.parent, "cola", TASKS["cola"]).load("train").ids == ["train/0"]
    folder.rename(folder.parent / "cola")
    source = open_directory(tmp_path / "glue", "cola", TASKS["cola"])
    assert source.splits == {"train"}
    assert source.origin.endswith("cola'")


def test_directory_without_the_task_says_what_is_expected(write, tmp_path):
    write("cola", "train.tsv", [["gj04", "1", "", "He sleeps."]])
    with pytest.raises(
        ValueError, match=r"glue' has no data of rte; expected RTE's files train.tsv and dev\*.tsv, or the hub's"
    ):
        open_directory(tmp_path / "glue", "rte", TASKS["rte"])
    with pytest.raises(ValueError, match="nowhere' does not exist; expected a directory with RTE's files"):
        open_directory(tmp_path / "nowhere", "rte", TASKS["rte"])


# Generated files


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_generated_files_that_read_like_the_real_ones(name, tmp_path):
    task = TASKS[name]
    write_tsv_files(tmp_path, task)
    source = open_directory(tmp_path, name, task)
    assert source.splits == set(task.all_splits)
    for split in task.all_splits:
        examples = source.load(split)
        assert len(examples) == NUM_EXAMPLES[split.partition("_")[0]]
        assert len(examples.sentences) == len(task.sentences)
        assert examples.skipped == 0
        if not split.startswith("test"):
            assert set(examples.labels) == set(range(len(task.class_names)))
        assert all('"here"' in sentence for column in examples.sentences for sentence in column)
