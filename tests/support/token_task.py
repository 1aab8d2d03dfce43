"""A task with padding, unlike image classification: a bag of tokens, two classes."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from datamodules.shared.data_module import BaseDataModule
from fourier_moe import FourierMoEConfig
from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup
from lightning_modules.tasks import Evaluation, Task

WIDTH, LENGTH = 16, 6
ADAPTER = FourierMoEConfig(targets=["q_proj", "v_proj"], num_coefficients=16, num_experts=4, balance_weight=0.5)
RATES = Optimization(experts=ParameterGroup(0.1), head=ParameterGroup(0.01), schedule="constant", warmup_ratio=0.0)


class TokenModel(nn.Module):
    backbone_name = "token_model"

    def __init__(self, num_classes):
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, tokens, mask):
        x = self.embedding(tokens)
        x = x + self.v_proj(torch.tanh(self.q_proj(x)))
        return self.head(self.norm((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)))


class TokenTask(Task):
    head_names = ("head",)
    main_metric = "accuracy"

    def build(self, num_classes, class_names=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = TokenModel(num_classes)
        return self.model

    def logits(self, batch):
        return self.model(batch["tokens"], batch["mask"])

    def loss(self, batch):
        return F.cross_entropy(self.logits(batch), batch["label"])

    def new_metrics(self):
        return MetricCollection({"accuracy": MulticlassAccuracy(2, average="micro")})

    def evaluate(self, batch):
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch["label"], reduction="none")
        return Evaluation({"preds": logits, "target": batch["label"]}, loss)

    def predict(self, batch):
        probabilities = self.logits(batch).softmax(-1).tolist()
        labels = batch["label"].tolist() if "label" in batch else [None] * len(probabilities)
        rows = zip(batch["id"], labels, probabilities, strict=True)
        return [{"id": id_, "label": label, "probabilities": row} for id_, label, row in rows]

    def token_mask(self, batch):
        return batch["mask"]


def token_batch(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, (size, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (size, 1), generator=generator)
    return {
        "id": [f"row {row}" for row in range(size)],
        "tokens": tokens,
        "mask": torch.arange(LENGTH) < lengths,
        "label": tokens[:, 0] % 2,
    }


class TokenData(BaseDataModule):
    """Three training batches, one for everything else."""

    def __init__(self, class_names=None):
        super().__init__()
        self._class_names = class_names or []

    @property
    def class_names(self):
        return self._class_names

    def _loader(self, *seeds):
        return DataLoader([token_batch(seed=seed) for seed in seeds], batch_size=None)

    def train_dataloader(self):
        return self._loader(0, 1, 2)

    def val_dataloader(self):
        return self._loader(3)

    def test_dataloader(self):
        return self._loader(4)

    def predict_dataloader(self):
        return self._loader(4)


def token_module(adapter=ADAPTER, optimization=RATES, **options):
    return AdaptationModule(TokenTask(), adapter, optimization, num_classes=2, **options)


def token_trainer(directory, *callbacks, max_epochs=1, **options):
    return L.Trainer(
        default_root_dir=directory,
        callbacks=list(callbacks),
        max_epochs=max_epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **options},
    )
