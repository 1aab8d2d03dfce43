"""The model card: valid front matter, code that runs, and a user's own card is never overwritten."""

import dataclasses
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from support.models import Transformer, config, tokens, trained
from torch import nn

from fourier_moe import AdapterDescription, HeadOnly, inject, load_adapter, save_adapter
from fourier_moe.files.model_card import is_edited, loading_code, model_card

DESCRIPTION = AdapterDescription(
    config(),
    backbone="owner/base",
    class_names=["a", "b"],
    metrics={"val/accuracy": 0.75, "val/loss": 0.5, "a|b": 1.0},
    backbone_revision="c0ffee",
    task={"class": "SequenceClassification", "pipeline_tag": "text-classification", "main_metric": "accuracy", "data": "rte"},
    trained_parameters={"experts": 1280, "router": 0},
)


def test_front_matter_is_what_the_hub_reads():
    card = huggingface_hub.ModelCard(model_card(DESCRIPTION, "model = ..."))
    assert card.data.to_dict() == {
        "library_name": "fourier_moe",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "tags": ["fourier_moe", "FourierMoEConfig"],
        "metrics": ["accuracy", "a|b"],
    }
    assert "| val/accuracy | 0.7500 |" in card.text
    assert "| a\\|b | 1.0000 |" in card.text
    assert "| backbone | owner/base at revision c0ffee |" in card.text
    assert "| trained parameters | experts 1,280 |" in card.text


def test_name_that_is_none_of_the_hub_is_no_base_model():
    local = dataclasses.replace(DESCRIPTION, backbone="some_directory: [1]", backbone_revision=None, task={}, metrics={})
    card = huggingface_hub.ModelCard(model_card(local, "model = ..."))
    assert set(card.data.to_dict()) == {"library_name", "tags"}
    assert "some_directory" in card.text


def test_edited_card_stays_and_an_unedited_one_goes_with_the_adapter(tmp_path):
    path = save_adapter(trained(), tmp_path, metrics={"accuracy": 0.25}) / "README.md"
    save_adapter(trained(), tmp_path, metrics={"accuracy": 0.5})
    assert "| accuracy | 0.5000 |" in path.read_text()
    for edit in (
        lambda text: text.replace("adapter", "thing"),
        lambda text: f"{text}more",
        lambda text: "mine",
        lambda text: "",
    ):
        path.write_text(edit(path.read_text()))
        mine = path.read_text()
        assert is_edited(path)
        save_adapter(trained(), tmp_path, metrics={"accuracy": 0.75})
        assert path.read_text() == mine
        path.unlink()
        save_adapter(trained(), tmp_path)
        assert not is_edited(path)


def test_snippet_loads_a_transformers_model_again(tmp_path, monkeypatch):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    settings = transformers.LlamaConfig(**small, num_labels=3, pad_token_id=0)
    transformers.LlamaForSequenceClassification(settings).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = transformers.LlamaForSequenceClassification.from_pretrained("base", num_labels=3)
    inject(model, HeadOnly(head=["score"]))
    nn.init.normal_(model.score.weight)
    save_adapter(model, tmp_path)
    code = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    space = {}
    exec(code, space)
    assert isinstance(space["model"], transformers.LlamaForSequenceClassification)
    assert torch.equal(space["model"].score.weight, model.score.weight)


@pytest.mark.parametrize(("name", "says"), [(None, "Transformer"), ("clip/a", "clip/a")])
def test_snippet_of_another_model_says_which_one_is_meant(tmp_path, name, says):
    model = trained()
    model.backbone_name = name
    code = (save_adapter(model, tmp_path) / "README.md").read_text()
    assert f"model = ...  # the pretrained model: {says}\n" in code
    assert loading_code(SimpleNamespace(backbone_name="x")) == "model = ...  # the pretrained model: x"
    fresh, x = Transformer().eval(), tokens(4, 5, 16)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
