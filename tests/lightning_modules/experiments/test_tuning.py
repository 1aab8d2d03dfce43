"""compare --tune: the search, the trials that are kept, what is tested afterwards, and trials that fail."""

import csv
import json
import math

import pytest

import lightning_modules.experiments.tuning as tuning
from fourier_moe.errors import UserError
from lightning_modules import AdaptationModule
from lightning_modules.experiments.results import Result
from lightning_modules.experiments.tuning import Trial, best_trial, search, trial_table

SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "2")


def searched(budget, rank, dimensions=2):
    """The best point, and all that were evaluated."""
    points = []

    def evaluate(point):
        points.append(point)
        return rank(point), 0.0

    return search(dimensions, budget, evaluate), points


@pytest.mark.parametrize("optimum", [(0, 0), (5, 0), (-6, 3), (1, -1)])
def test_the_search_reaches_an_optimum_far_from_its_start(optimum):
    best, points = searched(40, lambda point: -math.dist(point, optimum))
    assert best == optimum
    assert len(points) == len(set(points))


@pytest.mark.parametrize("budget", [1, 2, 5, 9])
def test_the_search_keeps_to_its_budget_and_begins_at_the_own_rates(budget):
    best, points = searched(budget, lambda point: point[0])
    assert points[0] == (0, 0)
    assert len(points) == budget
    assert best == (2 * (budget - 1), 0)


def test_large_steps_come_before_small_ones():
    _, points = searched(5, lambda point: -abs(point[0]), dimensions=1)
    assert points == [(0,), (2,), (-2,), (1,), (-1,)]


@pytest.mark.parametrize("failed", [Trial({}, failure="no").rank, Trial({}, math.nan, math.nan).rank])
def test_the_search_leaves_points_that_failed(failed):
    assert search(1, 9, lambda point: failed if point[0] >= 0 else (1.0 / -point[0], 0.0)) == (-1,)


@pytest.fixture
def compare(main, tmp_path):
    return lambda *words: main("compare", "--config", "configs/demo.yaml", "--output", str(tmp_path), *words)


@pytest.fixture
def trials(monkeypatch):
    """(point, seed) of the trials that would have been trained; a rate of the adapter above 0.01 diverges, 0.004 is best."""
    made = []

    def train_and_validate(cli, point, seed, metric):
        made.append((point, seed))
        lr = cli.model.optimization.adapter.lr
        if lr > 0.01:
            raise UserError("the loss is not finite")
        metrics = {"val/accuracy": 1 - abs(lr - 0.004), "val/loss": lr}
        return Result("LoRA", point, seed, f"val/{metric or 'accuracy'}", metrics, {"adapter": 8}, 1.0), {}

    monkeypatch.setattr(tuning, "_train_and_validate", train_and_validate)
    return made


def test_the_best_rates_are_tested_all_trials_told_and_none_made_twice(compare, trials, tmp_path, capsys):
    words = ("--adapters", "lora", "--tune", "4", "--seeds", "1", *SHORT)
    compare(*words)
    points = ["adapter=0.001,head=0.01", "adapter=0.004,head=0.01", "adapter=0.016,head=0.01", "adapter=0.004,head=0.04"]
    assert trials == [(point, tuning.TRIAL_SEED) for point in points]
    cell = json.loads((tmp_path / "cells/lora/seed_0.json").read_text())
    assert cell["config"]["model"]["optimization"]["adapter"]["lr"] == 0.004
    assert cell["config"]["model"]["optimization"]["head"]["lr"] == 0.01

    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["chosen"] for row in rows] == ["", "yes", "", ""]
    assert "not finite" in rows[2]["val/accuracy"]
    assert rows[3]["head lr"] == "0.04"
    report = (tmp_path / "results.md").read_text()
    assert "| LoRA   | 2     | 0.004" in report
    assert "LoRA: 0.01 is the lowest head rate tried" in report

    trials.clear()
    compare(*words)
    assert trials == [(points[2], tuning.TRIAL_SEED)]  # what has failed is tried again


def test_a_variant_that_always_fails_ends_the_comparison_with_its_reason(compare, trials, tmp_path):
    words = ("--adapters", "lora", "--tune", "2", "--model.optimization.adapter.lr", "1")
    with pytest.raises(UserError, match=r"lora: all 2 trials failed; the first: UserError: the loss is not finite"):
        compare(*words)
    assert not (tmp_path / "cells").exists()


def test_trials_need_validation_data_and_say_so_before_training(compare, monkeypatch):
    monkeypatch.setattr(AdaptationModule, "training_step", lambda *_: pytest.fail("training began"))
    with pytest.raises(UserError, match=r"--tune needs val/accuracy of the validation data.*hold a part out"):
        compare("--adapters", "head_only", "--tune", "3", *SHORT, "--trainer.limit_val_batches", "0")


@pytest.mark.slow
def test_a_language_model_s_trials_are_judged_by_what_its_validation_measures(main, tmp_path):
    words = ("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1")
    words += ("--model.task.evaluation.max_new_tokens", "2")
    words += ("--data.test", "[addition]", "--data.eval_batch_size", "4", *SHORT)
    command = ("--config", "configs/demo_math.yaml", "--adapters", "lora", "--tune", "1", "--seeds", "1", *words)
    (result,) = main("compare", *command, "--output", str(tmp_path))
    assert result.main_metric == "test/accuracy"
    (row,) = csv.DictReader((tmp_path / "trials.csv").open())
    assert list(row) == ["method", "trial", "adapter lr", "val/loss", "chosen"]
    assert float(row["val/loss"]) > 0


def test_a_real_trial_is_judged_by_the_last_weights_on_validation_data(compare, tmp_path):
    compare("--adapters", "head_only", "--tune", "1", "--seeds", "1", *SHORT)
    (kept,) = (tmp_path / "trials/head_only/cells").rglob("*.json")
    result = json.loads(kept.read_text())["result"]
    assert result["main_metric"] == "val/accuracy"
    assert result["lower_is_better"] == ["loss"]
    assert {name.partition("/")[0] for name in result["metrics"]} == {"val"}
    assert result["seconds"] > 0


def test_an_error_is_minimized(monkeypatch, tmp_path):
    def run_one(point, *_):
        error = {"val/mae": abs(float(point.partition("=")[2]) - 0.004)}
        return Result("LoRA", point, 0, "val/mae", error, {}, 1.0, lower_is_better=["loss", "mae"])

    monkeypatch.setattr(tuning, "run_one", run_one)
    trials = tuning.tune("lora", [], {"adapter": 0.001}, 5, None, tmp_path)
    assert best_trial(trials).rates == {"adapter": 0.004}
    assert best_trial([Trial({}, failure="no"), trials[0]]) is trials[0]


def test_equal_scores_are_decided_by_the_loss(tmp_path):
    trials = [Trial({"head": rate}, 0.5, "val/accuracy", loss) for rate, loss in ((1.0, 0.9), (4.0, 0.7), (16.0, 0.8))]
    assert best_trial(trials) is trials[1]
    assert len(trial_table({"a": trials}, {"a": "A"}, tmp_path)) == 1  # bracketed: no note
