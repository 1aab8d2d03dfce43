import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from PIL import Image
from support import REPOSITORY
from support.recorder import Recorder, trainer

from datamodules import ImageDataModule
from datamodules.images import data_module as images
from datamodules.images.benchmarks import BENCHMARKS
from datamodules.shared.sampling import evaluation_sampler

REAL_CARS = REPOSITORY.parent / "shared/data/images/cars"


def module(dataset="custom", **arguments) -> ImageDataModule:
    return ImageDataModule(dataset, **{"num_workers": 0, "batch_size": 4, "image_size": 16, **arguments})


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(images, "rank_zero_info", told.append)
    return told


@pytest.fixture
def directory(make_folders) -> Path:
    return make_folders({"train": {"a": 10, "b": 10}, "test": {"a": 3, "b": 2}})


@pytest.fixture
def loose_images(tmp_path, encode) -> Path:
    for name in ("z.png", "deep/er/a.jpg"):
        (tmp_path / "loose" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loose" / name).write_bytes(encode())
    return tmp_path / "loose"


class ImageRecorder(Recorder):
    def __init__(self):
        super().__init__("image")

    def predict_step(self, batch, batch_idx):
        return batch


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"image_size": 0}, "image_size must be 1 or more, got 0"),
        ({"mean": (0.5, 0.5)}, r"mean must be three numbers, got \(0.5, 0.5\)"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be three positive numbers"),
        ({"validation_fraction": 0.0}, "validation_fraction must be between 0 and 1, exclusive, got 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be between 0 and 1, exclusive, got 1.0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"directory": "x", "synthetic": True}, "directory 'x' and synthetic cannot be used together"),
        ({"directory": "no/where"}, "directory 'no/where' does not exist; expected a directory with class folders"),
        ({"predict_directory": "no/where"}, "predict_directory 'no/where' does not exist"),
        ({"dataset": "carz"}, "dataset 'carz' is unknown"),
    ],
)
def test_invalid_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**{"dataset": "digits", **arguments})


def test_arguments_come_from_yaml_with_their_documentation(directory, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # instantiate_classes has a successor since 4.49
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageDataModule, "data")
    config = {"data": {"dataset": "custom", "directory": str(directory), "mean": [0, 0, 0]}}
    parsed = parser.parse_string(json.dumps(config))
    assert parser.instantiate_classes(parsed).data.num_classes == 2
    assert "share of train held out for validation" in parser.format_help()


# Splits and batches


def test_fit_loads_train_and_held_out_validation_and_says_so_once(directory, messages):
    data = module(directory=str(directory))
    assert (data.num_classes, data.class_names) == (2, ["a", "b"])
    data.setup("fit")
    data.setup("fit")
    train, validation = data.train_dataloader().dataset, data.val_dataloader().dataset
    assert (len(train), len(validation)) == (18, 2)
    assert messages == [
        f"custom: 2 classes; train 18, validation 2 (10% held out of train); from class folders in '{directory}'"
    ]
    with pytest.raises(KeyError):
        data.test_dataloader()


def test_validation_alone_is_the_same_as_in_fit(directory):
    ids = []
    for stage in ("fit", "validate"):
        data = module(directory=str(directory), seed=5)
        data.setup(stage)
        ids.append([name for batch in data.val_dataloader() for name in batch["id"]])
    assert ids[0] == ids[1]


def test_own_validation_split_is_used_instead_of_train_images(make_folders):
    data = module(directory=str(make_folders({"train": {"a": 4}, "valid": {"a": 3}, "test": {"a": 1}})))
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 4
    assert [name for batch in data.val_dataloader() for name in batch["id"]] == [f"valid/a/{n}.jpg" for n in range(3)]


def test_batch_has_images_labels_and_ids(directory):
    data = module(directory=str(directory))
    data.setup("test")
    first, last = list(data.test_dataloader())
    assert (first["image"].shape, first["image"].dtype) == ((4, 3, 16, 16), torch.uint8)
    assert (last["label"].tolist(), last["label"].dtype) == ([1], torch.int64)
    assert first["id"] == [f"test/a/{n}.jpg" for n in range(3)] + ["test/b/0.jpg"]


