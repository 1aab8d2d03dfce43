import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from datamodules.glue import tokenization
from datamodules.glue.dataset import PadBatch, TextDataset
from datamodules.glue.source import Examples
from datamodules.glue.tokenization import tokenize
from datamodules.shared.cache import load_or_make
from datamodules.shared.tokenizers import load_tokenizer


def examples(*columns, labels=None):
    return Examples([f"train/{row}" for row in range(len(columns[0]))], columns, labels)


@pytest.fixture
def runs(monkeypatch):
    """How many times tokenization really ran."""
    counted, original = [], tokenization._tokenize
    monkeypatch.setattr(tokenization, "_tokenize", lambda *words: counted.append(words) or original(*words))
    return counted


def test_sentence_and_pair_get_the_tokenizers_special_tokens(words, tmp_path):
    tokenizer = load_tokenizer(words)
    single = tokenize(examples(["w0 w1", "w2"]), tokenizer, 16, tmp_path)
    assert {name: values.tolist() for name, values in single[0].items()} == {
        "input_ids": [2, 4, 5, 3],
        "token_type_ids": [0, 0, 0, 0],
    }
    assert single[1]["input_ids"].tolist() == [2, 6, 3]
    pair = tokenize(examples(["w0"], ["w1 w2"]), tokenizer, 16, tmp_path)
    assert pair[0]["input_ids"].tolist() == [2, 4, 3, 5, 6, 3]
    assert pair[0]["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 1]
    assert (single.lengths, len(single), single.num_truncated) == ([4, 3], 2, 0)


def test_bytes_have_no_token_types(tmp_path):
    tokens = tokenize(examples(["ab"]), load_tokenizer("bytes"), 16, tmp_path)
    assert {name: values.tolist() for name, values in tokens[0].items()} == {"input_ids": [100, 101, 1]}


def test_only_examples_that_are_too_long_are_cut_and_they_are_counted(words, tmp_path):
    first, second = ["w1 " * 6, "w1", "w1 " * 9], ["w2 " * 3, "w2", "w2"]
    tokens = tokenize(examples(first, second), load_tokenizer(words), 9, tmp_path)
    assert tokens.num_truncated == 2
    assert tokens.lengths == [9, 5, 9]
    assert tokens[0]["input_ids"].tolist() == [2, 5, 5, 5, 3, 6, 6, 6, 3]  # the longer sentence loses first
    assert tokens[2]["input_ids"].tolist() == [2, *[5] * 5, 3, 6, 3]
    assert tokens[0]["token_type_ids"].tolist() == [0] * 5 + [1] * 4
    assert tokenize(examples(first, second), load_tokenizer(words), 12, tmp_path).num_truncated == 1


def test_as_long_as_allowed_is_not_cut(words, tmp_path):
    tokens = tokenize(examples(["w1 " * 7]), load_tokenizer(words), 9, tmp_path)
    assert (tokens.lengths, tokens.num_truncated) == ([9], 0)


def test_many_rows_are_tokenized_in_parts_that_fit_together(words, tmp_path, monkeypatch):
    source = random.Random(0)
    texts = [" ".join(f"w{source.randrange(20)}" for _ in range(source.randint(1, 12))) for _ in range(25)]
    whole = tokenize(examples(texts), load_tokenizer(words), 10, tmp_path / "a")
    monkeypatch.setattr(tokenization, "_CHUNK", 10)
    parts = tokenize(examples(texts), load_tokenizer(words), 10, tmp_path / "b")
    assert torch.equal(whole.offsets, parts.offsets)
    assert all(torch.equal(whole.columns[name], parts.columns[name]) for name in whole.columns)
    assert whole.num_truncated == parts.num_truncated > 0


def test_same_texts_are_found_in_the_cache(words, tmp_path, runs):
    first, second = (tokenize(examples(["w0 " * 20, "w1"]), load_tokenizer(words), 8, tmp_path) for _ in range(2))
    assert len(runs) == 1
    [file] = tmp_path.iterdir()
    (tmp_path / "ordinary").write_text("")
    assert file.stat().st_mode == (tmp_path / "ordinary").stat().st_mode  # in a shared directory others can read it, too
    assert second.num_truncated == first.num_truncated == 1
    assert second[0]["input_ids"].tolist() == first[0]["input_ids"].tolist()
    assert set(second.columns) == {"input_ids", "token_type_ids"}


def test_tokenizer_that_has_been_used_is_the_same_tokenizer(words, tmp_path, runs):
    tokenizer = load_tokenizer(words)
    tokenize(examples(["w0"]), tokenizer, 8, tmp_path)
    tokenizer(["w0 w1", "w0"], padding=True, truncation=True, max_length=3)
    tokenize(examples(["w0"]), tokenizer, 8, tmp_path)
    assert len(runs) == 1


@pytest.mark.parametrize("change", ["text", "boundary", "column", "max_length", "tokenizer", "lower case"])
def test_anything_else_is_tokenized_again(words, tmp_path, runs, change):
    tokenize(examples(["w0", "w1"]), load_tokenizer(words), 8, tmp_path)
    other = {"text": (["w0", "w2"],), "boundary": (["w0w", "1"],), "column": (["w0"], ["w1"])}.get(change, (["w0", "w1"],))
    tokenizer = load_tokenizer("bytes" if change == "tokenizer" else words)
    if change == "lower case":
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenize(examples(*other), tokenizer, 9 if change == "max_length" else 8, tmp_path)
    assert len(runs) == 2


def test_interrupted_writing_leaves_nothing_that_would_be_found(words, tmp_path, monkeypatch, runs):
    def break_off(file):
        raise OSError(28, "no space left")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", break_off)
        with pytest.raises(ValueError, match=r"cache_directory '.*' cannot be written to \(no space left; .*\); give another"):
            tokenize(examples(["w0"]), load_tokenizer(words), 8, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert tokenize(examples(["w0"]), load_tokenizer(words), 8, tmp_path).lengths == [3]
    assert len(runs) == 2


def test_damaged_file_is_made_again(words, tmp_path, runs):
    tokenize(examples(["w0"]), load_tokenizer(words), 8, tmp_path)
    [file] = tmp_path.iterdir()
    for damaged in (file.read_bytes()[:-4], b""):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"token cache: '{file}' is damaged \(.*\); the texts are tokenized again"):
            assert tokenize(examples(["w0"]), load_tokenizer(words), 8, tmp_path).lengths == [3]
    assert len(runs) == 3
    assert list(tmp_path.iterdir()) == [file]


def test_no_damage_gives_other_tokens(tmp_path):
    """Bits flipped anywhere, parts cut off, repeated or exchanged: the tensors are those that were written."""
    source = random.Random(0)
    tensors = {"tokens": torch.arange(40, dtype=torch.int32), "lengths": torch.tensor([3, 4]), "cut": torch.tensor(7)}
    load_or_make(tmp_path, "key", lambda: tensors)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(300):
            damaged = bytearray(whole)
            first, second = sorted(source.sample(range(len(whole)), 2))
            if number % 3 == 0:
                damaged[first] ^= 1 << source.randrange(8)
            elif number % 3 == 1:
                del damaged[first:second]
            else:
                damaged[first:second] = source.randbytes(second - first)
            file.write_bytes(damaged)
            found = load_or_make(tmp_path, "key", lambda: made.append(1) or tensors)
            assert {name: values.tolist() for name, values in found.items()} == {
                name: values.tolist() for name, values in tensors.items()
            }
    assert len(made) >= 290  # a flipped bit in a blank of the header changes nothing


def test_processes_that_write_at_the_same_time_leave_one_whole_file(tmp_path):
    tensors = {"tokens": torch.arange(10_000, dtype=torch.int32)}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load_or_make(tmp_path, "key", lambda: tensors), range(16)))
    assert all(torch.equal(each["tokens"], tensors["tokens"]) for each in found)
    assert [file.name for file in tmp_path.iterdir()] == ["key.safetensors"]


