import os

import pytest

from datamodules.images.custom import ClassFolders
from datamodules.images.directory import open_directory


def test_classes_are_the_sorted_train_folders_and_ids_are_relative_paths(make_folders):
    directory = make_folders({"train": {"zebra": 1, "ant": 2}, "test": {"zebra": 1}})
    collection = open_directory(directory)
    assert isinstance(collection, ClassFolders)
    assert collection.class_names == ["ant", "zebra"]
    train, test = collection.load("train"), collection.load("test")
    assert train.ids == ["train/ant/0.jpg", "train/ant/1.jpg", "train/zebra/0.jpg"]
    assert train.labels == [0, 0, 1]
    assert (test.ids, test.labels) == (["test/zebra/0.jpg"], [1])


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val", "dev", "VALIDATION"])
def test_own_validation_split_is_found_under_its_usual_names(name, make_folders):
    collection = open_directory(make_folders({"train": {"a": 1}, name: {"a": 2}, "test": {"a": 1}}))
    assert len(collection.load("validation")) == 2


@pytest.mark.parametrize(("train", "test"), [("Train", "TEST"), ("training", "testing"), ("train", "eval")])
def test_train_and_test_have_other_names_too(train, test, make_folders):
    collection = open_directory(make_folders({train: {"a": 1}, test: {"a": 2}}))
    assert collection.load("test").ids == [f"{test}/a/0.jpg", f"{test}/a/1.jpg"]
    assert collection.notes == []


def test_images_in_folders_of_a_class_folder_are_its_images(make_folders, encode):
    directory = make_folders({"train": {"a": 1, "b": 0}, "test": {"a": 1}})
    (directory / "train/b/deep/er").mkdir(parents=True)
    for path in ("train/b/deep/er/y.jfif", "train/a/more"):
        (directory / path).write_bytes(encode())
    collection = open_directory(directory)
    train = collection.load("train")
    assert (train.ids, train.labels) == (["train/a/0.jpg", "train/b/deep/er/y.jfif"], [0, 1])
    assert len(collection.notes) == 1
    assert "1 file(s) left out, which are not images by their names (1 no suffix): 'train/a/more'" in collection.notes[0]


def test_folders_and_files_that_are_left_out_are_named(make_folders, encode):
    directory = make_folders({"train": {"a": 1}, "test": {"a": 1}, "holdout": {"a": 1}})
    (directory / "train/x.jpg").write_bytes(encode())
    folder, file = open_directory(directory).notes
    assert (
        "1 folder(s) left out, which are no splits by their names: 'holdout'; splits are train, training, validation" in folder
    )
    assert "1 file(s) left out, which are in no class folder: 'train/x.jpg'" in file


def test_class_folder_whose_name_is_not_utf8_is_refused(make_folders):
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match=r"1 class name\(s\) are not UTF-8.*'caf\\xe9' .*rename them"):
        open_directory(make_folders({"train": {name: 1, "tea": 1}, "test": {"tea": 1}}))


def test_file_whose_name_is_not_utf8_has_an_id_that_is(make_folders, encode):
    directory = make_folders({"train": {"a": 1}, "test": {"a": 1}})
    (directory / "test/a" / os.fsdecode(b"\xe9\x1b.jpg")).write_bytes(encode())
    test = open_directory(directory).load("test")
    assert test.ids == ["test/a/0.jpg", r"test/a/\xe9\x1b.jpg"]
    assert test.read(1)[0] == encode()


def test_two_validation_folders_are_an_error(make_folders):
    directory = make_folders({"train": {"a": 1}, "val": {"a": 1}, "valid": {"a": 1}, "test": {"a": 1}})
    with pytest.raises(ValueError, match="2 folders for the validation split: 'val', 'valid'; keep one"):
        open_directory(directory)


def test_missing_directory_is_named_with_the_expected_layouts(tmp_path):
    with pytest.raises(ValueError, match=r"directory '.*nowhere' does not exist; .*<class name>.*parquet"):
        open_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(("present", "missing"), [("train", "no test"), ("test", "no train"), ("x", "no train and no test")])
def test_missing_split_is_named_with_the_expected_layouts(present, missing, make_folders):
    with pytest.raises(ValueError, match=rf"has {missing} split; expected .*<class name>"):
        open_directory(make_folders({present: {"a": 1}}))


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_without_train_folder_is_named(split, make_folders):
    splits = {"train": {"a": 1}, "val": {"a": 1}, "test": {"a": 1}}
    splits[split] = {"a": 1, "dodo": 1, "moa": 1}
    with pytest.raises(ValueError, match=rf"2 class\(es\) of the {split}.* split have no train images: 'dodo', 'moa'"):
        open_directory(make_folders(splits))


def test_empty_class_folder_is_named(make_folders):
    directory = make_folders({"train": {"a": 1, "void": 0}, "test": {"a": 1}})
    (directory / "train" / "void" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"1 class folder\(s\) without images: '.*train/void'"):
        open_directory(directory)


def test_images_outside_class_folders_are_explained(make_folders):
    directory = make_folders({"train": {}, "test": {"a": 1}})
    (directory / "train").mkdir()
    (directory / "train" / "x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no class folders in '.*train': images are expected in train/<class name>/"):
        open_directory(directory)


def test_hidden_folders_and_files_are_no_classes_and_no_images(make_folders):
    directory = make_folders({"train": {"a": 1, ".ipynb_checkpoints": 0}, "test": {"a": 1}})
    (directory / "train" / "a" / "._0.jpg").write_bytes(b"resource fork")
    collection = open_directory(directory)
    assert collection.class_names == ["a"]
    assert len(collection.load("train")) == 1
