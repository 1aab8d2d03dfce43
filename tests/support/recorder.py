"""A LightningModule that remembers what it is fed, and a quiet trainer."""

import lightning as L
import torch


class Recorder(L.LightningModule):
    """Remembers the ids of training and test in `seen`; the loss reads the batch's entry `key`."""

    def __init__(self, key: str):
        super().__init__()
        self.key = key
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def training_step(self, batch, batch_idx):
        self.seen += batch["id"]
        return self.weight * batch[self.key].float().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        assert batch["label"].dtype == torch.int64

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen += batch["id"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", max_epochs=1, **quiet, **options)
