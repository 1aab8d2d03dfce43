"""AdapterCheckpoint and PredictionsWriter."""

import csv
import errno
import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support.language_models import SumsData, TinyLanguageModel, language_module, language_trainer
from support.token_task import TokenData, token_batch, token_module, token_trainer
from torch.utils.data import DataLoader

from fourier_moe import describe_adapter
from lightning_modules.callbacks import AdapterCheckpoint, PredictionsWriter


class Score(L.Callback):
    """Logs val/score as told, one value an epoch."""

    def __init__(self, *values):
        self.values = values

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/score", self.values[trainer.current_epoch])


def fit(directory, *values, mode="max", ckpt_path=None, **options):
    callback = AdapterCheckpoint("val/score", mode)
    checkpoint = ModelCheckpoint(save_last=True, save_top_k=0)
    callbacks = (Score(*values), callback, checkpoint)
    trainer = token_trainer(directory, *callbacks, max_epochs=len(values), enable_checkpointing=True, **options)
    trainer.fit(token_module(), TokenData(["even, or nought", "odd"]), ckpt_path=ckpt_path)
    return callback


def score(directory, name="adapter"):
    return describe_adapter(directory / name).metrics["val/score"]


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", (0.25, 0.75, 0.5), 0.75),
        ("min", (0.5, 0.25, 0.75), 0.25),
        ("max", (float("nan"), 0.5, 0.25), 0.5),
        ("max", (0.5, 0.5), 0.5),
    ],
)
def test_adapter_is_the_best_by_monitor_and_mode_and_adapter_last_the_last(tmp_path, mode, values, best):
    assert fit(tmp_path, *values, mode=mode).best == best
    assert score(tmp_path) == best
    assert score(tmp_path, "adapter_last") == values[-1]


def test_adapter_file_has_the_class_names_of_the_data(tmp_path):
    fit(tmp_path, 0.5)
    assert describe_adapter(tmp_path / "adapter").class_names == ["even, or nought", "odd"]


def test_sanity_check_before_training_is_no_result(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        AdapterCheckpoint, "_save", lambda self, trainer, module, name: saved.append((name, trainer.global_step))
    )
    fit(tmp_path, 0.5, num_sanity_val_steps=1)
    assert saved == [("adapter", 3), ("adapter_last", 3)]