def test_trainer_normalizes_what_the_workers_hand_over_as_bytes(directory):
    data, seen = module(directory=str(directory)), []

    class Model(ImageRecorder):
        def test_step(self, batch, batch_idx):
            seen.append(batch["image"])

    trainer().test(Model(), datamodule=data, verbose=False)
    loaded = [batch["image"] for batch in data.test_dataloader()]
    assert {images.dtype for images in seen} == {torch.float32}
    assert all(torch.equal(data.normalize(images), given) for images, given in zip(loaded, seen, strict=True))


@pytest.mark.parametrize(
    ("free", "fits"), [(2 * 2 * 512 * 3 * 224 * 224, True), (2 * 2 * 512 * 3 * 224 * 224 - 1, False), (64 << 20, False)]
)
def test_too_little_shared_memory_is_refused_before_anything_is_downloaded(monkeypatch, free, fits):
    monkeypatch.setattr("datamodules.shared.loading.SHARED_MEMORY", Path.cwd())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr("datamodules.images.benchmarks.HubBenchmark.download", lambda *_: None)
    data = ImageDataModule("cars", batch_size=512, num_workers=2)
    if fits:
        data.prepare_data()
    else:
        match = r"num_workers=2 .* up to 0\.29 GiB.*/dev/shm .*--shm-size=1g.*--data\.num_workers [01]"
        with pytest.raises(ValueError, match=match):
            data.prepare_data()


def test_shared_memory_is_counted_for_the_images_there_are(directory, monkeypatch):
    monkeypatch.setattr("datamodules.shared.loading.SHARED_MEMORY", Path.cwd())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    module(directory=str(directory), batch_size=10_000, image_size=224, num_workers=8).setup("fit")


def test_train_order_is_shuffled_and_follows_the_seed_of_the_run_only(directory):
    def epochs(seed, drawn=0):
        torch.manual_seed(seed)
        torch.rand(drawn)  # what the initialization of some model would have drawn
        data = module(directory=str(directory))
        data.setup("fit")
        loader = data.train_dataloader()
        return [[name for batch in loader for name in batch["id"]] for _ in range(2)]

    assert epochs(0) == epochs(0, drawn=7) != epochs(1)
    first, second = epochs(0)
    assert first != second
    assert sorted(first) == sorted(second) != first


def test_workers_persist_and_give_the_same_images(directory):
    data = module(directory=str(directory), num_workers=1)
    data.setup("test")
    loader = data.test_dataloader()
    assert loader.persistent_workers
    alone = module(directory=str(directory))
    alone.setup("test")
    for batch, expected in zip(loader, alone.test_dataloader(), strict=True):
        torch.testing.assert_close(batch["image"], expected["image"])


def test_subset_of_a_named_data_set_has_the_classes_that_are_there(directory, messages):
    data = module("eurosat", directory=str(directory))
    assert data.num_classes == 2
    data.setup("test")
    start = "eurosat: 2 classes (the complete set has 10); test 5; test has 5 of the complete set's 2,700 images; from"
    assert messages[0].startswith(start)


def test_directory_of_parquet_files_works_end_to_end(tmp_path, encode, write_parquet):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [(encode(), label) for label in (1, 2)] * 3)
    data = module("cars", directory=str(tmp_path))
    assert (data.num_classes, data.class_names) == (2, ["1", "2"])
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert (batch["label"].tolist(), batch["id"][3]) == ([0, 1, 0, 1], "test/3")


@pytest.mark.parametrize(("split", "stage"), [("test", "test"), ("test", "fit"), ("train", "fit")])
def test_broken_file_stops_setup_of_its_split_and_fit_looks_at_the_test_images_too(directory, encode, split, stage):
    (directory / split / "b" / "1.jpg").write_bytes(encode()[:100])
    data = module(directory=str(directory))
    with pytest.raises(ValueError, match=rf"1 truncated or corrupt image file\(s\): '.*{split}/b/1\.jpg'"):
        data.setup(stage)


