"""The project's own trainer and transformers.Trainer with the mixin are the same training."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from support.token_task import ADAPTER, TokenData, TokenModel, TokenTask, token_trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from fourier_moe import inject
from fourier_moe.integrations import AdapterTrainerMixin
from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup

STEPS = 20
RATES = {"experts": 0.1, "router": 0.02, "head": 0.01}


class Batches(TokenData):
    def train_dataloader(self):
        return self._loader(*range(STEPS))


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        parts = module.batch_losses
        self.values.append(float(parts.task + parts.balance))


class Classifier(TokenModel):
    """The task's model as transformers' models are called."""

    def forward(self, tokens, attention_mask, labels):
        logits = super().forward(tokens, attention_mask)
        return SequenceClassifierOutput(F.cross_entropy(logits, labels), logits)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()  # as the project's trainer keeps the statistics of a frozen model
        return self


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    def get_train_dataloader(self):
        batches = Batches().train_dataloader().dataset
        renamed = [{"tokens": b["tokens"], "attention_mask": b["mask"], "labels": b["label"]} for b in batches]
        return DataLoader(renamed, batch_size=None)


def test_both_trainers_have_the_same_losses_for_20_steps(tmp_path):
    groups = {kind: ParameterGroup(rate) for kind, rate in RATES.items()}
    module = AdaptationModule(TokenTask(), ADAPTER, Optimization(**groups, schedule="linear", warmup_ratio=0.1), num_classes=2)
    losses = Losses()
    token_trainer(tmp_path, losses, limit_val_batches=0).fit(module, Batches())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(2)
    inject(model, replace(ADAPTER, head=["head"]))
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=STEPS,
        logging_steps=1,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_grad_norm=0,
        optim="adamw_torch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = AdapterTrainer(model=model, args=arguments, train_dataset=[0] * STEPS, learning_rates=RATES)
    trainer.train()
    others = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(others) == len(losses.values) == STEPS
    assert others == pytest.approx(losses.values, abs=1e-6)
    assert losses.values[-1] < losses.values[0]