def test_validate_alone_writes_nothing(tmp_path):
    module = token_module()
    token_trainer(tmp_path).fit(module, TokenData())
    before = sorted(tmp_path.rglob("*"))
    token_trainer(tmp_path, AdapterCheckpoint("val/accuracy")).validate(module, TokenData(), verbose=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_validation_only_the_last_adapter_is_written(tmp_path):
    fit(tmp_path, 0.5, limit_val_batches=0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("adapter")) == ["adapter_last"]


@pytest.mark.parametrize("monitor", ["val/f1", "val_accuracy", "accuracy", "test/accuracy"])
@pytest.mark.parametrize("callback", [AdapterCheckpoint, lambda monitor: ModelCheckpoint(monitor=monitor), EarlyStopping])
def test_monitor_that_is_not_logged_is_refused_before_training(tmp_path, no_training, monitor, callback):
    trainer = token_trainer(tmp_path, callback(monitor), enable_checkpointing=True)
    with pytest.raises(ValueError, match=rf"monitor='{monitor}' is not logged; logged: .*val/accuracy.*val/loss"):
        trainer.fit(token_module(), TokenData())


def test_without_a_sanity_check_such_a_monitor_is_refused_after_the_first_validation(tmp_path):
    trainer = token_trainer(tmp_path, AdapterCheckpoint("val/f1"), num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"monitor='val/f1' is not logged; logged: .*val/accuracy.*val/loss"):
        trainer.fit(token_module(), TokenData())


def test_monitors_of_what_training_logs_are_taken(tmp_path):
    token_trainer(tmp_path, ModelCheckpoint(tmp_path, monitor="train/loss"), enable_checkpointing=True).fit(
        token_module(), TokenData()
    )


def test_closing_line_says_the_best_value_and_that_of_the_last_weights(tmp_path, caplog):
    fit(tmp_path, 0.25, 0.75, 0.5)
    assert f"best val/score 0.7500: {tmp_path / 'adapter'}; last val/score 0.5000: {tmp_path / 'adapter_last'}" in caplog.text
    caplog.clear()
    fit(tmp_path, 0.25, 0.75, check_val_every_n_epoch=1, max_steps=5)  # stopped two steps after the last validation
    assert f"best val/score 0.2500: {tmp_path / 'adapter'}; last, not validated: {tmp_path / 'adapter_last'}" in caplog.text


class Spoil(L.Callback):
    """Makes the trained parameters NaN after the last batch of an epoch, before its validation."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and trainer.is_last_batch:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    if parameter.requires_grad:
                        parameter.fill_(torch.nan)


def test_adapter_with_nan_is_refused_with_its_step_and_the_last_good_one_stays(tmp_path):
    trainer = token_trainer(tmp_path, Score(0.5, 0.75), Spoil(1), AdapterCheckpoint("val/score"), max_epochs=2)
    with pytest.raises(ValueError, match=r"the adapter of step 6 was not written: the adapter holds NaN or infinity in"):
        trainer.fit(token_module(), TokenData())
    assert score(tmp_path) == 0.5
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("adapter")] == ["adapter"]


def test_full_disk_ends_the_run_with_step_and_file_and_the_last_good_one_stays(tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:  # the three files of the first adapter
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    trainer = token_trainer(tmp_path, Score(0.5, 0.75), AdapterCheckpoint("val/score"), max_epochs=2)
    with pytest.raises(
        ValueError, match=r"the adapter of step 6 was not written: .*No space left on device; .*adapter.safetens"
    ):
        trainer.fit(token_module(), TokenData())
    assert score(tmp_path) == 0.5
    assert not list(tmp_path.rglob("*.part"))


def test_adapter_file_says_what_trained_it(tmp_path):
    fit(tmp_path, 0.5)
    task = describe_adapter(tmp_path / "adapter").task
    assert task == {"class": "TokenTask", "pipeline_tag": None, "main_metric": "accuracy", "data": "TokenData"}


def test_mode_that_is_neither_is_an_error():
    with pytest.raises(ValueError, match="mode='best' must be 'max' or 'min'"):
        AdapterCheckpoint(mode="best")


def test_resumed_run_keeps_the_best_adapter_of_before(tmp_path):
    fit(tmp_path, 0.75)
    checkpoint = tmp_path / "checkpoints/last.ckpt"
    assert fit(tmp_path, 0.75, 0.5, ckpt_path=checkpoint).best == 0.75
    assert score(tmp_path) == 0.75
    assert score(tmp_path, "adapter_last") == 0.5
    assert fit(tmp_path, 0.75, 0.5, 0.875, ckpt_path=checkpoint).best == 0.875
    assert score(tmp_path) == 0.875


def test_run_resumed_in_another_directory_writes_a_best_adapter_there(tmp_path):
    fit(tmp_path / "first", 0.75)
    second = fit(tmp_path / "second", 0.75, 0.5, ckpt_path=tmp_path / "first/checkpoints/last.ckpt")
    assert second.best == 0.5
    assert score(tmp_path / "second") == 0.5


# ---------------------------------------------------------------- predictions


def predict(directory, data, path=None):
    module = token_module()
    token_trainer(directory).fit(module, TokenData(data.class_names))
    trainer = token_trainer(directory, PredictionsWriter(path))
    trainer.predict(module, data)
    with open(path or directory / "predictions.csv", newline="", encoding="utf-8") as file:
        return module.eval(), list(csv.reader(file))


def test_predictions_have_names_and_probabilities_of_every_example(tmp_path):
    names = ["even, or nought", "ungerade ü"]
    module, (header, *rows) = predict(tmp_path, TokenData(names))
    assert header == ["id", "label", "prediction", "probability", *(f"p({name})" for name in names)]
    batch = token_batch(seed=4)
    with torch.no_grad():
        probabilities = module.task.logits(batch).softmax(-1)
    assert len(rows) == len(probabilities) == 8
    assert {row[2] for row in rows} == set(names)
    for index, (id_, label, prediction, probability, *columns) in enumerate(rows):
        expected = probabilities[index]
        assert id_ == f"row {index}"
        assert label == names[batch["label"][index]]
        assert prediction == names[int(expected.argmax())]
        assert float(probability) == pytest.approx(float(expected.max()), rel=1e-5)
        assert [float(column) for column in columns] == pytest.approx(expected.tolist(), rel=1e-4)


class Unlabeled(TokenData):
    def predict_dataloader(self):
        batches = [token_batch(seed=4), token_batch(seed=5)]
        return DataLoader(
            [{key: value for key, value in batch.items() if key != "label"} for batch in batches], batch_size=None
        )


def test_predictions_without_labels_or_names_go_to_the_given_file_with_class_numbers(tmp_path):
    path = tmp_path / "new/out.csv"
    _, (header, *rows) = predict(tmp_path, Unlabeled(), str(path))
    assert header == ["id", "label", "prediction", "probability", "p(0)", "p(1)"]
    assert len(rows) == 16
    assert {row[1] for row in rows} == {""}
    assert not (tmp_path / "predictions.csv").exists()


class TwoSets(TokenData):
    def predict_dataloader(self):
        return {"first": self._loader(4), "second": self._loader(5, 6)}


def test_predictions_of_several_sets_follow_each_other_in_one_file(tmp_path):
    _, (_, *rows) = predict(tmp_path, TwoSets())
    labels = [str(int(label)) for seed in (4, 5, 6) for label in token_batch(seed=seed)["label"]]
    assert [row[1] for row in rows] == labels


def test_predictions_writer_refuses_a_language_model_before_it_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyLanguageModel, "predict", lambda *_: pytest.fail("answered"))
    with pytest.raises(ValueError, match="a language model has none; use EvaluationReport"):
        language_trainer(tmp_path, PredictionsWriter()).predict(language_module(), SumsData())
