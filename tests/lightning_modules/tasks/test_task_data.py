"""What a DataModule tells: all of it, nothing, or a refusal."""

from types import SimpleNamespace

import lightning as L
import pytest

from datamodules import CommonsenseDataModule, GlueDataModule, GlueMixtureDataModule, ImageDataModule
from datamodules.glue import MixtureTask
from lightning_modules.tasks.base import run_data, task_data


class Plain(L.LightningDataModule):
    pass


class Partial(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.class_names = ["a", "b"]


def test_every_datamodule_tells_all_of_it():
    image, glue = ImageDataModule("digits"), GlueDataModule("cola", "bytes")
    assert [task_data(data).dataset_name for data in (image, glue)] == ["digits", "cola"]
    assert task_data(CommonsenseDataModule(tokenizer="bytes")).class_names == []
    mixture = task_data(GlueMixtureDataModule({"cola": MixtureTask(), "rte": MixtureTask()}, "bytes"))
    assert (mixture.dataset_name, mixture.num_classes) == ("cola, rte", 4)


@pytest.mark.parametrize(
    ("trainer", "name"), [(None, None), (SimpleNamespace(), None), (SimpleNamespace(datamodule=Plain()), "Plain")]
)
def test_nothing_is_known_of_loaders_and_of_a_plain_datamodule(trainer, name):
    data = run_data(trainer)
    assert (data.dataset_name, list(data.class_names), data.evaluation_notes, data.num_train_examples) == (name, [], {}, None)


def test_datamodule_that_tells_a_part_is_refused():
    with pytest.raises(ValueError, match=r"Partial has class_names but not dataset_name, num_classes, .*BaseDataModule"):
        task_data(Partial())
