import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import hub_repositories

from datamodules.glue.benchmarks import TASKS
from datamodules.glue.directory import open_directory
from datamodules.glue.parquet import HubFiles, read_table

RTE = TASKS["rte"]


def table(labels, names=None, sentences=("a", "b")):
    """A table as the hub has it, with its metadata if class names are given."""
    columns = {"sentence1": sentences[0], "sentence2": sentences[1]}
    rows = {name: [f"{text}{row}" for row in range(len(labels))] for name, text in columns.items()}
    rows |= {"label": labels, "idx": list(range(len(labels)))}
    if names is None:
        return pa.table(rows)
    text, label = datasets.Value("string"), datasets.ClassLabel(names=list(names))
    features = datasets.Features({"sentence1": text, "sentence2": text, "label": label, "idx": datasets.Value("int32")})
    return datasets.Dataset.from_dict(rows, features=features).with_format("arrow")[:]


@pytest.mark.parametrize("names", [None, RTE.class_names])
def test_parquet_files_are_read_with_and_without_the_hubs_metadata(tmp_path, names):
    folder = tmp_path / "rte"
    folder.mkdir()
    pq.write_table(table([0, 1], names), folder / "train-00000-of-00002.parquet")
    pq.write_table(table([1], names), folder / "train-00001-of-00002.parquet")
    pq.write_table(table([1, 0], names), folder / "validation-00000-of-00001.parquet")
    pq.write_table(table([-1], names), folder / "test-00000-of-00001.parquet")
    for directory in (tmp_path, folder):
        source = open_directory(directory, "rte", RTE)
        assert source.splits == {"train", "validation", "test"}
        train, test = source.load("train"), source.load("test")
        assert (train.ids, train.labels) == (["train/0", "train/1", "train/2"], [0, 1, 1])
        assert train.sentences == (["a0", "a1", "a0"], ["b0", "b1", "b0"])
        assert test.labels is None


def test_missing_part_is_an_error(tmp_path):
    pq.write_table(table([0, 1]), tmp_path / "train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match=r"the train split in '.*' has 1 of 2 parquet files; download all of them"):
        open_directory(tmp_path, "rte", RTE)


def test_cut_off_file_is_named(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(table([0, 1]), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet' is not a complete parquet file"):
        open_directory(tmp_path, "rte", RTE).load("train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table([0, 2]), "here, row 1: label 2 is unknown; labels of RTE are 0 to 1"),
        (table([-1, 0]), "here, row 0: label -1 is unknown"),
        (
            pa.table({"sentence1": ["a"], "sentence2": ["b"], "label": pa.array([None], pa.int64())}),
            "row 0: label None is unknown",
        ),
        (
            table([0, 1], reversed(RTE.class_names)),
            "here has classes not_entailment, entailment; expected entailment, not_entail",
        ),
        (
            table([0]).drop_columns("sentence2"),
            "here has columns sentence1, label, idx; sentence1, sentence2, label are needed",
        ),
        (table([]), "here has no examples"),
        (pa.table({"sentence1": ["a", None], "sentence2": ["b", "c"], "label": [0, 1]}), "here, row 1: no sentence1"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(rows, message):
    with pytest.raises(ValueError, match=message):
        read_table(rows, RTE, "train", "here")


def test_hub_out_of_reach_says_what_to_do_instead():
    with pytest.raises(
        RuntimeError,
        match=r"'cola' cannot be loaded .* as 'nyu-mll/glue' \(HF_HUB_OFFLINE.*--include 'cola/\*'.*--data.directory DIR",
    ):
        HubFiles("cola", TASKS["cola"]).load("train")


def test_a_split_is_fetched_when_it_is_loaded_after_one_look_up(hub):
    hub.datasets["nyu-mll/glue"] = hub_repositories.glue()
    source = HubFiles("rte", RTE)
    source.look_up()
    assert source.load("validation").labels == [row % 2 for row in range(10)]
    assert source.load("train").sentences[1][7] == "The train sentence number 7 is short."
    assert source.load("test").labels is None
    assert hub.looked_up() == ["nyu-mll/glue"]
    assert hub.fetched() == [f"rte/{split}-00000-of-00001.parquet" for split in ("validation", "train", "test")]
    assert source.origin == f"hub id 'nyu-mll/glue' at {source.revision[:7]}"
    assert source.revision == hub.datasets["nyu-mll/glue"].commit
    with pytest.raises(RuntimeError, match=r"no files validation\*\.parquet in mnli/"):
        HubFiles("mnli", TASKS["mnli"]).load("validation")
