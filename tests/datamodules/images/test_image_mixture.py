"""Several image data sets at once: classes, weights, augmentation, and one head per task in the model."""

from collections import Counter

import pytest
import torch

from datamodules import ImageDataModule, ImageMixtureDataModule
from datamodules.images import MixtureTask
from fourier_moe.errors import UserError

TASKS = {"eurosat": MixtureTask(), "own": MixtureTask("cars", weight=2.5)}


def mixture(stage="fit", **arguments):
    options = {"tasks": TASKS, "batch_size": 8, "num_workers": 0, "image_size": 16, "synthetic": True, **arguments}
    data = ImageMixtureDataModule(**options)
    data.setup(stage)
    return data


def test_classes_of_all_data_sets_are_numbered_one_after_the_other():
    data = mixture()
    assert data.num_classes == len(data.class_names) == 8
    assert [name.partition("/")[0] for name in data.class_names] == ["eurosat"] * 4 + ["own"] * 4
    seen = set()
    for batch in data.train_dataloader():
        assert batch["image"].shape[1:] == (3, 16, 16)
        for task, (first, end), label, id_ in zip(
            batch["task"], batch["classes"].tolist(), batch["label"], batch["id"], strict=True
        ):
            assert (first, end) == {"eurosat": (0, 4), "own": (4, 8)}[task]
            assert first <= label < end
            assert id_.startswith(f"{task}/")
            seen.add(int(label))
    assert seen == set(range(8))


def test_weights_decide_how_often_an_image_comes():
    data = mixture()
    counts = Counter(task for batch in data.train_dataloader() for task in batch["task"])
    sizes = {name: len(one) for name, one in data.sets("train").items()}
    assert counts == {"eurosat": sizes["eurosat"], "own": int(2.5 * sizes["own"])}
    assert data.num_train_examples == sum(counts.values())


def test_every_data_set_is_evaluated_by_itself_on_the_images_of_that_set_alone():
    loaders = mixture("test").test_dataloader()
    assert list(loaders) == ["eurosat", "own"]
    alone = ImageDataModule("cars", batch_size=8, num_workers=0, image_size=16, synthetic=True)
    alone.setup("test")
    together, expected = next(iter(loaders["own"])), next(iter(alone.test_dataloader()))
    assert torch.equal(together["image"], expected["image"])
    assert torch.equal(together["label"] - 4, expected["label"])


def test_augmentation_is_fixed_by_the_seed_of_the_example():
    tasks = {"first": MixtureTask("eurosat"), "second": MixtureTask("svhn")}  # square images, which are really cropped
    dataset = mixture(tasks=tasks).train_dataloader().dataset
    for place in (0, len(dataset) - 1):
        drawn = [dataset[place, seed]["image"] for seed in range(8)]
        assert torch.equal(drawn[0], dataset[place, 0]["image"])
        assert any(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert [dataset[i]["id"] for i in range(len(dataset))] == [dataset[i, 0]["id"] for i in range(len(dataset))]


def test_a_directory_has_a_folder_for_every_task_that_names_none(make_folders, tmp_path):
    images = make_folders({"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    (tmp_path / "all").mkdir()
    images.rename(tmp_path / "all" / "first")
    elsewhere = make_folders({"train": {"c": 3, "d": 3}, "test": {"c": 2, "d": 2}})
    tasks = {"first": MixtureTask("custom"), "second": MixtureTask("custom", str(elsewhere))}
    data = mixture("test", tasks=tasks, directory=str(tmp_path / "all"), synthetic=False)
    assert data.class_names == ["first/a", "first/b", "second/c", "second/d"]
    assert {name: len(loader.dataset) for name, loader in data.test_dataloader().items()} == {"first": 2, "second": 4}


def test_a_batch_on_the_device_is_normalized_as_that_of_one_data_set():
    data = mixture(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    batch = next(iter(data.train_dataloader()))
    alone = ImageDataModule("cars", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), synthetic=True)
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["image"], alone.normalize(batch["image"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": {"cars": MixtureTask(weight=0)}}, "weight of task 'cars' must be positive"),
        ({"tasks": {"carz": MixtureTask()}}, "carz"),
        ({"tasks": {"cars": MixtureTask(directory="nowhere")}, "synthetic": False}, "nowhere"),
        ({"directory": "d", "synthetic": False, "revision": "main"}, "revision 'main'"),
        ({"tasks": {"cars": MixtureTask(directory="d")}, "synthetic": False, "revision": "main"}, "revision must be null"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        mixture(**arguments)
