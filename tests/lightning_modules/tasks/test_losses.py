"""Losses of labels, whole and in chunks, and likelihoods of responses."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support.language_models import (
    ADAPTER,
    PAIRS,
    TOKENIZER,
    TinyLanguageModel,
    adapted_llama,
    collate,
    example,
    move_experts,
    task_with,
)
from torch.nn import functional as F

from fourier_moe import balance_loss, inject, recording
from lightning_modules.tasks.losses import label_losses, log_likelihoods


@pytest.fixture(scope="module")
def model():
    return adapted_llama()


@pytest.fixture
def batch():
    return collate([example(*pair, choices=True) for pair in PAIRS])


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
