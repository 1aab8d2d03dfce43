"""SequenceClassification: loading, head, scores and predictions of tiny Hugging Face models built from configs."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CTRLConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ModernBertDecoderConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
)

from datamodules.shared.tokenizers import load_tokenizer
from fourier_moe import FourierMoEConfig, balance_loss, inject, recording
from fourier_moe.errors import UserError
from fourier_moe.models.backbone import backbone_name
from lightning_modules.tasks import SequenceClassification
from lightning_modules.tasks.backbones.hugging_face import load_causal_language_model, load_sequence_classifier

BERT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ADAPTER = FourierMoEConfig(targets=["query", "value"], num_coefficients=32, num_experts=4, balance_weight=0.5)


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(1)
    BertModel(BertConfig(**BERT)).half().save_pretrained(tmp_path / "tiny_bert")
    return tmp_path / "tiny_bert"


def batch(lengths=(5, 3, 1), length=5, padding=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (len(lengths), length), generator=generator)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    ids, mask = (F.pad(tensor, (0, padding)) for tensor in (ids * mask, mask))
    return {
        "id": [f"row {row}" for row in range(len(lengths))],
        "input_ids": ids,
        "attention_mask": mask,
        "label": torch.tensor([0, 1, 1])[: len(lengths)],
    }


def byte_tokenizer():
    return load_tokenizer("bytes")


def built(model, num_classes=2, **options):
    task = SequenceClassification(str(model), **options)
    task.build(num_classes)
    return task


def test_directory_loads_in_float32_in_training_mode_with_the_classifier_as_head(bert):
    task = built(bert, 3)
    assert isinstance(task.model, BertForSequenceClassification)
    assert task.head_names == ("classifier",)
    assert task.model.training
    assert {parameter.dtype for parameter in task.model.parameters()} == {torch.float32}
    assert task(batch()).shape == (3, 3)


def test_pretrained_weights_are_those_of_the_directory(bert):
    stored = BertModel.from_pretrained(bert, dtype=torch.float32).state_dict()
    loaded = built(bert).model.bert.state_dict()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_adapter_files_remember_the_directory_s_name_and_no_path(bert):
    assert backbone_name(built(bert).model) == "tiny_bert"


def test_frozen_weights_may_be_bfloat16_and_the_head_stays_float32(bert):
    task = built(bert, dtype="bfloat16")
    assert {p.dtype for p in task.model.bert.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in task.model.classifier.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert task(batch()).dtype == torch.float32
    task.loss(batch()).backward()  # and without autocast, at trainer.precision 32-true
    assert task.model.classifier.weight.grad.abs().sum() > 0


def test_roberta_large_s_head_has_the_paper_s_parameters():
    from transformers import RobertaForSequenceClassification

    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(hidden_size=1024, num_hidden_layers=1, num_attention_heads=16))
    assert sum(parameter.numel() for parameter in model.classifier.parameters()) == 1_051_650


@pytest.mark.parametrize("name", ["roberta-large", "bert-base-cased", "meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-7B"])
def test_tiny_models_keep_the_architecture_and_are_the_same_one_every_time(name):
    torch.manual_seed(0)
    first = built(name, tiny=True).model
    torch.manual_seed(1)
    second = built(name, tiny=True).model
    assert type(first).__name__.lower().startswith(("roberta", "bert", "llama", "qwen2"))
    assert type(first).__name__[:4].lower() in name.lower()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert backbone_name(first) == f"{name.rpartition('/')[2]}/tiny"


def test_attention_is_the_one_asked_for():
    models = [
        load_causal_language_model("meta-llama/Llama-2-7b-hf", tiny=True, attn_implementation=kind)
        for kind in ("eager", "sdpa")
    ]
    assert [model.config._attn_implementation for model in models] == ["eager", "sdpa"]
    ids = torch.arange(6)[None]
    torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits)
    with pytest.raises(UserError, match=r"attn_implementation of model='roberta-large': .*fast.*"):
        built("roberta-large", tiny=True, attn_implementation="fast")
    with pytest.raises(UserError, match=r"attn_implementation of model='roberta-large': FlashAttention2"):
        built("roberta-large", tiny=True, attn_implementation="flash_attention_2")


def test_tiny_model_does_not_touch_the_run_s_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_sequence_classifier("roberta-large", 2, tiny=True)
    assert torch.equal(torch.rand(1), expected)


def test_decoder_without_padding_token_reads_its_last_real_token(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, pad_token_id=None
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "tiny_llama")
    task = SequenceClassification(str(tmp_path / "tiny_llama"), tiny=True)
    task.build(2)
    assert task.head_names == ("score",)
    task.model.eval()
    padded, plain = batch(padding=4), batch()
    torch.testing.assert_close(task(padded), task(plain))


DECODERS = {
    "llama": lambda pad: LlamaConfig(**DECODER, intermediate_size=48, pad_token_id=pad, eos_token_id=2),
    "gpt2": lambda pad: GPT2Config(**DECODER, pad_token_id=pad, eos_token_id=2),  # learned absolute positions
    "ctrl": lambda pad: CTRLConfig(**DECODER, dff=48, pad_token_id=pad),  # whose head is called otherwise
    "modernbert": lambda pad: ModernBertDecoderConfig(**DECODER, intermediate_size=48, pad_token_id=pad or 0, **IDS),  # two
    "xlnet": lambda pad: XLNetConfig(vocab_size=384, d_model=32, n_layer=2, n_head=2, d_inner=48, pad_token_id=pad),
}
DECODER = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], 2)
TEXTS = [[5, 6, 7, 8, 2], [9, 0], [3], [4, 1, 7, 7]]  # that end in a padding token of some model, or hold one


def texts(padding, side):
    """A batch of TEXTS, and each of them alone."""
    width = max(map(len, TEXTS)) + 1
    rows = [([padding] * (width - len(text)), text, [0] * (width - len(text)), [1] * len(text)) for text in TEXTS]
    left = side == "left"
    ids = torch.tensor([fill + text if left else text + fill for fill, text, _, _ in rows])
    mask = torch.tensor([none + real if left else real + none for _, _, none, real in rows])
    alone = [{"input_ids": torch.tensor([text]), "attention_mask": torch.ones(1, len(text))} for text in TEXTS]
    return {"input_ids": ids, "attention_mask": mask}, alone


@pytest.mark.parametrize(
    ("kind", "pad_of_model"),
    [
        *((kind, pad) for kind in ("llama", "gpt2") for pad in (None, -1, 0, 2, 7)),
        *(("ctrl", None), ("modernbert", 7), ("xlnet", 7)),
    ],
)
def test_classifier_reads_the_last_real_token_whatever_the_model_and_the_tokenizer_pad_with(tmp_path, kind, pad_of_model):
    torch.manual_seed(0)
    config = DECODERS[kind](None)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**stored, "pad_token_id": pad_of_model}), encoding="utf-8")
    byte_tokenizer().save_pretrained(tmp_path)
    task = built(tmp_path)
    task.model.eval()
    expected = []
    for text in TEXTS:  # by the definition
        value = task.model.base_model(input_ids=torch.tensor([text])).last_hidden_state[:, -1:]
        for name in task.head_names:
            value = task.model.get_submodule(name)(value)
        expected.append(value.view(1, 2))
    for padding in (0, 2, 7):
        for side in ("left", "right"):
            together, alone = texts(padding, side)
            torch.testing.assert_close(task(together), torch.cat(expected), rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.cat([task(text) for text in alone]), torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder_sees_its_own_padding_token_on_the_right_whatever_the_batch_has(tmp_path, side):
    """RoBERTa counts positions over ids that are not its padding token, and has no more than the longest text's."""
    torch.manual_seed(0)
    sizes = {**BERT, "max_position_embeddings": 5 + 2, "pad_token_id": 1}
    RobertaModel(RobertaConfig(**sizes)).save_pretrained(tmp_path)
    task = built(tmp_path)
    task.model.eval()
    lengths = (5, 2)
    ids = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]])
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    together = {"input_ids": ids, "attention_mask": mask}
    if side == "left":
        together = {
            name: torch.stack([row.roll(5 - n) for row, n in zip(v, lengths, strict=True)]) for name, v in together.items()
        }
    expected = [task.model(input_ids=row[None, :n]).logits for row, n in zip(ids, lengths, strict=True)]
    torch.testing.assert_close(task(together), torch.cat(expected), rtol=0, atol=1e-5)


