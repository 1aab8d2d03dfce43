"""Tasks on the meta device: the same model as with weights, which are not read."""

import pytest
import torch
from support.language_models import tiny_llama

from fourier_moe import FourierMoEConfig, HeadOnly, adapter_state_dict, inject
from lightning_modules.tasks import CausalLanguageModel, ImageClassification, SequenceClassification
from lightning_modules.tasks.base import without_weights

TASKS = {
    "llama": lambda: CausalLanguageModel("llama", dtype="bfloat16", tiny=True),
    "gemma": lambda: CausalLanguageModel("gemma", dtype="bfloat16", tiny=True),
    "roberta": lambda: SequenceClassification("roberta-large", dtype="bfloat16", tiny=True),
    "llama classifier": lambda: SequenceClassification("llama", tiny=True),
    "clip": lambda: ImageClassification(pretrained=None, tiny=True),
    "clip zero-shot": lambda: ImageClassification(pretrained=None, head="zero_shot", tiny=True),
    "hugging face": lambda: ImageClassification("google/vit-base-patch16-224", tiny=True),
    "timm": lambda: ImageClassification("timm:test_vit", pretrained=None),
    "resnet": lambda: ImageClassification("RN50", None),
}
TARGETS = {"roberta": "query"}
RESNET = "resnet"  # nothing of it can be adapted: its only projections are read by their weights


def described(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors}


@pytest.mark.parametrize("name", TASKS)
def test_shapes_dtypes_and_modes_are_those_of_the_loaded_model(name):
    targets = [TARGETS.get(name, "q_proj")]
    models = []
    for device in ("cpu", "meta"):
        task = TASKS[name]()
        with torch.device(device):
            assert without_weights() == (device == "meta")
            model = task.build(2, ["cat", "dog"])
            heads = task.head_names
            adapter = (
                FourierMoEConfig(targets=targets, num_coefficients=16, head=heads) if name != RESNET else HeadOnly(head=heads)
            )
            inject(model, adapter)
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}
        models.append(model)
    loaded, empty = models
    assert described(empty) == described(loaded)
    assert list(adapter_state_dict(empty)) == list(adapter_state_dict(loaded))
    assert [module.training for module in empty.modules()] == [module.training for module in loaded.modules()]
    assert getattr(empty, "backbone_name", None) == getattr(loaded, "backbone_name", None)


def test_a_directory_s_weights_are_not_read_and_its_generation_settings_are(tmp_path):
    model = tiny_llama().bfloat16()
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path / "llama")
    loaded = CausalLanguageModel(str(tmp_path / "llama"), "bytes", dtype="bfloat16").build()
    (tmp_path / "llama/model.safetensors").unlink()
    with torch.device("meta"):
        empty = CausalLanguageModel(str(tmp_path / "llama"), "bytes", dtype="bfloat16").build()
    assert described(empty) == described(loaded)
    assert empty.training
    assert empty.generation_config.eos_token_id == loaded.generation_config.eos_token_id == [1, 7]
    assert empty.config._name_or_path == loaded.config._name_or_path == "llama"
    (tmp_path / "llama/generation_config.json").unlink()
    with torch.device("meta"):
        assert CausalLanguageModel(str(tmp_path / "llama"), "bytes").build().generation_config.eos_token_id == 1