def test_broken_train_file_does_not_stop_the_test(directory, encode):
    (directory / "train" / "b" / "1.jpg").write_bytes(encode()[:100])
    module(directory=str(directory)).setup("test")


def test_digits_need_nothing():
    data = module("digits", image_size=8)
    assert data.num_classes == 10
    data.setup("fit")
    data.setup("test")
    sizes = [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert sizes == [808, 90, 899]
    assert data.class_names[7] == "7"


# Prediction


def test_predict_directory_needs_no_data_set_and_has_no_labels(loose_images, messages):
    data = module("cars", predict_directory=str(loose_images))
    assert data.num_classes == 196
    (batch,) = trainer().predict(ImageRecorder(), datamodule=data)
    assert batch["id"] == ["deep/er/a.jpg", "z.png"]
    assert set(batch) == {"image", "id"}
    assert messages == [f"cars: predict 2 images without labels, from '{loose_images}'"]


def test_folder_with_nothing_but_a_predict_directory_does_not_know_its_classes(loose_images):
    data = module("custom", predict_directory=str(loose_images))
    assert data.num_classes is None
    data.setup("predict")
    with pytest.raises(ValueError, match="dataset 'custom' needs directory"):
        data.setup("fit")


def test_predict_goes_through_the_test_split_without_predict_directory(directory):
    data = module(directory=str(directory))
    data.setup("predict")
    assert [len(batch["label"]) for batch in data.predict_dataloader()] == [4, 1]


def test_predict_directory_beside_a_directory_keeps_its_classes(directory, loose_images, messages):
    data = module(directory=str(directory), predict_directory=str(loose_images))
    data.setup("predict")
    assert data.class_names == ["a", "b"]
    assert len(data.predict_dataloader().dataset) == 2
    assert str(loose_images) in messages[0]


def test_predict_directory_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"predict_directory '.*' has no images; looked at any depth for .*\.bmp"):
        module("cars", predict_directory=str(tmp_path)).setup("predict")


def test_what_is_left_out_of_a_predict_directory_is_named_in_a_warning(loose_images, tmp_path, encode):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/b.jpe").write_bytes(encode())
    (loose_images / "link").symlink_to(tmp_path / "more")
    (loose_images / "x.heic").write_bytes(b"")
    data = module("cars", predict_directory=str(loose_images))
    with pytest.warns(UserWarning, match=r"1 file\(s\) left out.*\.heic.*'x\.heic'"):
        data.setup("predict")
    assert data.predict_dataloader().dataset.split.ids == ["deep/er/a.jpg", "link/b.jpe", "z.png"]


def test_the_former_name_of_custom_still_works_and_is_said(directory, monkeypatch):
    told = []
    monkeypatch.setattr("datamodules.shared.custom.rank_zero_info", told.append)
    assert module("folder", directory=str(directory)).dataset_name == module(directory=str(directory)).dataset_name == "custom"
    assert told == ["dataset 'folder' is called 'custom' now"]


def test_what_is_left_out_of_a_directory_is_named_in_a_warning(directory):
    (directory / "holdout").mkdir()
    with pytest.warns(UserWarning, match=r"1 folder\(s\) left out.*'holdout'"):
        module(directory=str(directory))


# Generated data