def test_padding_on_the_left_counts_neither_in_load_nor_in_the_balance_loss(bert):
    task = built(bert)
    inject(task.model, dataclasses.replace(ADAPTER, head=task.head_names))
    task.model.eval()
    right = batch()
    left = {**right}
    for name in ("input_ids", "attention_mask"):
        left[name] = torch.stack([row.roll(5 - n) for row, n in zip(right[name], (5, 3, 1), strict=True)])
    results = []
    for examples in (right, left):
        with recording(task.model, task.token_mask(examples)):
            results.append((task.loss(examples), balance_loss(task.model)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def test_saved_decoder_pads_with_the_token_of_the_tokenizer_beside_it(tmp_path):
    config = DECODERS["llama"](7)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    task = built(tmp_path / "model")
    task.save_model(tmp_path / "saved", None)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.config.pad_token_id == tokenizer.pad_token_id == 0
    task.model.eval()
    together, _ = texts(0, "right")
    together["input_ids"][1, 1] = 5  # transformers cannot tell a last token from padding
    torch.testing.assert_close(saved(**together).logits, task(together))


def test_saved_decoder_whose_texts_end_in_the_padding_token_is_warned_of(tmp_path):
    AutoModelForSequenceClassification.from_config(DECODERS["llama"](7)).save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    task = built(tmp_path / "model")
    with pytest.warns(UserWarning, match="uses the token '</s>' as end of text and for padding"):
        task.save_model(tmp_path / "saved", None)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_head_computes_in_float32_under_mixed_precision(bert, tmp_path, kind):
    model = bert
    if kind == "llama":
        model = tmp_path / "llama"
        AutoModelForSequenceClassification.from_config(DECODERS["llama"](0)).save_pretrained(model)
    task = built(model)
    head = task.model.get_submodule(task.head_names[-1])
    seen = {}
    head.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    task.model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = task(batch())
        assert torch.is_autocast_enabled("cpu")
    x = seen["x"] if kind == "bert" else seen["x"][torch.arange(3), torch.tensor([4, 2, 0])]
    assert logits.dtype == torch.float32
    assert torch.equal(logits, F.linear(x.float(), head.weight, head.bias))


def test_metrics_are_the_requested_ones_beside_accuracy(bert):
    task = built(bert, metrics=["f1", "matthews"])
    metrics = task.new_metrics()
    preds, target = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    metrics.update(preds=preds, target=target)
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == pytest.approx({"accuracy": 0.6, "f1": 2 / 3, "matthews": 1 / 6})


def test_f1_of_three_classes_is_the_mean_over_the_classes(bert):
    metrics = built(bert, 3, metrics=["f1"]).new_metrics()
    metrics.update(preds=torch.tensor([0, 1, 2, 2]), target=torch.tensor([0, 1, 2, 1]))
    assert float(metrics.compute()["f1"]) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_f1_of_two_classes_is_that_of_class_1_also_in_a_head_of_several_tasks(bert):
    task = built(bert, 5, metrics=["f1"])
    metrics = task.new_metrics()
    examples = {**batch(lengths=(5, 3, 2, 4, 1)), "classes": torch.tensor([[3, 5]] * 5), "label": torch.tensor([4, 3, 3, 4, 4])}
    evaluation = task.evaluate(examples)
    assert evaluation.num_classes.tolist() == [2] * 5
    metrics.update(**{**evaluation.metric_inputs, "preds": torch.tensor([1, 1, 0, 0, 1])})
    assert float(metrics.compute()["f1"]) == pytest.approx(2 / 3)


def test_f1_of_three_classes_is_the_mean_over_the_classes_also_where_the_third_does_not_occur(bert):
    task = built(bert, 3, metrics=["f1"])
    metrics = task.new_metrics()
    evaluation = task.evaluate({**batch(), "label": torch.tensor([0, 0, 1])})
    metrics.update(**{**evaluation.metric_inputs, "preds": torch.tensor([0, 1, 1])})
    assert float(metrics.compute()["f1"]) == pytest.approx(2 / 3)  # both have 2/3
    metrics.update(**{**evaluation.metric_inputs, "preds": torch.tensor([0, 0, 0])})
    assert float(metrics.compute()["f1"]) == pytest.approx((0.75 + 0.5) / 2)


def test_evaluation_has_the_loss_of_each_example_and_its_mean_is_the_training_loss(bert):
    task = built(bert)
    task.model.eval()
    evaluation = task.evaluate(batch())
    torch.testing.assert_close(evaluation.loss.mean(), task.loss(batch()))
    assert torch.equal(evaluation.metric_inputs["preds"], task(batch()).argmax(-1))


def test_predictions_are_probabilities_with_labels_where_known(bert):
    task = built(bert)
    rows = task.predict(batch())
    assert [row["label"] for row in rows] == [0, 1, 1]
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) for row in rows)
    unlabeled = {key: value for key, value in batch().items() if key != "label"}
    assert [row["label"] for row in task.predict(unlabeled)] == [None] * 3


