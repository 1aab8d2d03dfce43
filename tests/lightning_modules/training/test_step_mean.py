"""The gradient of an optimizer step: that of one batch of all its examples, however they are cut into batches and processes."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from support.language_models import ADAPTER as LANGUAGE_ADAPTER
from support.language_models import TinyLanguageModel, collate, example, language_trainer
from support.processes import run_in_two
from support.token_task import ADAPTER, TokenTask, token_batch, token_trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fourier_moe import LoRAConfig
from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup
from lightning_modules.strategies.sharding import ShardedBaseStrategy
from lightning_modules.tasks.base import select
from lightning_modules.training.step_mean import StepMean

STILL = ParameterGroup(0.0)  # weights stay as they are, so that all steps have the same
SUMS = [(1, 2), (5, 123456789), (30, 4), (7, 7), (12345, 67890), (1, 1), (99, 1)]
CUTS = [[0, 1], [2], [3, 4, 5], [6]]  # micro-batches of different numbers of label tokens
MODES = {"ddp": lambda: "ddp", "fsdp": ShardedBaseStrategy}


class Gradients(L.Callback):
    """What callbacks see where gradients are usually logged."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
        self.steps.append({name: p.grad.clone() for name, p in trained.items()})


class Batches(L.LightningDataModule):
    """The same batches whatever the number of processes, dealt out to them in turn."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(self.batches[self.trainer.global_rank :: self.trainer.world_size], batch_size=None)


def language_batches():
    return [collate([example(*SUMS[number]) for number in cut]) for cut in CUTS]


def language_gradients(directory, batches, **options):
    """Of every step of one epoch, without balance loss, which is a batch's own."""
    adapter, gradients = replace(LANGUAGE_ADAPTER, balance_weight=0.0), Gradients()
    torch.manual_seed(0)
    module = AdaptationModule(TinyLanguageModel(), adapter, Optimization(experts=STILL))
    trainer = language_trainer(directory, gradients, max_epochs=1, use_distributed_sampler=False, **options)
    trainer.fit(module, Batches(batches))
    return gradients.steps


def assert_close(gradients, expected):
    assert gradients.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_accumulated_gradient_is_that_of_one_batch_of_all_examples(tmp_path):
    (expected,) = language_gradients(tmp_path, [collate([example(*pair) for pair in SUMS])])
    counts = [int(TinyLanguageModel().loss_weight(batch)) for batch in language_batches()]
    assert max(counts) > 2 * min(counts)
    (gradients,) = language_gradients(tmp_path, language_batches(), accumulate_grad_batches=4)
    assert_close(gradients, expected)


def test_last_step_of_an_epoch_weighs_its_batches_alone_where_they_are_fewer(tmp_path):
    _, gradients = language_gradients(tmp_path, language_batches(), accumulate_grad_batches=3)
    (expected,) = language_gradients(tmp_path, language_batches()[3:])
    assert_close(gradients, expected)


def test_number_of_accumulated_batches_may_change_between_epochs(tmp_path):
    scheduler = GradientAccumulationScheduler({0: 4, 1: 2})
    adapter, gradients = replace(LANGUAGE_ADAPTER, balance_weight=0.0), Gradients()
    module = AdaptationModule(TinyLanguageModel(), adapter, Optimization(experts=STILL))
    language_trainer(tmp_path, gradients, scheduler, max_epochs=2).fit(module, Batches(language_batches()))
    (expected,) = language_gradients(tmp_path, [collate([example(*pair) for pair in SUMS])])
    (half,) = language_gradients(tmp_path, [collate([example(*SUMS[number]) for number in CUTS[0] + CUTS[1]])])
    assert len(gradients.steps) == 3
    assert_close(gradients.steps[0], expected)
    assert_close(gradients.steps[1], half)


def gradients_of_two(directory):
    found = {}
    for mode, strategy in MODES.items():
        for accumulated in (1, 2):
            options = {"devices": 2, "strategy": strategy(), "accumulate_grad_batches": accumulated}
            found[mode, accumulated] = language_gradients(directory, language_batches(), **options)
    return found


def test_gradient_of_two_processes_is_that_of_one_batch_of_all_examples(tmp_path):
    (expected,) = language_gradients(tmp_path, [collate([example(*pair) for pair in SUMS])])
    halves = [language_gradients(tmp_path, [collate([example(*SUMS[n]) for n in CUTS[i] + CUTS[i + 1]])])[0] for i in (0, 2)]
    for found in run_in_two(gradients_of_two, tmp_path):
        for mode in MODES:
            assert_close(found[mode, 2][0], expected)
            for gradients, half in zip(found[mode, 1], halves, strict=True):
                assert_close(gradients, half)


def test_example_without_label_tokens_and_a_step_without_any_move_nothing(tmp_path):
    batch = language_batches()[1]
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    (expected,) = language_gradients(tmp_path, [batch])
    first, second = language_gradients(tmp_path, [empty, batch, empty, empty], accumulate_grad_batches=2)
    assert_close(first, expected)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in second.values())


class ClassWeights(TokenTask):
    """A mean over the weights of the labels' classes."""

    weights = torch.tensor([1.0, 5.0])

    def loss(self, batch):
        return F.cross_entropy(self.logits(batch), batch["label"], weight=self.weights)

    def loss_weight(self, batch):
        return self.weights[batch["label"]].sum()


class SoftLabels(TokenTask):
    """A mean over examples, as F.cross_entropy takes it of probabilities."""

    def loss(self, batch):
        return F.cross_entropy(self.logits(batch), F.one_hot(batch["label"], 2) * 0.8 + 0.1)


def classification_gradients(directory, task, batches, **options):
    gradients = Gradients()
    module = AdaptationModule(
        task(), LoRAConfig(targets=["q_proj"], r=2), Optimization(adapter=STILL, head=STILL), num_classes=2
    )
    torch.manual_seed(0)
    token_trainer(directory, gradients, **options).fit(module, Batches(batches))
    return gradients.steps


@pytest.mark.parametrize("task", [TokenTask, ClassWeights, SoftLabels])
def test_every_example_weighs_the_same_in_batches_of_different_sizes(tmp_path, task):
    whole = token_batch(11)
    cuts = [select(whole, list(rows)) for rows in (range(8), range(8, 10), range(10, 11))]
    (expected,) = classification_gradients(tmp_path, task, [whole])
    (gradients,) = classification_gradients(tmp_path, task, cuts, accumulate_grad_batches=3)
    assert_close(gradients, expected)


def test_penalty_counts_once_however_many_batches_and_balance_as_the_mean_by_weight(tmp_path):
    """The rest of the loss: see docs/reference/method.md."""
    batches = [token_batch(8, seed=0), token_batch(2, seed=1)]
    rates = Optimization(experts=STILL, head=STILL)

    def gradients_of(batches, **options):
        gradients = Gradients()
        torch.manual_seed(0)
        module = AdaptationModule(TokenTask(), ADAPTER, rates, num_classes=2)
        token_trainer(tmp_path, gradients, **options).fit(module, Batches(batches))
        return gradients.steps

    alone = [gradients_of([batch])[0] for batch in batches]
    (together,) = gradients_of(batches, accumulate_grad_batches=2)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, 0.8 * alone[0][name] + 0.2 * alone[1][name], rtol=1e-4, atol=1e-6)


def test_a_single_batch_is_left_as_it_is():
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loss, mean = torch.tensor(3.0), StepMean()
    assert mean.weigh(loss, torch.tensor(7), trainer) is loss
