"""CausalLanguageModel: loss, generation, likelihood, grading."""

import copy
import json
import logging
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from support.language_models import (
    ADAPTER,
    TOKENIZER,
    SumsData,
    TinyLanguageModel,
    adapted_llama,
    collate,
    example,
    language_trainer,
    move_experts,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from fourier_moe import balance_loss, inject, recording
from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup
from lightning_modules.tasks import GenerationSettings, Task, causal_language_model
from lightning_modules.tasks.backbones import hugging_face as hugging_face_models
from lightning_modules.tasks.generation import generate
from lightning_modules.tasks.losses import label_losses, log_likelihoods

PAIRS = [(1, 2), (300, 4), (56, 7890), (9, 9)]
GREEDY, BEAMS = GenerationSettings(12), GenerationSettings(12, num_beams=3)


@pytest.fixture(scope="module")
def model():
    return adapted_llama()


@pytest.fixture
def batch():
    return collate([example(*pair, choices=True) for pair in PAIRS])


def answers(model, batch, settings=GREEDY):
    return generate(model, TOKENIZER, batch["prompt_ids"], batch["prompt_mask"], settings)


def task_with(model, **options):
    task = TinyLanguageModel(**options)
    task.build()
    task.model = model
    return task


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("settings", [GREEDY, BEAMS])
def test_batch_of_different_lengths_generates_what_each_prompt_does_alone(model, batch, settings):
    alone = [answers(model, collate([example(*pair)]), settings)[0] for pair in PAIRS]
    assert answers(model, batch, settings) == alone
    assert len(set(alone)) > 1
    assert all(alone)


def test_greedy_with_cache_is_the_most_probable_token_again_and_again_without(model, batch):
    for pair, answer in zip(PAIRS, answers(model, batch), strict=True):
        ids = collate([example(*pair)])["prompt_ids"]
        length = ids.shape[1]
        for _ in range(GREEDY.max_new_tokens):
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            if token == TOKENIZER.eos_token_id:
                break
            ids = torch.cat([ids, token[None, None]], 1)
        assert answer == TOKENIZER.decode(ids[0, length:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("settings", [GREEDY, BEAMS])
def test_more_padding_on_the_left_changes_nothing(model, batch, settings):
    padded = collate([example(*pair) for pair in PAIRS], extra=7)
    assert padded["prompt_ids"].shape[1] == batch["prompt_ids"].shape[1] + 7
    padded["prompt_ids"][padded["prompt_mask"] == 0] = 77  # whatever token it is: LLaMA's is its end of text
    assert answers(model, padded, settings) == answers(model, batch, settings)


def test_beams_write_more_probable_texts(model, batch):
    totals = {}
    for settings in (GenerationSettings(2), GenerationSettings(2, num_beams=8)):
        tokens = [
            json.loads(text) for text in generate(model, Recording(), batch["prompt_ids"], batch["prompt_mask"], settings)
        ]
        ids = torch.cat([batch["prompt_ids"], torch.tensor(tokens)], 1)
        mask = torch.cat([batch["prompt_mask"], torch.ones(len(PAIRS), 2, dtype=torch.int64)], 1)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 2, -100)
        totals[settings.num_beams] = label_losses(model, ids, mask, labels).loss.sum()
    assert totals[8] < totals[1]


def test_answers_end_where_the_context_of_the_model_does(batch):
    lengths = batch["prompt_mask"].sum(1)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 384, "bos_token_id": None, "eos_token_id": 384}
    model = GPT2LMHeadModel(GPT2Config(n_positions=int(lengths.max()) + 3, **sizes)).eval()
    with pytest.warns(UserWarning, match=r"answers end where the model's context of \d+ tokens does, before max_new_tokens=12"):
        tokens = generate(model, Recording(), batch["prompt_ids"], batch["prompt_mask"], GREEDY)
    assert {len(json.loads(text)) for text in tokens} == {3}
    model.config.n_positions -= 3
    with pytest.raises(ValueError, match=r"a prompt has (\d+) tokens, and the model reads \1; shorten it"):
        answers(model, batch)
    loader = SimpleNamespace(dataset=SimpleNamespace(longest_prompt=int(lengths.max())))
    with pytest.raises(ValueError, match="the longest prompt of an evaluation set has"):
        task_with(model).check([loader])


def test_sampling_settings_of_the_model_neither_leak_nor_warn(model, batch, caplog):
    expected = answers(model, batch)
    chatty = copy.deepcopy(model)
    own = chatty.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k, own.repetition_penalty = True, 0.6, 0.9, 5, 9.0
    own.max_length, own.pad_token_id, own.min_new_tokens = 4096, None, 12
    logging.getLogger("transformers").propagate = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert answers(chatty, batch) == expected
            assert answers(chatty, batch, BEAMS) == answers(model, batch, BEAMS)
    finally:
        logging.getLogger("transformers").propagate = False
    assert caplog.records == []
    assert chatty.generation_config is own
    assert own.temperature == 0.6


def test_every_end_token_of_model_and_tokenizer_ends_an_answer(model):
    batch = collate([example(*PAIRS[1])])
    prompt = batch["prompt_ids"]
    first = int(model(input_ids=prompt).logits[0, -1].argmax())
    second = int(model(input_ids=torch.cat([prompt, prompt.new_tensor([[first]])], 1)).logits[0, -1].argmax())
    for ends in (second, [300, second]):
        other = copy.deepcopy(model)
        other.generation_config.eos_token_id = ends
        tokens = generate(other, Recording(), prompt, batch["prompt_mask"], GREEDY)
        assert tokens == [str([first, second])]
    stopped_by_tokenizer = generate(model, Recording(eos_token_id=second), prompt, batch["prompt_mask"], GREEDY)
    assert stopped_by_tokenizer == [str([first, second])]


class Recording:
    """A tokenizer whose text is the list of tokens."""

    pad_token_id = 0

    def __init__(self, eos_token_id=None):
        self.eos_token_id = eos_token_id

    def batch_decode(self, tokens, **_):
        return [str(row.tolist()) for row in tokens]


def test_model_is_left_as_it_was_also_after_an_error(model, batch, monkeypatch):
    trained = copy.deepcopy(model).train()
    trained.gradient_checkpointing_enable()
    trained.model.norm.eval()
    modes = {name: module.training for name, module in trained.named_modules()}
    own = trained.generation_config
    assert answers(trained, batch) == answers(model, batch)
    monkeypatch.setattr(trained, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(trained, batch)
    assert {name: module.training for name, module in trained.named_modules()} == modes
    assert trained.generation_config is own
    assert trained.is_gradient_checkpointing


def test_generation_under_autocast(model, batch):
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert len(answers(model, batch)) == len(PAIRS)


@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams"])
def test_setting_that_is_no_number_of_one_or_more_is_an_error(name):
    for value, valid in ((0, "1 or more"), (2.5, "a whole number")):
        with pytest.raises(ValueError, match=f"{name}={value} must be {valid}"):
            GenerationSettings(**{name: value})


# ---------------------------------------------------------------- loss


def test_loss_is_that_of_transformers(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(task_with(model).loss(batch), model(**inputs).loss)
    losses = label_losses(model, **inputs)
    for row in range(len(PAIRS)):
        alone = model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}).loss
        torch.testing.assert_close(losses.loss[row] / losses.num_labels[row], alone)


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_chunked_loss_has_the_same_values_and_gradients(model, batch, chunk_size):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    inputs["labels"][2] = -100
    trained, found = [p for p in model.parameters() if p.requires_grad], []
    for size in (None, chunk_size):
        losses = label_losses(model, **inputs, chunk_size=size)
        gradients = torch.autograd.grad(losses.loss.sum(), trained)
        found.append((losses, torch.cat([gradient.flatten() for gradient in gradients])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    assert (found[1][1] - found[0][1]).norm() < 1e-6 * found[0][1].norm()


def test_chunked_loss_keeps_the_logits_of_one_chunk_and_refuses_what_it_cannot_split(model, batch):
    inputs, seen = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}, []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    label_losses(model, **inputs, chunk_size=5)
    assert max(seen) == 5
    handle.remove()
    capped = copy.deepcopy(model)
    capped.forward = lambda **inputs: SimpleNamespace(logits=model_output(capped, inputs).tanh())
    with pytest.raises(ValueError, match="LlamaForCausalLM changes them afterwards"):
        label_losses(capped, **inputs, chunk_size=5)
    with pytest.raises(ValueError, match="loss_chunk_size=0 must be 1 or more, or null"):
        TinyLanguageModel(loss_chunk_size=0)


def model_output(model, inputs):
    return type(model).forward(model, **inputs).logits


def test_correct_counts_labels_that_are_the_most_probable_token(model, batch):
    predicted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    batch["labels"][1, -3:] = predicted[1, -4:-1]
    losses = label_losses(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert losses.num_correct.tolist() == [
        sum(int(batch["labels"][r, t]) == int(predicted[r, t - 1]) for t in range(1, predicted.shape[1]))
        for r in range(len(PAIRS))
    ]
    assert losses.num_correct[1] >= 3


def test_logits_exist_only_where_labels_do(model, batch):
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    task_with(model).loss(batch)
    handle.remove()
    assert seen == [(1, int((batch["labels"] != -100).sum()), 384)]


def test_examples_without_labels_count_nothing(model, batch):
    batch["labels"][2] = -100
    losses = label_losses(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert (losses.loss[2], losses.num_labels[2]) == (0, 0)
    assert (losses.loss[[0, 1, 3]] > 0).all()
    batch["labels"][:] = -100
    assert task_with(model).loss(batch) == 0


def test_padding_on_the_left_or_with_another_token_changes_neither_loss_nor_load(model):
    """LLaMA's positions are relative; those of GPT-2 are tested with SequenceClassification, which reads the same inputs."""
    task = TinyLanguageModel()
    task.model = model
    right = collate([example(1, 2), example(700, 81)])
    lengths = right["attention_mask"].sum(1).tolist()
    left = {**right, "input_ids": right["input_ids"].masked_fill(right["attention_mask"] == 0, 7)}
    for name in ("input_ids", "attention_mask", "labels"):
        rows = zip(left[name], lengths, strict=True)
        left[name] = torch.stack([row.roll(len(row) - length) for row, length in rows])
    first = int(left["attention_mask"][0].argmax())
    left["labels"][0, first] = left["input_ids"][0, first]  # nothing predicts an example's first token, padding neither
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    results = []
    for batch in (right, left):
        with torch.no_grad(), recording(model, task.token_mask(batch)):
            results.append((task.loss(batch), balance_loss(model)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def test_more_padding_on_the_right_changes_neither_loss_nor_load_nor_gradients(model):
    outcomes = []
    for extra in (0, 9):
        padded = collate([example(*pair) for pair in PAIRS], extra=extra)
        task = task_with(copy.deepcopy(model))
        with recording(task.model, task.token_mask(padded)):
            loss, balance = task.loss(padded), balance_loss(task.model)
        (loss + balance).backward()
        gradients = {name: p.grad for name, p in task.model.named_parameters() if p.requires_grad}
        outcomes.append((loss.detach(), balance.detach(), gradients))
    torch.testing.assert_close(outcomes[0], outcomes[1])
    assert all(gradient.abs().sum() > 0 for gradient in outcomes[0][2].values())


def test_adapted_output_layer_sees_every_token(batch):
    model = TinyLanguageModel().build()
    inject(model, type(ADAPTER)(targets=["lm_head"], num_coefficients=32, num_experts=4, seed=0))
    move_experts(model)
    task = task_with(model)
    with recording(model, task.token_mask(batch)):
        loss = task.loss(batch)
        balance_loss(model)  # raises if mask and tokens differ
    labels = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(loss, model(**labels).loss)


# ---------------------------------------------------------------- likelihood


def manual_log_likelihood(model, prompt, response):
    prompt = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    response = TOKENIZER(response, add_special_tokens=False)["input_ids"]
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    log_probabilities = F.log_softmax(logits, -1)
    return sum(log_probabilities[len(prompt) + i - 1, token] for i, token in enumerate(response))


def test_likelihood_is_the_sum_of_the_log_probabilities_of_the_responses_tokens(model, batch):
    responses = [("it is 3", "no idea at all"), ("it is 304",), ("a", "b", "c"), ("it is 18", "it is 19")]
    scores = log_likelihoods(model, TOKENIZER, batch["prompt"], batch["prompt_ids"], batch["prompt_mask"], responses)
    assert [len(score) for score in scores] == [2, 1, 3, 2]
    for prompt, texts, score in zip(batch["prompt"], responses, scores, strict=True):
        manual = torch.stack([manual_log_likelihood(model, prompt, text) for text in texts])
        torch.testing.assert_close(score, manual)


class Merging:
    """Bytes, but a line break and the letter after it are one token."""

    pad_token_id, bos_token_id = 0, 2

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        rows = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
        break_ = ord("\n") + 3
        for row in rows:
            at = row.index(break_)
            row[at : at + 2] = [260 + row[at + 1] % 100] if at + 1 < len(row) else [break_]
        return {"input_ids": rows}


def test_likelihood_of_a_text_whose_tokens_reach_across_the_border(model, batch):
    row = collate([example(1, 2)])
    tokenizer = Merging()
    begin = torch.tensor([[2]])
    prompt_ids, mask = torch.cat([begin, row["prompt_ids"]], 1), torch.ones(1, row["prompt_ids"].shape[1] + 1)
    texts = ("it is 3", "no")
    (score,) = log_likelihoods(model, tokenizer, row["prompt"], prompt_ids, mask, [texts])
    given = prompt_ids.shape[1] - 1  # without the line break
    for text, value in zip(texts, score, strict=True):
        ids = [2, *tokenizer([row["prompt"][0] + text], add_special_tokens=False)["input_ids"][0]]
        log_probabilities = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        torch.testing.assert_close(value, sum(log_probabilities[t - 1, ids[t]] for t in range(given, len(ids))))


def test_likelihood_answers_with_the_most_probable_choice(model, batch):
    rows = task_with(model, scoring="likelihood").predict(batch)
    for row, responses in zip(rows, batch["responses"], strict=True):
        assert row["output"] == max(responses, key=lambda text: manual_log_likelihood(model, row["prompt"], text))
        assert row["correct"] == (row["output"] == responses[0])


def test_likelihood_without_choices_is_an_error(model):
    task = task_with(model, scoring="likelihood")
    with pytest.raises(ValueError, match="sums has none; use scoring='generate'"):
        task.evaluate(collate([example(1, 2)]))


# ---------------------------------------------------------------- evaluation


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


# ---------------------------------------------------------------- as a task


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
