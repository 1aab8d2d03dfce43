"""AdapterTrainerMixin and add_balance_loss in transformers.Trainer: losses, rates, checkpoints, and resuming to the bit."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from support.pages import section_code
from support.processes import run_in_two
from support.tiny_bert import BERT, SIZES
from torch.utils.data import Dataset
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fourier_moe import (
    FourierMoEConfig,
    FullFineTuning,
    KaSAConfig,
    adapter_state_dict,
    balance_loss,
    inject,
    load_adapter,
    recording,
)
from fourier_moe.errors import UserError
from fourier_moe.integrations import AdapterTrainerMixin, add_balance_loss

ROUTED = FourierMoEConfig(
    targets=["query", "value"], num_coefficients=64, num_experts=4, top_k=2, balance_weight=0.1, head=["classifier"]
)
CAUSAL = FourierMoEConfig(targets=["q_proj", "v_proj"], num_coefficients=64, num_experts=4, top_k=2, balance_weight=0.1)
RATES = {"experts": 1e-2, "router": 5e-3, "head": 1e-3}


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """What a user writes."""


class Sentences(Dataset):
    """Padded token ids whose label is the parity of the first token."""

    def __init__(self, count=32, causal=False):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 40, (count, 8), generator=generator)
        self.lengths = torch.randint(3, 9, (count,), generator=generator)
        self.causal = causal

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        mask = (torch.arange(8) < self.lengths[index]).long()
        ids = self.ids[index] * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100) if self.causal else ids[0] % 2}


def classifier(config=ROUTED):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BERT)
    inject(model, config)
    return model


def language_model(config=CAUSAL):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=8))
    inject(model, config)
    return model


def train(directory, model, trainer_class=AdapterTrainer, resume=None, causal=False, scaled=None, **options):
    rates = options.pop("learning_rates", {})
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1, "save_steps": 3, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "learning_rate": 1e-3, "seed": 0, **options,
    }  # fmt: skip
    extra = {"learning_rates": rates} if rates else {}
    arguments = TrainingArguments(str(directory), **settings)
    trainer = trainer_class(model=model, args=arguments, train_dataset=Sentences(causal=causal), **extra)
    if scaled is not None:
        trainer.model_accepts_loss_kwargs = scaled  # whatever the version; 5.24 also has loss_is_scaled_for_ga
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def test_ten_lines_train_save_reload_and_resume_to_the_bit(tmp_path):
    trainer = train(tmp_path, classifier(), learning_rates=RATES)
    assert {"adapter.json", "adapter.safetensors"} <= {file.name for file in (tmp_path / "checkpoint-3").iterdir()}
    assert not (tmp_path / "checkpoint-3/model.safetensors").exists()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == list(RATES.values())

    end = adapter_state_dict(trainer.model)
    fresh = BertForSequenceClassification(BERT)
    fresh.load_state_dict({k.replace(".base.", "."): v for k, v in trainer.model.state_dict().items()}, strict=False)
    load_adapter(fresh, tmp_path / "checkpoint-6")
    assert all(torch.equal(value, end[name]) for name, value in adapter_state_dict(fresh).items())

    resumed = train(tmp_path, classifier(), learning_rates=RATES, resume=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert all(torch.equal(value, end[name]) for name, value in adapter_state_dict(resumed.model).items())


def test_the_page_s_code_trains_and_its_hook_is_taken_away(tmp_path):
    trainer_code = section_code("guides/other_trainers", "transformers.Trainer, and TRL")
    args = TrainingArguments(str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    space = {"model": BertForSequenceClassification(BERT), "args": args, "data": Sentences()}
    exec(trainer_code.replace("num_coefficients=1024", "num_coefficients=64"), space)  # this model is 32 wide
    assert (tmp_path / "checkpoint-2/adapter.safetensors").exists()
    exec(section_code("guides/other_trainers", "A trainer that you cannot subclass"), space)
    space["remove"]()


def test_the_balance_loss_falls_and_the_logs_have_both_parts(tmp_path):
    trainer = train(
        tmp_path, classifier(), learning_rates={"experts": 0.0, "router": 5e-2, "head": 0.0}, max_steps=40, save_steps=99
    )
    adapter, task, total = (logged(trainer, name) for name in ("adapter_loss", "task_loss", "loss"))
    assert sum(adapter[-5:]) < sum(adapter[:5])
    assert total == pytest.approx([a + b for a, b in zip(adapter, task, strict=True)], abs=1e-4)
    assert all(1 <= value <= 2 for value in logged(trainer, "load_imbalance"))


@pytest.mark.parametrize("causal", [False, True])
def test_accumulated_steps_have_the_gradient_of_one_large_batch(tmp_path, causal):
    """The task's loss and the balance loss, whether Trainer divides by micro-batches or by tokens."""
    ends = []
    for accumulated in (1, 4):
        model = language_model() if causal else classifier()
        sizes = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
        sizes |= {"scaled": None if causal else False, "optim": "sgd", "max_grad_norm": 0, "learning_rate": 1e3}
        trainer = train(tmp_path / str(accumulated), model, causal=causal, max_steps=1, **sizes)
        ends.append((adapter_state_dict(trainer.model), logged(trainer, "adapter_loss"), logged(trainer, "loss")))
    (whole, whole_loss, total), (parts, parts_loss, parts_total) = ends
    experts = [name for name in whole if name.endswith("coefficients")]
    assert min(whole[name].abs().max() for name in experts) > 1e-4
    for name in experts:  # the routers' balance loss is a mean over micro-batches, which a large batch's is not
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-7)
    assert parts_loss == pytest.approx(whole_loss, rel=0.2)
    assert parts_total == pytest.approx(total, rel=0.05)


