"""CausalLanguageModel: evaluation, grading, training; test_generation.py and test_losses.py have its parts."""

import copy
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser
from support.language_models import (
    ADAPTER,
    PAIRS,
    TOKENIZER,
    SumsData,
    TinyLanguageModel,
    adapted_llama,
    collate,
    example,
    language_trainer,
    task_with,
)
from torch.utils.data import DataLoader

from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup
from lightning_modules.tasks import Task, causal_language_model
from lightning_modules.tasks.backbones import hugging_face as hugging_face_models
from lightning_modules.tasks.generation import generate
from lightning_modules.tasks.losses import label_losses


@pytest.fixture(scope="module")
def model():
    return adapted_llama()


@pytest.fixture
def batch():
    return collate([example(*pair, choices=True) for pair in PAIRS])


def scores(task, *batches):
    metrics = task.new_metrics()
    for batch in batches:
        metrics.update(**task.evaluate(batch).metric_inputs)
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize(
    ("write", "accuracy", "strict"),
    [("it is {}".format, 1, 1), ("{} or so".format, 1, 0), ("it is {}0".format, 0, 0), ("{} it is 1".format, 0, 0)],
)
def test_right_answers_score_all_and_wrong_ones_nothing(model, batch, monkeypatch, write, accuracy, strict):
    monkeypatch.setattr(causal_language_model, "generate", lambda *_, **__: list(map(write, batch["answer"])))
    assert scores(task_with(model), batch) == {"accuracy": accuracy, "strict_accuracy": strict}


def test_strict_accuracy_differs_though_the_first_batch_agrees(model, batch, monkeypatch):
    outputs = iter([["it is 3", "it is 304", "", ""], ["3", "304", "", ""]])
    monkeypatch.setattr(causal_language_model, "generate", lambda *_, **__: next(outputs))
    assert scores(task_with(model), batch, batch) == {"accuracy": 0.5, "strict_accuracy": 0.25}


def test_rows_say_what_was_asked_written_and_found(model, batch, monkeypatch):
    monkeypatch.setattr(causal_language_model, "generate", lambda *_, **__: ["so 1 is 4, or 3", *"xyz"])
    evaluation = task_with(model).evaluate(batch)
    loss = evaluation.rows[0]["loss"]
    assert evaluation.rows[0] == {
        "id": "1+2",
        "benchmark": "sums",
        "prompt": "What is 1 + 2?\n",
        "output": "so 1 is 4, or 3",
        "extracted": "3",
        "answer": "3",
        "correct": True,
        "strict_extracted": "4",
        "strict_correct": False,
        "loss": loss,
    }
    inputs = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(torch.tensor(loss), model(**inputs).loss)
    torch.testing.assert_close(evaluation.loss[0].item(), loss)
    assert evaluation.rows[1]["extracted"] is None


def test_no_known_response_means_no_loss(model):
    evaluation = task_with(model).evaluate(collate([example(1, 2), example(3, 4)], known=False))
    assert evaluation.loss is None
    assert [row["loss"] for row in evaluation.rows] == [None, None]


