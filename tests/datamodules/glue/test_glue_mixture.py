from collections import Counter
from pathlib import Path

import pytest
import torch

from datamodules.glue import GlueDataModule, GlueMixtureDataModule, MixtureTask
from datamodules.glue.benchmarks import TASKS
from datamodules.glue.synthetic import write_tsv_files


def own_files(folder: Path, pairs: bool = False) -> Path:
    """A task of three classes; train has a column that nobody needs."""
    folder.mkdir()
    names = ["sentence1", "sentence2"] if pairs else ["sentence"]
    classes = ("sour", "bitter", "sweet")
    for file, count in (("train.tsv", 12), ("dev.tsv", 6)):
        rows = [[str(i), *(f"text {i} {name}" for name in names), classes[i % 3]] for i in range(count)]
        lines = ["\t".join(row) for row in [["number", *names, "label"], *rows]]
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def mixture(stage: str = "fit", **arguments) -> GlueMixtureDataModule:
    tasks = arguments.pop("tasks", {"cola": MixtureTask(), "mnli": MixtureTask(), "rte": MixtureTask()})
    data = GlueMixtureDataModule(tasks, "bytes", **{"batch_size": 8, "synthetic": True, **arguments})
    data.setup(stage)
    return data


def test_classes_of_all_tasks_are_numbered_one_after_the_other():
    data = mixture()
    assert data.class_names == [f"{name}/{c}" for name in ("cola", "mnli", "rte") for c in TASKS[name].class_names]
    assert data.num_classes == 7
    ranges = {"cola": [0, 2], "mnli": [2, 5], "rte": [5, 7]}
    seen = Counter()
    for batch in data.train_dataloader():
        for task, classes, label, name in zip(
            batch["task"], batch["classes"].tolist(), batch["label"], batch["id"], strict=True
        ):
            assert classes == ranges[task]
            assert classes[0] <= label < classes[1]
            assert name.startswith(f"{task}/train/")
            seen[task, int(label)] += 1
    assert len(seen) == 7


def test_batches_hold_examples_of_several_tasks():
    assert any(len(set(batch["task"])) > 1 for batch in mixture().train_dataloader())


def test_labels_are_those_of_the_task_alone():
    data = mixture("test")
    alone = GlueDataModule("rte", "bytes", batch_size=8, synthetic=True)
    alone.setup("test")
    together = next(iter(data.test_dataloader()["rte"]))
    expected = next(iter(alone.test_dataloader()))
    assert (together["label"] - 5).tolist() == expected["label"].tolist()
    assert together["id"] == [f"rte/{name}" for name in expected["id"]]
    assert torch.equal(together["input_ids"], expected["input_ids"])


def test_one_directory_holds_the_tasks_that_name_none(tmp_path):
    for name in ("cola", "rte"):
        (tmp_path / TASKS[name].folder).mkdir()
        write_tsv_files(tmp_path / TASKS[name].folder, TASKS[name])
    folder = own_files(tmp_path / "elsewhere")
    tasks = {"cola": MixtureTask(), "rte": MixtureTask(), "tastes": MixtureTask("custom", str(folder))}
    data = mixture("test", tasks=tasks, directory=str(tmp_path), synthetic=False)
    assert {name: len(loader.dataset) for name, loader in data.test_dataloader().items()} == {
        "cola": 16,
        "rte": 16,
        "tastes": 6,
    }


def test_every_task_is_evaluated_by_itself():
    loaders = mixture("test").test_dataloader()
    assert list(loaders) == ["cola", "mnli/matched", "mnli/mismatched", "rte"]
    assert all(len(set(batch["task"])) == 1 for loader in loaders.values() for batch in loader)


def test_weights_say_how_often_examples_come():
    tasks = {"cola": MixtureTask(weight=1.0), "rte": MixtureTask(weight=2.5)}
    data = mixture(tasks=tasks)
    counts = Counter(name for batch in data.train_dataloader() for name in batch["id"])
    of_rte = [count for name, count in counts.items() if name.startswith("rte/")]
    assert {count for name, count in counts.items() if name.startswith("cola/")} == {1}
    assert set(of_rte) == {2, 3}
    assert sum(of_rte) == pytest.approx(2.5 * len(of_rte), abs=1)


@pytest.mark.parametrize("pairs", [False, True])
def test_own_sentences_beside_glue_s(tmp_path, pairs):
    folder = own_files(tmp_path / "tastes", pairs)
    data = GlueMixtureDataModule({"tastes": MixtureTask("custom", str(folder))}, "bytes", batch_size=3)
    assert data.class_names == ["tastes/bitter", "tastes/sour", "tastes/sweet"]
    data.setup("test")
    batch = next(iter(data.test_dataloader()["tastes"]))
    assert batch["label"].tolist() == [1, 0, 2]
    assert batch["id"] == ["tastes/validation/0", "tastes/validation/1", "tastes/validation/2"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "tasks is empty"),
        ({"colla": MixtureTask()}, "did you mean cola"),
        ({"rte": MixtureTask(weight=0)}, "the weight of task 'rte'"),
        ({"mine": MixtureTask("custom")}, "needs directory"),
    ],
)
def test_mistakes_are_named(tasks, message):
    with pytest.raises(ValueError, match=message):
        GlueMixtureDataModule(tasks, "bytes")


def test_revision_that_no_task_would_read_is_refused(tmp_path):
    tasks = {"tastes": MixtureTask("custom", str(own_files(tmp_path / "tastes", False)))}
    with pytest.raises(ValueError, match="revision must be null where every task has a directory of its own, got v1"):
        GlueMixtureDataModule(tasks, "bytes", revision="v1")
    GlueMixtureDataModule({**tasks, "cola": MixtureTask()}, "bytes", revision="v1")
