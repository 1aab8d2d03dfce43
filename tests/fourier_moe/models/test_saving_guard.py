"""`save_pretrained` of an adapted model: refused, since from_pretrained would start the adapted projections at random."""

import copy
import pickle

import pytest
import torch
from support.models import config
from torch import nn

from fourier_moe import FullFineTuning, LoRAConfig, inject, load_adapter, save_adapter
from fourier_moe.serving.merge import merge_adapters

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
TOKENS = torch.arange(8).view(2, 4)
LORA = LoRAConfig(targets=["q_proj", "v_proj"], r=2)


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("settings", [config(), LORA], ids=["fourier_moe", "lora"])
def test_adapted_model_is_refused_and_names_what_to_use(settings, tmp_path):
    model = llama()
    inject(model, settings)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM is adapted.*save_adapter\(model, directory\).*train.py export"):
            other.save_pretrained(tmp_path / "d")
    with pytest.raises(ValueError, match="LlamaForCausalLM is adapted"):
        model.push_to_hub("owner/name", token="none")
    assert not (tmp_path / "d").exists()


def test_model_inside_a_wrapper_is_refused(tmp_path):
    wrapper = nn.ModuleDict({"backbone": llama()})
    inject(wrapper, LORA)
    with pytest.raises(ValueError, match="LlamaForCausalLM is adapted"):
        wrapper["backbone"].save_pretrained(tmp_path)


def test_model_of_which_another_part_is_adapted_saves(tmp_path):
    wrapper = nn.ModuleDict({"backbone": llama(), "q_proj": nn.Linear(16, 16)})
    inject(wrapper, LoRAConfig(targets=["(q_proj)"], r=2))
    wrapper["backbone"].save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, wrapper["backbone"](TOKENS).logits)


def test_merged_and_fully_fine_tuned_models_save_what_loads_right(tmp_path):
    merged = llama()
    inject(merged, LORA)
    moved(merged)
    expected = merged(TOKENS).logits
    merge_adapters(merged)
    tuned = llama()
    inject(tuned, FullFineTuning())
    for model, logits, name in ((merged, expected, "merged"), (moved(tuned), tuned(TOKENS).logits, "tuned")):
        model.save_pretrained(tmp_path / name)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(again(TOKENS).logits, logits)


def test_checkpoint_that_names_its_tensors_is_written_with_a_warning(tmp_path):
    """As transformers.Trainer does; the same adapted model resumes from it."""
    model = llama()
    inject(model, LORA)
    with pytest.warns(UserWarning, match="good for resuming with the same adapter only"):
        model.save_pretrained(tmp_path, state_dict=moved(model).state_dict())
    state = transformers.modeling_utils.load_state_dict(str(tmp_path / "model.safetensors"))
    assert any(name.endswith("q_proj.base.weight") for name in state)
    resumed = llama()
    inject(resumed, LORA)
    resumed.load_state_dict(state, strict=False)
    assert torch.equal(resumed(TOKENS).logits, model(TOKENS).logits)


def test_transformers_trainer_writes_checkpoints_and_resumes_exactly_and_its_model_is_refused(tmp_path):
    pytest.importorskip("accelerate")

    def trained(directory, resume_from=None):
        model = llama()
        inject(model, LORA)
        settings = {"max_steps": 3, "save_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
        arguments = transformers.TrainingArguments(
            str(directory), **settings, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        examples = [{"input_ids": tokens, "labels": tokens} for tokens in (TOKENS[0], TOKENS[1]) * 3]
        trainer = transformers.Trainer(model, arguments, train_dataset=examples)
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    with pytest.warns(UserWarning, match="good for resuming with the same adapter only"):
        whole = trained(tmp_path / "whole")
    with pytest.warns(UserWarning, match="good for resuming"):
        resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-1"))
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.model.state_dict().items())
    with pytest.raises(ValueError, match="LlamaForCausalLM is adapted"):
        whole.save_model(str(tmp_path / "model"))


def test_adapter_files_take_the_place(tmp_path):
    model = llama()
    inject(model, config())
    save_adapter(moved(model), tmp_path)
    fresh = llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)
