"""EvaluationSets: several named sets, every example once."""

import lightning as L
import pytest
import torch
from support.token_task import TokenData, token_batch, token_module, token_trainer
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_modules.evaluation_sets import EvaluationSets, num_own, set_names
from lightning_modules.tasks import Evaluation


def new_metrics():
    return MetricCollection({"accuracy": BinaryAccuracy()})


def scored(right, wrong, loss=None):
    preds = torch.tensor([1] * right + [0] * wrong)
    losses = None if loss is None else torch.full((right + wrong,), loss)
    return Evaluation({"preds": preds, "target": torch.ones_like(preds)}, losses)


def test_a_single_set_has_no_name_and_uneven_batches_count_by_example():
    sets = EvaluationSets([None], new_metrics)
    sets[0].update(scored(3, 0, loss=1.0))
    sets[0].update(scored(0, 1, loss=5.0))
    assert sets.compute() == pytest.approx({"accuracy": 0.75, "loss": 2.0})


def test_several_sets_have_their_own_values_and_the_mean_over_sets():
    sets = EvaluationSets(["easy", "hard"], new_metrics)
    sets[0].update(scored(9, 1))
    sets[1].update(scored(1, 1))
    assert sets.compute() == pytest.approx({"easy/accuracy": 0.9, "hard/accuracy": 0.5, "accuracy": 0.7})


def test_what_a_set_does_not_have_is_left_out_of_the_mean():
    sets = EvaluationSets(["held_out", "gsm8k"], new_metrics)
    sets[0].update(Evaluation({}, torch.tensor([2.0, 4.0])))
    sets[1].update(scored(1, 3))
    assert sets.compute() == pytest.approx({"held_out/loss": 3.0, "loss": 3.0, "gsm8k/accuracy": 0.25, "accuracy": 0.25})


def test_reset_forgets():
    sets = EvaluationSets([None], new_metrics)
    sets[0].update(scored(1, 0, loss=1.0))
    sets.reset()
    assert sets.compute() == {}


def test_names_come_from_a_dict_of_loaders():
    assert set_names({"a": 1, "b": 2}) == ["a", "b"]
    assert set_names(object()) == [None]


@pytest.mark.parametrize(("examples", "processes", "batch_size"), [(9, 2, 2), (8, 2, 3), (5, 4, 2), (1, 3, 2), (7, 3, 7)])
def test_every_example_belongs_to_one_process_once(examples, processes, batch_size):
    own = []
    for rank in range(processes):
        sampler = DistributedSampler(range(examples), num_replicas=processes, rank=rank, shuffle=False)
        loader = DataLoader(range(examples), batch_size=batch_size, sampler=sampler)
        for batch_idx, batch in enumerate(loader):
            own += batch[: num_own(loader, batch_idx, len(batch))].tolist()
    assert sorted(own) == list(range(examples))


def test_a_loader_without_distribution_owns_everything():
    assert num_own(DataLoader(range(4), batch_size=2), 1, 2) == 2
    assert num_own([], 0, 5) == 5


class TwoSets(TokenData):
    def test_dataloader(self):
        return {"first": self._loader(4), "second": DataLoader([token_batch(3, seed=5)], batch_size=None)}


def test_module_logs_every_set_and_their_mean_and_gives_callbacks_the_set_s_name(tmp_path):
    class Names(L.Callback):
        seen: list

        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            self.seen.append((outputs["set"], len(batch["id"])))

    names = Names()
    names.seen = []
    module, data = token_module(), TwoSets()
    trainer = token_trainer(tmp_path, names)
    trainer.fit(module, data)
    results = trainer.test(module, data, verbose=False)[0]
    assert names.seen == [("first", 8), ("second", 3)]
    expected = {f"test/{part}{key}" for part in ("first/", "second/", "") for key in ("accuracy", "loss")}
    assert set(results) == expected
    for key in ("accuracy", "loss"):
        assert results[f"test/{key}"] == pytest.approx((results[f"test/first/{key}"] + results[f"test/second/{key}"]) / 2)


def test_a_single_set_with_a_name_has_both_its_own_values_and_the_mean():
    sets = EvaluationSets(["gsm8k"], new_metrics)
    sets[0].update(scored(1, 3, loss=2.0))
    assert sets.compute() == pytest.approx({"gsm8k/accuracy": 0.25, "gsm8k/loss": 2.0, "accuracy": 0.25, "loss": 2.0})


def test_results_say_how_many_examples_each_set_has_scored():
    sets = EvaluationSets(["a", "b", "c"], new_metrics)
    sets[0].update(scored(1, 3))
    sets[0].update(scored(1, 0))
    sets[1].update(Evaluation({}, torch.zeros(7)))
    sets.compute()
    assert [(result.count, result.values) for result in sets.results] == [
        (5, {"accuracy": pytest.approx(0.4)}),
        (7, {"loss": 0.0}),
        (0, {}),
    ]


def test_several_loaders_without_names_are_an_error_and_one_is_not(tmp_path):
    class Listed(TokenData):
        def val_dataloader(self):
            return [self._loader(3)]

        def test_dataloader(self):
            return [self._loader(4), self._loader(5)]

    module = token_module()
    trainer = token_trainer(tmp_path)
    trainer.fit(module, Listed())
    assert "val/accuracy" in trainer.callback_metrics
    with pytest.raises(ValueError, match=r"returns 2 evaluation loaders in a list; return a dict"):
        trainer.test(module, Listed(), verbose=False)
