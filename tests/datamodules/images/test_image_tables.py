import datasets
import pytest

from datamodules.images.directory import open_directory
from datamodules.images.files import decode_rgb
from datamodules.images.parquet import LoadedTables


@pytest.mark.parametrize("folder", [".", "data"])
def test_parquet_with_metadata_has_named_classes(folder, tmp_path, encode, write_parquet):
    for split in ("train", "test"):
        path = tmp_path / folder / f"{split}-00000-of-00001.parquet"
        write_parquet(path, [(encode(), 1), (encode(), 0)], ["cat", "dog"])
    collection = open_directory(tmp_path)
    assert collection.class_names == ["cat", "dog"]
    images = collection.load("train")
    assert (images.ids, images.labels) == (["train/0", "train/1"], [1, 0])
    content, name = images.read(1)
    assert decode_rgb(content, name).size == (12, 10)


def test_parquet_without_metadata_has_the_train_values_as_classes(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train.parquet", [(encode(), 7), (encode(), 3), (encode(), 12)])
    write_parquet(tmp_path / "test.parquet", [(encode(), 12)])
    collection = open_directory(tmp_path)
    assert collection.class_names == ["3", "7", "12"]
    assert collection.load("train").labels == [1, 0, 2]
    test = collection.load("test")
    assert test.labels == [2]
    assert decode_rgb(*test.read(0)).mode == "RGB"


def test_parts_of_a_split_are_joined_in_order(tmp_path, encode, write_parquet):
    for part, label in enumerate([1, 0, 1]):
        write_parquet(tmp_path / f"train-{part:05}-of-00003.parquet", [(encode(), label)], ["a", "b"])
    write_parquet(tmp_path / "test.parquet", [(encode(), 0)], ["a", "b"])
    assert open_directory(tmp_path).load("train").labels == [1, 0, 1]


def test_missing_part_is_named(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [(encode(), 0)])
    write_parquet(tmp_path / "test.parquet", [(encode(), 0)])
    with pytest.raises(ValueError, match=r"part\(s\) \[1\] of 2 are missing"):
        open_directory(tmp_path)


def test_own_validation_split_is_found(tmp_path, encode, write_parquet):
    for split in ("train", "validation", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [(encode(), 0)], ["a"])
    assert open_directory(tmp_path).load("validation").labels == [0]


@pytest.mark.parametrize("name", ["dev", "Val", "valid-00000-of-00001"])
def test_own_validation_split_has_other_names_too(name, tmp_path, encode, write_parquet):
    for split in ("train", name, "test"):
        write_parquet(tmp_path / f"{split}.parquet", [(encode(), 0)] * (2 if split == name else 1), ["a"])
    assert open_directory(tmp_path).load("validation").labels == [0, 0]


def test_split_under_two_names_is_an_error(tmp_path, encode, write_parquet):
    for split in ("train", "val", "dev", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [(encode(), 0)], ["a"])
    with pytest.raises(ValueError, match=r"parquet files named 'dev', 'val' for the validation split; keep one"):
        open_directory(tmp_path)


def test_parquet_file_of_no_split_is_named(tmp_path, encode, write_parquet):
    for split in ("train", "test", "unlabeled"):
        write_parquet(tmp_path / f"{split}.parquet", [(encode(), 0)], ["a"])
    (note,) = open_directory(tmp_path).notes
    assert "1 parquet file(s) left out: 'unlabeled.parquet'; names begin with train" in note


@pytest.mark.parametrize("name", ["cars [v2]", "a?b", "[!x]", "**", "{a,b}", "c:d %20#"])
def test_folder_is_not_taken_for_a_pattern(name, tmp_path, encode, write_parquet):
    for folder, count in {name: 1, "a_b": 2, "cars v": 2, "cars 2": 2}.items():  # what the patterns would find
        for split in ("train", "test"):
            write_parquet(tmp_path / folder / f"{split}.parquet", [(encode(), 0)] * count, ["a"])
    assert len(open_directory(tmp_path / name).load("train")) == 1


def test_path_that_datasets_cannot_read_is_refused_at_once(tmp_path, encode, write_parquet):
    for split in ("train", "test"):
        write_parquet(tmp_path / "a::b" / f"{split}.parquet", [(encode(), 0)], ["a"])
    with pytest.raises(ValueError, match="holds '::', which the datasets library cannot read; rename"):
        open_directory(tmp_path / "a::b")


def test_path_in_a_table_that_is_not_a_file_is_refused(encode):
    features = datasets.Features({"a": datasets.Image(), "b": datasets.ClassLabel(names=["x"])})
    rows = datasets.Dataset.from_dict({"a": [{"bytes": None, "path": "/dev/zero"}], "b": [0]}, features=features)
    images = LoadedTables({"train": rows, "test": rows}, "somewhere").load("train")
    with pytest.raises(ValueError, match="'/dev/zero' is not a file"):
        images.read(0)


def test_missing_test_file_is_an_error(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train.parquet", [(encode(), 0)])
    with pytest.raises(ValueError, match="has no test split; expected"):
        open_directory(tmp_path)


def test_classes_are_matched_by_name_when_splits_order_them_differently(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train.parquet", [(encode(), 0), (encode(), 1)], ["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", [(encode(), 0)], ["dog", "cat"])
    assert open_directory(tmp_path).load("test").labels == [1]


def test_class_of_test_without_train_rows_is_named(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train.parquet", [(encode(), 0)], ["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", [(encode(), 1)], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"1 class\(es\) of the test split have no train images: 'dog'"):
        open_directory(tmp_path)


def test_rows_without_label_are_an_error(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train.parquet", [(encode(), 0)], ["cat"])
    write_parquet(tmp_path / "test.parquet", [(encode(), -1)], ["cat"])
    with pytest.raises(ValueError, match=r"label\(s\) \[-1\] in the test split .* rows without a label"):
        open_directory(tmp_path)


def test_truncated_parquet_is_named(tmp_path, encode, write_parquet):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [(encode(), 0)])
    (tmp_path / "test.parquet").write_bytes((tmp_path / "test.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"test\.parquet' is not a complete parquet file .* download it again"):
        open_directory(tmp_path)


def table(encode, **features):
    values = {"Image": {"bytes": encode(), "path": None}, "ClassLabel": 0, "Value": 0}
    rows = {name: [values[type(feature).__name__]] for name, feature in features.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_columns_are_found_by_type(encode):
    features = {"foto": datasets.Image(), "id": datasets.Value("int64"), "art": datasets.ClassLabel(names=["x"])}
    collection = LoadedTables({"train": table(encode, **features), "test": table(encode, **features)}, "somewhere")
    assert collection.class_names == ["x"]
    assert decode_rgb(*collection.load("test").read(0)).size == (12, 10)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"label": datasets.ClassLabel(names=["x"])}, r"0 columns that could be the image \(none\)"),
        ({"a": datasets.Image(), "b": datasets.Image()}, r"2 columns that could be the image \('a', 'b'\)"),
        ({"a": datasets.Image()}, r"0 columns that could be the label \(none\)"),
        (
            {"a": datasets.Image(), "b": datasets.Value("int64"), "c": datasets.Value("int32")},
            r"2 columns that could be the label \('b', 'c'\) of 'a', 'b', 'c'",
        ),
    ],
)
def test_ambiguous_or_missing_column_is_an_error(features, message, encode):
    split = table(encode, **features)
    with pytest.raises(ValueError, match=message):
        LoadedTables({"train": split, "test": split}, "somewhere")
