import json

import pytest
from tokenizers import Tokenizer, models
from transformers import BertConfig

from datamodules.shared.tokenizers import check_max_length, is_path, load_tokenizer


def save(directory, **special):
    """A tokenizer of one word in a directory."""
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


def test_bytes_need_no_files():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [100, 101]
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    ("special", "pad"), [({"eos_token": "</s>", "unk_token": "<unk>"}, "</s>"), ({"unk_token": "<unk>"}, "<unk>")]
)
def test_a_tokenizer_without_padding_gets_some(tmp_path, special, pad):
    assert load_tokenizer(save(tmp_path, **special)).pad_token == pad


def test_a_tokenizer_that_has_nothing_to_pad_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no pad, eos or unk token to pad with"):
        load_tokenizer(save(tmp_path))


@pytest.mark.parametrize("content", [None, "{ broken", '{"model": {"type": "Nope"}}', "[]"])
def test_damaged_files_and_none_are_named_in_one_line(tmp_path, content):
    if content is not None:
        save(tmp_path)
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer='.*' cannot be loaded \(.*\); give a Hugging Face name") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub():
    with pytest.raises(ValueError, match=r"tokenizer='\./nowhere': no such directory"):
        load_tokenizer("./nowhere")
    assert [name for name in ("~/a", "../a", "/a", "a/b/c", "a/b", "gpt2") if not is_path(name)] == ["a/b", "gpt2"]


def test_the_models_own_length_is_the_limit():
    tokenizer = load_tokenizer("bytes")
    tokenizer.model_max_length = 8
    check_max_length(8, tokenizer, "bytes")
    with pytest.raises(ValueError, match="max_length=9 is more than the 8 tokens that the model of tokenizer 'bytes' takes"):
        check_max_length(9, tokenizer, "bytes")


def test_a_model_without_its_tokenizer_files_is_refused(tmp_path):
    """transformers makes up a tokenizer of special tokens alone, to which every word is unknown."""
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"tokenizer='.*' knows no words, only 5 special tokens: its files .* are missing"
    ) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