def test_extra_padding_changes_neither_loss_nor_load_nor_gradients(bert):
    task = built(bert)
    inject(task.model, dataclasses.replace(ADAPTER, head=task.head_names))
    task.model.eval()
    results = []
    for padding in (0, 7):
        task.model.zero_grad()
        examples = batch(padding=padding)
        with recording(task.model, task.token_mask(examples)):
            loss = task.loss(examples)
            balance = balance_loss(task.model)
        (loss + balance).backward()
        gradients = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
        results.append((loss, balance, gradients))
    (loss, balance, gradients), (padded_loss, padded_balance, padded_gradients) = results
    torch.testing.assert_close(loss, padded_loss)
    torch.testing.assert_close(balance, padded_balance)
    assert gradients.keys() == padded_gradients.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], padded_gradients[name], atol=1e-6, rtol=1e-4)


def test_unknown_things_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"metrics=\['bleu'\] must be some of accuracy, f1, matthews"):
        SequenceClassification("roberta-large", metrics=["bleu"])
    with pytest.raises(ValueError, match="dtype='int8' must be one of float32, bfloat16, float16"):
        SequenceClassification("roberta-large", dtype="int8")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        SequenceClassification(str(tmp_path))
    with pytest.raises(ValueError, match="cannot tell the architecture"):
        SequenceClassification("someone/secret-model", tiny=True).build(2)