# Batches


def test_batch_is_padded_on_the_right_to_its_longest_even_if_the_tokenizer_pads_left(words, tmp_path):
    tokenizer = load_tokenizer(words)
    assert tokenizer.padding_side == "left"
    source = examples(["w0", "w1 w1 w1", "w2 " * 20], ["w5", "w6", "w7"], labels=[1, 0, 1])
    dataset = TextDataset(source, tokenize(source, tokenizer, 32, tmp_path), [1, 0])
    assert dataset.lengths == [7, 5]
    batch = PadBatch(9)([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[2, 5, 5, 5, 3, 10, 3], [2, 4, 3, 9, 3, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert batch["token_type_ids"].tolist() == [[0] * 5 + [1] * 2, [0] * 3 + [1] * 2 + [0] * 2]
    assert batch["label"].tolist() == [0, 1]
    assert batch["id"] == ["train/1", "train/0"]
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    assert all(value.dtype == torch.int64 for value in tensors)


def test_examples_without_labels_make_batches_without_labels(tmp_path):
    source = examples(["a"])
    batch = PadBatch(0)([TextDataset(source, tokenize(source, load_tokenizer("bytes"), 8, tmp_path), [0])[0]])
    assert set(batch) == {"input_ids", "attention_mask", "id"}


def test_empty_sentence_is_an_example_like_any_other(words, tmp_path):
    tokens = tokenize(examples([""], ["w0"]), load_tokenizer(words), 8, tmp_path)
    assert tokens[0]["input_ids"].tolist() == [2, 3, 4, 3]
