"""AdapterTrainerMixin in TRL's SFTTrainer, which packs sequences and computes its loss without the model's."""

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fourier_moe import FourierMoEConfig, adapter_state_dict, adapters, inject
from fourier_moe.errors import UserError
from fourier_moe.integrations import AdapterTrainerMixin, add_balance_loss

trl = pytest.importorskip("trl", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")
METHOD = {"num_coefficients": 64, "num_experts": 4, "balance_weight": 0.1}
PROJECTIONS = ["q_proj", "v_proj"]


class Trainer(AdapterTrainerMixin, trl.SFTTrainer):
    """What a user writes."""


def language_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
    )


def data():
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (32,), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": torch.randint(2, 40, (n,), generator=generator).tolist()} for n in lengths])


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(40)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")


def sft(directory, model, trainer_class=Trainer, **options):
    peft_config = options.pop("peft_config", None)
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, **options}
    settings |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": 16}
    arguments = trl.SFTConfig(str(directory), gradient_checkpointing=False, **settings)
    return trainer_class(
        model=model, args=arguments, train_dataset=data(), processing_class=tokenizer(), peft_config=peft_config
    )


def adapted():
    model = language_model()
    inject(model, FourierMoEConfig(targets=PROJECTIONS, **METHOD))
    return model


@pytest.mark.parametrize("packing", [False, True])
def test_it_trains_and_resumes_to_the_bit(tmp_path, packing):
    trainer = sft(tmp_path, adapted(), packing=packing)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["task_loss"] + row["adapter_loss"], abs=1e-4) for row in logs)
    assert all(row["adapter_loss"] >= 0.4 - 1e-6 for row in logs)  # 2 projections, each at least 0.1 top_k
    end = adapter_state_dict(trainer.model)
    resumed = sft(tmp_path, adapted(), packing=packing)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, end[name]) for name, value in adapter_state_dict(resumed.model).items())


def test_accumulated_steps_weigh_the_balance_loss_as_one_batch_does(tmp_path):
    losses = []
    for size, accumulated in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        trainer = sft(tmp_path / str(accumulated), adapted(), **options)
        trainer.train()
        losses.append({**trainer.state.log_history[0]})
    whole, parts = losses
    assert parts["adapter_loss"] == pytest.approx(whole["adapter_loss"], rel=0.2)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=0.05)


def test_peft_adapts_the_model_with_the_same_losses(tmp_path):
    from fourier_moe.integrations.peft import FourierMoEPeftConfig

    ours = sft(tmp_path / "inject", adapted())
    theirs = sft(tmp_path / "peft", language_model(), peft_config=FourierMoEPeftConfig(target_modules=PROJECTIONS, **METHOD))
    logs = []
    for trainer in (ours, theirs):
        trainer.train()
        logs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert logs[0] == logs[1]
    assert (tmp_path / "peft/checkpoint-4/adapter_model.safetensors").exists()
    assert [group["name"] for group in theirs.optimizer.param_groups] == ["experts", "router"]
    values = (layer.experts.coefficients for model in (ours.model, theirs.model) for layer in adapters(model).values())
    assert all(value.any() for value in values)


def test_the_hook_says_that_sft_trainer_ignores_the_model_s_loss(tmp_path):
    trainer = sft(tmp_path, adapted(), trainer_class=trl.SFTTrainer)
    add_balance_loss(trainer.model)
    with pytest.raises(UserError, match="the trainer does not take the loss from the output of LlamaForCausalLM"):
        trainer.train()
    model = adapted()
    add_balance_loss(model)
    trainer = sft(tmp_path, model, trainer_class=trl.SFTTrainer)  # which replaces the model's forward
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapters train without their load-balancing loss")
        with pytest.raises(UserWarning):
            trainer.train()