def test_damaged_directory_and_wrong_kind_of_model_are_one_message_each(bert, tmp_path):
    with pytest.raises(ValueError, match="is a BertModel, which does not continue text"):
        load_causal_language_model(str(bert))
    (bert / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_sequence_classifier(str(bert), 2)
    config = json.loads((bert / "config.json").read_text(encoding="utf-8"))
    (bert / "config.json").write_text(json.dumps({**config, "model_type": "clip"}), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_sequence_classifier(str(bert), 2)


def without(directory, ending):
    weights = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ending not in name}
    assert len(kept) < len(weights)
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_the_files_lack_are_an_error_and_not_silently_random(bert, tmp_path):
    without(bert, "layer.1.attention.self.query")
    with pytest.raises(ValueError, match=r"is incomplete or damaged: 2 of .* not in its files .*layer\.1\.attention\.self"):
        load_sequence_classifier(str(bert), 2)
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    load_causal_language_model(str(tmp_path / "llama"))
    without(tmp_path / "llama", "lm_head")
    with pytest.raises(ValueError, match=r"incomplete or damaged: 1 of .*\(lm_head\.weight"):
        load_causal_language_model(str(tmp_path / "llama"))


def test_pooler_that_the_files_lack_is_said(bert):
    without(bert, "pooler")
    with pytest.warns(UserWarning, match="its pooler is random and is not trained"):
        load_sequence_classifier(str(bert), 2)


def test_examples_of_several_tasks_choose_among_their_own_classes(bert):
    task = SequenceClassification(str(bert), metrics=["matthews"])
    task.build(5)
    task.model.eval()
    mixed = {**batch(), "classes": torch.tensor([[0, 2], [2, 5], [2, 5]]), "label": torch.tensor([1, 4, 2])}
    logits = task(mixed)
    assert torch.isfinite(logits).tolist() == [[True] * 2 + [False] * 3] + [[False] * 2 + [True] * 3] * 2
    everything = task({key: value for key, value in mixed.items() if key != "classes"})
    expected = torch.stack(
        [-everything[0, :2].log_softmax(-1)[1], -everything[1, 2:].log_softmax(-1)[2], -everything[2, 2:].log_softmax(-1)[0]]
    )
    evaluation = task.evaluate(mixed)
    torch.testing.assert_close(evaluation.loss, expected)
    torch.testing.assert_close(task.loss(mixed), expected.mean())
    assert evaluation.metric_inputs["target"].tolist() == [1, 2, 0]
    assert evaluation.metric_inputs["preds"].tolist() == [
        int(everything[0, :2].argmax()),
        int(everything[1, 2:].argmax()),
        int(everything[2, 2:].argmax()),
    ]
    rows = task.predict(mixed)
    assert rows[0]["probabilities"][2:] == [0, 0, 0]
    assert sum(rows[1]["probabilities"][2:]) == pytest.approx(1)


# ---------------------------------------------------------------- tokenizers


def word_tokenizer(directory, *words):
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(directory)
    return str(directory)


def test_another_model_s_tokenizer_is_refused(bert, tmp_path):
    word_tokenizer(bert, "[PAD]", "[UNK]", "good", "bad")
    same = word_tokenizer(tmp_path / "same", "[PAD]", "[UNK]", "good", "bad")
    more = word_tokenizer(tmp_path / "more", "[PAD]", "[UNK]", "good", "bad", "added")
    for tokenizer in (None, str(bert), same, more):
        assert built(bert, tokenizer=tokenizer).model is not None
    other = word_tokenizer(tmp_path / "other", "[PAD]", "[UNK]", "bad", "good")
    with pytest.raises(ValueError, match=r"tokenizer='.*other' belongs to another model: 2 of its 4 tokens have other ids in"):
        built(bert, tokenizer=other)
    with pytest.raises(ValueError, match=r"tokenizer='bytes' belongs to another model"):
        built(bert, tokenizer="bytes")


def test_tokenizer_with_more_tokens_than_the_model_is_refused_before_training(bert):
    with pytest.raises(ValueError, match=r"tokenizer='bytes' has 384 tokens, model='.*tiny_bert' has 50; leave tokenizer null"):
        built(bert, tokenizer="bytes")
    built(bert)  # without a tokenizer, batches are the caller's


def test_saved_model_has_the_tokenizer_of_the_data(bert, tmp_path):
    words = word_tokenizer(tmp_path / "words", "[PAD]", "[UNK]", "good")
    built(bert, tokenizer=words).save_model(tmp_path / "saved", ["bad", "good"])
    assert load_tokenizer(str(tmp_path / "saved")).get_vocab() == load_tokenizer(words).get_vocab()