def steps(directory, causal, **options):
    """The logs and the end of three steps, in this process or as one of two."""
    sizes = {"per_device_train_batch_size": 4, "scaled": None if causal else False, "learning_rate": 1e-2, **options}
    model = language_model() if causal else classifier()
    trainer = train(directory, model, causal=causal, max_steps=3, save_strategy="no", **sizes)
    return [row for row in trainer.state.log_history if "loss" in row], adapter_state_dict(trainer.model)


def steps_of_one_of_two(directory):
    for state in (AcceleratorState, PartialState):  # of the process that this one was forked from
        state._shared_state.clear()
    return [steps(directory, causal, ddp_backend="gloo") for causal in (False, True)]


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_batches(tmp_path):
    one = [steps(tmp_path / "one", causal, gradient_accumulation_steps=2) for causal in (False, True)]
    for runs in run_in_two(steps_of_one_of_two, tmp_path / "two"):
        for (logs, state), (expected, end) in zip(runs, one, strict=True):
            assert logs == [pytest.approx(row, rel=1e-5) for row in expected]
            assert all(torch.allclose(state[name], value, rtol=1e-4, atol=1e-6) for name, value in end.items())


def test_the_loss_is_the_task_s_and_the_adapters_with_padding_left_out(tmp_path):
    model = classifier()
    trainer = train(tmp_path, model, max_steps=1, save_steps=99)
    batch = {name: torch.stack([Sentences()[i][name] for i in range(8)]) for name in Sentences()[0]}
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    with recording(model, batch["attention_mask"].bool()):
        expected = model(**batch).loss + balance_loss(model)
    torch.testing.assert_close(loss, expected)
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss)


@pytest.mark.parametrize("causal", [False, True])
def test_the_hook_trains_as_the_mixin_does_in_a_trainer_that_is_left_as_it_is(tmp_path, causal):
    build = language_model if causal else classifier
    mixed = train(tmp_path / "mixin", build(), causal=causal, save_steps=99)
    model = build()
    remove = add_balance_loss(model)
    hooked = train(tmp_path / "hook", model, trainer_class=Trainer, causal=causal, save_steps=99, save_strategy="no")
    assert logged(hooked, "loss") == pytest.approx(logged(mixed, "loss"), abs=1e-6)
    remove()
    assert "forward" not in vars(model)


def test_regularization_counts_and_full_fine_tuning_keeps_whole_checkpoints(tmp_path):
    trainer = train(
        tmp_path / "kasa", classifier(KaSAConfig(targets=["query"], r=4, head=["classifier"])), max_steps=2, save_steps=99
    )
    assert logged(trainer, "adapter_loss")[0] > 0
    train(tmp_path / "full", classifier(FullFineTuning(head=["classifier"])), max_steps=3)
    assert (tmp_path / "full/checkpoint-3/model.safetensors").exists()


def test_after_step_runs_once_per_step_however_often_the_optimizer_is_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("fourier_moe.integrations.trainer_mixin.after_step", calls.append)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = AdapterTrainer(model=classifier(), args=arguments, train_dataset=Sentences())
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    optimizer.step()
    assert len(calls) == 1


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="is not adapted"):
        add_balance_loss(torch.nn.Linear(2, 2))
    model = classifier()
    with pytest.raises(UserError, match="accumulation_steps=0"):
        add_balance_loss(model, 0)
    add_balance_loss(model)
    with pytest.raises(UserError, match="adds its balance loss already"):
        add_balance_loss(model)
    with pytest.raises(UserError, match="learning_rates has backbone, and the model trains experts, router, head"):
        train(tmp_path, classifier(), learning_rates={"backbone": 1e-3})
