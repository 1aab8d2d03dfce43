"""AdaptiveBalance on a model that is nothing but a projection and a head."""

import lightning as L
import pytest
import torch
from adaptive_balance import AdaptiveBalance, callbacks_from_environment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from fourier_moe import FourierMoEConfig, adapters, balance_loss, inject, recording

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on tiny runs

CONFIG = FourierMoEConfig(targets=["proj"], head=["head"], num_coefficients=16, num_experts=4, balance_weight=0.1)
LAYER = "proj"


class Module(L.LightningModule):
    """`collapsed`: all tokens go to the same two experts; else half of them to two, half to the other two."""

    def __init__(self, collapsed: bool, config: FourierMoEConfig | None = CONFIG):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.head = nn.Linear(16, 16), nn.Linear(16, 1)
        if config is None:
            return
        inject(self, config)
        router = self.proj.router.weight
        with torch.no_grad():
            if collapsed:  # inputs are positive
                router.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None].expand(4, 16))
            else:
                router.zero_()
                router[:2, 0], router[2:, 1] = 9.0, 9.0

    def training_step(self, batch):
        with recording(self):
            loss = self.head(self.proj(batch)).square().mean()
            return loss + balance_loss(self)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)

    def train_dataloader(self):
        x = torch.rand(8, 16) * 0.1
        x[:4, 0], x[4:, 1] = 1.0, 1.0
        return DataLoader([x] * 6, batch_size=None)


def fit(directory, module, callback, ckpt_path=None, **options):
    trainer = L.Trainer(
        callbacks=[callback, ModelCheckpoint(directory, filename="last")],
        logger=CSVLogger(directory, name="", version=""),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **options},
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=False)


@pytest.mark.parametrize(("collapsed", "weight"), [(True, 0.1 * 2**3), (False, 0.1 / 2**3)])
def test_weight_rises_where_the_load_is_uneven_and_falls_where_it_is_even(tmp_path, collapsed, weight):
    module = Module(collapsed)
    fit(tmp_path, module, AdaptiveBalance(factor=2.0, every_n_steps=2))
    assert adapters(module)[LAYER].balance_weight == pytest.approx(weight)
    logged = [line for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:] if line]
    assert len(logged) == 3
    assert module.proj.router.record.num_readers == 0


def test_weight_stays_within_its_limits_and_counts_optimizer_steps(tmp_path):
    module = Module(collapsed=True)
    fit(tmp_path, module, AdaptiveBalance(factor=10.0, every_n_steps=1, limits=(0.01, 0.5)), accumulate_grad_batches=3)
    assert adapters(module)[LAYER].balance_weight == 0.5
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 2  # six batches are two optimizer steps


def test_a_resumed_run_goes_on_with_the_weights_and_a_new_one_does_not(tmp_path):
    callback = AdaptiveBalance(factor=2.0, every_n_steps=6)
    for number, (path, weight) in enumerate([(None, 0.2), (tmp_path / "0/last.ckpt", 0.4), (None, 0.2)]):
        module = Module(collapsed=True)
        fit(tmp_path / str(number), module, callback, ckpt_path=path, max_epochs=2 if path else 1)
        assert adapters(module)[LAYER].balance_weight == pytest.approx(weight)


def test_a_model_without_routers_is_left_in_peace(tmp_path):
    class Plain(Module):
        def training_step(self, batch):
            return self.head(self.proj(batch)).square().mean()

    fit(tmp_path, Plain(False, config=None), AdaptiveBalance(every_n_steps=1))
    assert not (tmp_path / "metrics.csv").exists()


def test_the_entry_point_adds_nothing_unless_asked(monkeypatch):
    monkeypatch.delenv("ADAPTIVE_BALANCE", raising=False)
    assert callbacks_from_environment() == []
    monkeypatch.setenv("ADAPTIVE_BALANCE", "0.9")
    (callback,) = callbacks_from_environment()
    assert callback.target == 0.9
    for wrong, message in (("2", "target=2.0 must be"), ("even", "'even'.*could not convert")):
        monkeypatch.setenv("ADAPTIVE_BALANCE", wrong)
        with pytest.raises(ValueError, match=message):
            callbacks_from_environment()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, "target=0 must be"),
        ({"factor": 1.0}, r"factor=1\.0 must be more than 1"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be"),
        ({"limits": (1.0, 0.5)}, "limits="),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveBalance(**arguments)