def test_validation_scores_known_responses_and_writes_nothing(model, batch, monkeypatch):
    monkeypatch.setattr(causal_language_model, "generate", lambda *_, **__: pytest.fail("generated"))
    task = task_with(model)
    task.split = "val"
    evaluation = task.evaluate(batch)
    assert evaluation.rows == []
    assert list(scores(task, batch)) == ["token_accuracy"]
    losses = label_losses(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    torch.testing.assert_close(evaluation.loss, losses.loss / losses.num_labels)
    torch.testing.assert_close(evaluation.metric_inputs["token_accuracy"], losses.num_correct / losses.num_labels)


def test_validation_grades_answers_where_asked_to(model, batch):
    task = task_with(model, generate_in_validation=True)
    task.split = "val"
    assert list(scores(task, batch)) == ["accuracy", "strict_accuracy"]


def test_finished_examples_are_not_answered_again(model, batch, monkeypatch):
    task = task_with(model)
    rows = task.predict(batch)
    asked = []
    monkeypatch.setattr(causal_language_model, "generate", lambda *a, **o: asked.append(len(a[2])) or generate(*a, **o))
    task.finished = {row["id"]: row for row in rows[1:3]}
    again = task.predict(batch)
    assert asked == [2]
    assert again[1] == rows[1]
    for row, other in zip(rows, again, strict=True):
        assert row == other | {"loss": pytest.approx(row["loss"])}
    task.finished = {row["id"]: row for row in rows}
    evaluation = task.evaluate(batch)
    assert asked == [2]
    assert evaluation.rows == rows
    torch.testing.assert_close(evaluation.loss, torch.tensor([row["loss"] for row in rows]))


@pytest.mark.parametrize(("missing_elsewhere", "answered"), [(0, []), (1, [4])])
def test_processes_that_share_a_model_answer_a_batch_together_or_not_at_all(
    model, batch, monkeypatch, missing_elsewhere, answered
):
    task = task_with(model)
    task.finished = {row["id"]: row for row in task.predict(batch)}
    asked = []
    monkeypatch.setattr(causal_language_model, "generate", lambda *a, **o: asked.append(len(a[2])) or generate(*a, **o))
    monkeypatch.setattr(causal_language_model, "is_sharded", lambda _: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(missing_elsewhere))
    assert [row["id"] for row in task.predict(batch)] == batch["id"]
    assert asked == answered


def test_training_lowers_the_loss(tmp_path):
    rates = Optimization(experts=ParameterGroup(0.05), schedule="constant", warmup_ratio=0.0)
    module = AdaptationModule(TinyLanguageModel(), ADAPTER, rates)
    trainer = language_trainer(tmp_path, max_epochs=6, limit_val_batches=0)
    data = SumsData()
    batch = collate([example(1, 2), example(3, 4), example(5, 60)])
    before = task_with(adapted_llama()).loss(batch)
    trainer.fit(module, data)
    assert module.task.loss(batch) < 0.8 * before


def test_config_names_what_it_evaluates_with():
    parser = ArgumentParser()
    parser.add_subclass_arguments(Task, "task")
    words = ["--task", "lightning_modules.tasks.CausalLanguageModel", "--task.model", "org/llama", "--task.tiny", "true"]
    config = parser.parse_args([*words, "--task.evaluation.max_new_tokens", "64", "--task.scoring", "likelihood"])
    task = parser.instantiate_classes(config).task
    assert task.settings() == {
        "model_name": "org/llama",
        "dtype": "float32",
        "quantization": None,
        "tiny": True,
        "tokenizer_name": "bytes",
        "scoring": "likelihood",
        "evaluation": {"max_new_tokens": 64, "num_beams": 1},
    }
    assert task.works_untrained


def test_validation_of_a_set_without_known_responses_is_an_error_before_training(tmp_path):
    class Unknown(SumsData):
        def val_dataloader(self):
            examples = [example(1, 2), example(3, 4)]
            return DataLoader(examples, batch_size=2, collate_fn=partial(collate, known=False))

    rates = Optimization(experts=ParameterGroup(0.05))
    options = {"max_epochs": 1, "limit_train_batches": 1}
    with pytest.raises(
        ValueError, match=r"validation needs known responses, and sums has none.*generate_in_validation to true"
    ):
        language_trainer(tmp_path, **options).fit(AdaptationModule(TinyLanguageModel(), ADAPTER, rates), Unknown())
    module = AdaptationModule(TinyLanguageModel(generate_in_validation=True), ADAPTER, rates)
    trainer = language_trainer(tmp_path, **options)
    trainer.fit(module, Unknown())
    assert {"val/accuracy", "val/strict_accuracy"} <= set(trainer.callback_metrics)
    trainer.predict(module, SumsData(), return_predictions=False)  # after validation, too, predictions are answers


def test_tokenizer_with_tokens_that_the_model_does_not_know_is_an_error(monkeypatch):
    task = causal_language_model.CausalLanguageModel("meta-llama/Llama-2-7b-hf", tiny=True)
    larger = copy.deepcopy(TOKENIZER)
    larger.add_tokens(["<extra>"])
    monkeypatch.setattr(hugging_face_models, "load_tokenizer", lambda _: larger)
    with pytest.raises(ValueError, match="tokenizer='bytes' has 385 tokens, model='meta-llama/Llama-2-7b-hf' has 384"):
        task.build()


def test_tiny_model_reads_bytes_and_writes():
    task = causal_language_model.CausalLanguageModel("meta-llama/Llama-2-7b-hf", tiny=True)
    task.build()
    assert len(task.predict(collate([example(1, 2)]))) == 1


def test_unknown_scoring_is_an_error():
    with pytest.raises(ValueError, match="scoring='logits' must be 'generate' or 'likelihood'"):
        TinyLanguageModel(scoring="logits")