@pytest.fixture
def generated_directories(tmp_path, monkeypatch) -> Callable[[], list[Path]]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return lambda: list(tmp_path.glob("synthetic_data_*"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_row_has_generated_data_that_read_like_the_real_ones(name):
    data = module(name, synthetic=True)
    assert data.num_classes == 4
    assert len(data.class_names) == 4
    for stage in ("fit", "test"):
        data.setup(stage)
    sizes = [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert sizes == ([32, 16, 16] if "validation" in BENCHMARKS[name].splits else [29, 3, 16])
    assert {label for batch in data.test_dataloader() for label in batch["label"].tolist()} == {0, 1, 2, 3}


def test_generated_data_are_the_same_in_every_process_and_gone_after_teardown(generated_directories):
    first, second = module("cars", synthetic=True), module("cars", synthetic=True)
    assert len(generated_directories()) == 2
    for data in (first, second):
        data.setup("test")
    for batch, other in zip(first.test_dataloader(), second.test_dataloader(), strict=True):
        torch.testing.assert_close(batch["image"], other["image"])
        assert batch["id"] == other["id"]
    for data in (first, second):
        data.teardown("test")
    assert not generated_directories()


def test_generated_data_go_with_the_module(generated_directories):
    data = module("custom", synthetic=True)
    assert len(generated_directories()) == 1
    del data
    assert not generated_directories()


def test_copy_in_another_process_leaves_the_generated_data_alone(generated_directories):
    data = module("custom", synthetic=True)
    copy = pickle.loads(pickle.dumps(data))
    copy.setup("test")
    copy.teardown("test")
    data.setup("test")
    assert len(list(data.test_dataloader())) == 4


# Lightning


def test_trainer_fits_and_tests_generated_data_one_after_the_other():
    data, model = module("cars", synthetic=True), ImageRecorder()
    trainer().fit(model, datamodule=data)
    assert len(set(model.seen)) == 29
    model.seen.clear()
    trainer().test(model, datamodule=data, verbose=False)
    assert model.seen == [f"test/{row}" for row in range(16)]
    assert data.num_classes == 4


def test_lightning_can_give_each_process_its_part(directory):
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
    from lightning.pytorch.utilities.data import _update_dataloader

    data = module(directory=str(directory))
    data.setup("fit")

    def epoch(number):
        ids = []
        for rank in range(2):
            loader = data.train_dataloader()
            sampler = DistributedSamplerWrapper(loader.sampler, num_replicas=2, rank=rank, shuffle=True, seed=0)
            part = _update_dataloader(loader, sampler)  # as Lightning does for any sampler that is not torch's own
            sampler.set_epoch(number)
            ids += [name for batch in part for name in batch["id"]]
        assert len(ids) == len(set(ids)) == 18
        return ids

    assert epoch(0) == epoch(0) != epoch(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_order_of_an_epoch_is_the_same_whether_or_not_earlier_ones_were_seen(directory, workers):
    """A resumed run starts its loader, and its workers, at a later epoch."""

    def order(*epochs):
        torch.manual_seed(3)
        data = module(directory=str(directory), num_workers=workers)
        data.setup("fit")
        loader = data.train_dataloader()
        for epoch in epochs:
            loader.sampler.set_epoch(epoch)
            ids = [name for batch in loader for name in batch["id"]]
        return ids

    assert order(0, 1, 2) == order(2) == order(1, 2) != order(1)


@pytest.mark.parametrize(("size", "processes"), [(9, 2), (9, 1), (7, 3)])
def test_every_example_is_evaluated_once_on_however_many_processes(size, processes):
    seen = []
    for rank in range(processes):
        trainer = SimpleNamespace(world_size=processes, global_rank=rank, strategy=DDPStrategy())
        sampler = evaluation_sampler(range(size), trainer)
        assert (sampler is None) == (processes == 1)
        seen += range(size) if sampler is None else sampler
    assert sorted(seen) == list(range(size))


def test_sharded_processes_get_equally_many_examples():
    trainers = [SimpleNamespace(world_size=2, global_rank=rank, strategy=ModelParallelStrategy()) for rank in range(2)]
    shares = [list(evaluation_sampler(range(9), trainer)) for trainer in trainers]
    assert shares == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 0]]


def test_module_can_be_sent_to_another_process(directory):
    data = pickle.loads(pickle.dumps(module(directory=str(directory))))
    data.setup("test")
    assert len(list(data.test_dataloader())) == 2


# Real images, where there are any


@pytest.mark.skipif(not REAL_CARS.is_dir(), reason="no real images here")
def test_real_cars_are_read_from_class_folders():
    data = ImageDataModule("cars", directory=str(REAL_CARS), num_workers=0, batch_size=2)
    assert data.num_classes == 196
    data.setup("fit")
    data.setup("test")
    assert (len(data.train_dataloader().dataset), len(data.val_dataloader().dataset)) == (882, 98)
    assert len(data.test_dataloader().dataset) == 195
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 224, 224)
    assert Image.open(REAL_CARS / batch["id"][0]).size[0] > 0
