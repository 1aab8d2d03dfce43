"""One head for several tasks: an example chooses among the classes of its own task."""

import pytest
import torch
from torch.nn import functional as F

from datamodules import ImageMixtureDataModule
from datamodules.images import MixtureTask
from fourier_moe.errors import UserError
from lightning_modules.tasks import ImageClassification
from lightning_modules.tasks.class_ranges import evaluate_classes, own_classes_only

RANGES = torch.tensor([[0, 2], [2, 5], [2, 5]])
BATCH = {"classes": RANGES, "label": torch.tensor([1, 2, 4]), "id": ["a", "b", "c"]}


def test_loss_and_prediction_are_those_of_a_head_of_the_task_alone():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    evaluation = evaluate_classes(own_classes_only(logits, BATCH), BATCH)
    for row, (first, end) in enumerate(RANGES.tolist()):
        alone = logits[row, first:end]
        torch.testing.assert_close(evaluation.loss[row], F.cross_entropy(alone, BATCH["label"][row] - first))
        assert evaluation.prediction[row] == alone.argmax()
    assert evaluation.target.tolist() == [1, 0, 2]
    assert evaluation.num_classes.tolist() == [2, 3, 3]

    evaluation.loss.sum().backward()
    others = torch.ones(3, 5, dtype=torch.bool)
    for row, (first, end) in enumerate(RANGES.tolist()):
        others[row, first:end] = False
    assert (logits.grad[others] == 0).all()
    assert (logits.grad[~others] != 0).all()


def test_without_ranges_every_class_is_open():
    logits = torch.randn(3, 5)
    batch = {"label": BATCH["label"], "id": BATCH["id"]}
    assert own_classes_only(logits, batch) is logits
    assert torch.equal(evaluate_classes(logits, batch).prediction, logits.argmax(-1))


def test_images_of_a_mixture_are_classified_within_their_task_and_not_by_prompts():
    task = ImageClassification("ViT-B-32", pretrained=None, tiny=True)
    task.build(5)
    batch = {**BATCH, "image": torch.randn(3, 3, 224, 224)}
    for row, (first, end) in zip(task.predict(batch), RANGES.tolist(), strict=True):
        assert sum(row["probabilities"][first:end]) == pytest.approx(1, abs=1e-6)
    assert task.loss(batch).isfinite()
    data = ImageMixtureDataModule({"cars": MixtureTask(), "dtd": MixtureTask()}, synthetic=True)
    task.check_data(data)
    with pytest.raises(UserError, match="zero_shot"):  # before anything is loaded
        ImageClassification(pretrained=None, head="zero_shot", tiny=True).check_data(data)
