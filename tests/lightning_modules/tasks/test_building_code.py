"""The Python in model cards builds the very model that an adapter belongs to."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule
from support.hub_server import Repository
from support.token_task import TokenTask

from datamodules import BaseDataModule
from fourier_moe import FourierMoEConfig, HeadOnly, describe_adapter, inject, load_adapter
from lightning_modules import AdaptationModule
from lightning_modules.tasks import CausalLanguageModel, ImageClassification, SequenceClassification
from lightning_modules.tasks.building_code import building_code

CLASSES = ["cat", 'the "dog"', "中文"]


@pytest.mark.parametrize(
    ("task", "names", "words"),
    [
        (ImageClassification("ViT-B-32-quickgelu", None, tiny=True), CLASSES, "pretrained=None, tiny=True).build(len(class"),
        (
            ImageClassification("ViT-B-32", None, tiny=True, head="zero_shot", templates=["a {}"]),
            CLASSES,
            "templates=('a {}',)",
        ),
        (SequenceClassification("roberta-base", tiny=True, dtype="bfloat16"), None, "dtype='bfloat16', tiny=True).build(3)"),
        (CausalLanguageModel("llama", tiny=True), None, "(model='llama', tiny=True).build(None)"),
    ],
    ids=["linear", "zero_shot", "sequence", "causal"],
)
def test_snippet_of_the_card_gives_a_model_that_the_adapter_fits(tmp_path, monkeypatch, task, names, words):
    model = task.build(3, names)
    heads = list(task.head_names) or ["lm_head"]
    module = AdaptationModule(task, HeadOnly())
    module.num_classes, module.class_names = (None if isinstance(task, CausalLanguageModel) else 3), names
    inject(model, HeadOnly(head=heads))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    module.save_adapter(tmp_path, {"val/accuracy": 0.5})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f'pipeline_tag: "{task.pipeline_tag}"' in card
    code = card.partition("```python\n")[2].partition("```")[0]
    assert words in code
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code, space)
    expected, found = model.state_dict(), space["model"].state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_task_that_does_not_say_its_arguments_leaves_the_code_to_the_model():
    assert building_code(TokenTask(), 2, None) is None


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (type("Data", (BaseDataModule,), {"dataset_name": "rte"}), "rte"),
        (type("Data", (BaseDataModule,), {}), "Data"),
        (type("Data", (LightningDataModule,), {}), "Data"),
        (type("Data", (LightningDataModule,), {"dataset": object()}), "Data"),
    ],
)
def test_data_is_called_by_its_name_or_its_class(tmp_path, data, says):
    task = CausalLanguageModel("llama", tiny=True)
    module = AdaptationModule(task, HeadOnly())
    inject(task.build(), HeadOnly(head=["lm_head"]))
    module._trainer = SimpleNamespace(datamodule=data())
    module.save_adapter(tmp_path, {})
    assert describe_adapter(tmp_path).task["data"] == says


def test_adapter_path_on_the_hub_is_fetched_once(tmp_path, hub):
    task = CausalLanguageModel("llama", tiny=True)
    settings = FourierMoEConfig(targets=["q_proj"], num_coefficients=64)
    saved = AdaptationModule(task, settings)
    inject(task.build(), settings)
    saved.save_adapter(tmp_path, {})
    files = ("adapter.safetensors", "adapter.json")
    hub.models["owner/name"] = Repository({file: (tmp_path / file).read_bytes() for file in files})
    module = AdaptationModule(CausalLanguageModel("llama", tiny=True), settings, adapter_path="hf://owner/name")
    module.configure_model()
    assert hub.looked_up() == ["owner/name"]
    assert sorted(hub.fetched()) == sorted(files)
    load_adapter(module.model, tmp_path)
