"""Answers of a language model: greedy and with beams, their ends, sampling settings, the context."""

import copy
import json
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from support.language_models import (
    GREEDY,
    PAIRS,
    TOKENIZER,
    adapted_llama,
    answers,
    collate,
    example,
    task_with,
)
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_modules.tasks import GenerationSettings
from lightning_modules.tasks.generation import generate
from lightning_modules.tasks.losses import label_losses

BEAMS = GenerationSettings(12, num_beams=3)


@pytest.fixture(scope="module")
def model():
    return adapted_llama()


@pytest.fixture
def batch():
    return collate([example(*pair, choices=True) for pair in PAIRS])


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
