"""The callbacks in a LightningModule of the user's own, and what they say of one that they cannot read."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.pages import section_code
from support.tiny_bert import BERT
from support.token_task import ADAPTER, TokenModel, token_batch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification

from fourier_moe import adapter_state_dict, describe_adapter, inject, load_adapter
from fourier_moe.errors import UserError
from lightning_modules.callbacks import (
    AdapterCheckpoint,
    Dashboard,
    EvaluationReport,
    PredictionsWriter,
    RouterLoad,
    SpectralOccupancy,
    SpectralSensitivity,
    Throughput,
)
from lightning_modules.callbacks.any_module import num_examples

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on tiny runs


class Own(L.LightningModule):
    """A module that knows nothing of this project, around models that may be adapted."""

    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def training_step(self, batch, batch_idx):
        return self.models[0](batch["tokens"], batch["mask"]).square().mean()

    validation_step = predict_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def adapted():
    model = TokenModel(2)
    inject(model, ADAPTER)
    return model


def batches(*values):
    return DataLoader(list(values), batch_size=None)


def trainer(directory, *callbacks, **options):
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, **options}
    return L.Trainer(default_root_dir=directory, callbacks=list(callbacks), **settings)


def test_a_module_of_one_s_own_trains_with_the_callbacks_of_the_page(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BERT)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    space = {"__name__": "user"}
    code = section_code("guides/other_trainers", "A LightningModule of your own")
    exec(code.replace("num_coefficients=1024", "num_coefficients=64"), space)  # this model is 32 wide
    module = space["Classifier"](model)
    ids = torch.randint(1, 40, (4, 8))
    batch = {"input_ids": ids, "attention_mask": (ids > 5).long().index_fill(1, torch.tensor(0), 1), "labels": ids[:, 0] % 2}
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, *space["callbacks"], logger=logger)
    run.fit(module, batches(batch, batch), batches(batch))

    directory = tmp_path / "lightning_logs/version_0"
    header = (directory / "metrics.csv").read_text(encoding="utf-8").partition("\n")[0].split(",")
    expected = ["router/load/expert_7", "spectrum/energy/expert_7", "speed/samples_per_second", "speed/tokens_per_second"]
    assert set(expected) <= set(header)
    assert "router/balance_loss" not in header
    assert {"router_load.csv", "spectral_occupancy.csv"} <= {file.name for file in directory.iterdir()}
    assert describe_adapter(directory / "adapter").metrics["val/loss"] > 0

    fresh = BertForSequenceClassification(BERT)
    fresh.load_state_dict(start)
    load_adapter(fresh, directory / "adapter_last")
    trained = adapter_state_dict(model)
    assert trained["bert.encoder.layer.0.attention.self.query.experts.coefficients"].any()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in adapter_state_dict(fresh).items())


@pytest.mark.parametrize(
    ("callback", "models", "message"),
    [
        (RouterLoad(), [lambda: TokenModel(2)], "RouterLoad: Own has no adapted model; call inject"),
        (SpectralOccupancy(), [lambda: TokenModel(2)], "SpectralOccupancy: Own has no adapted model"),
        (Dashboard(), [lambda: TokenModel(2)], "Dashboard: Own has no adapted model"),
        (AdapterCheckpoint(), [lambda: TokenModel(2)], "AdapterCheckpoint: Own has no adapted model"),
        (AdapterCheckpoint(), [adapted, adapted], r"Own has 2 adapted models, models\.0, models\.1, and must have one"),
        (RouterLoad(), [adapted], "the routers recorded no tokens in the first batch"),
        (SpectralSensitivity(), [adapted], "SpectralSensitivity needs the task of an AdaptationModule, and Own is none"),
        (EvaluationReport(), [adapted], "EvaluationReport needs the task of an AdaptationModule"),
    ],
)
def test_what_a_callback_cannot_read_is_refused_in_one_sentence(tmp_path, callback, models, message):
    module = Own(*(make() for make in models))
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, callback).fit(module, batches(token_batch()), batches(token_batch()))


def test_predictions_need_a_task(tmp_path):
    with pytest.raises(UserError, match="PredictionsWriter needs the task of an AdaptationModule"):
        trainer(tmp_path, PredictionsWriter()).predict(Own(adapted()), batches(token_batch()))


def test_speed_needs_no_adapter(tmp_path):
    run = trainer(tmp_path, Throughput())
    run.fit(Own(TokenModel(2)), batches(token_batch()))
    assert run.callback_metrics["speed/samples_per_second"] > 0
    assert "speed/tokens_per_second" not in run.callback_metrics


def test_ranks_of_tokens_that_nobody_counts_are_left_out(tmp_path):
    run = trainer(tmp_path, SpectralOccupancy())
    run.fit(Own(adapted()), batches(token_batch()))
    assert "spectrum/energy/expert_0" in run.callback_metrics
    assert not any("token_rank" in name for name in [*run.callback_metrics, *(path.name for path in tmp_path.iterdir())])
    assert (tmp_path / "spectral_rings.png").exists()


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"id": ["a", "b"], "x": torch.zeros(7, 3)}, 2),
        ((torch.zeros(5, 3), torch.zeros(5)), 5),
        ({"scale": torch.tensor(1.0), "x": [torch.zeros(4)]}, 4),
        ("text", 1),
    ],
)
def test_examples_are_counted_in_any_batch(batch, count):
    assert num_examples(batch) == count
