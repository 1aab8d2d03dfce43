"""Paired tests: against closed forms, on synthetic methods whose truth is known, and for metrics that are no mean."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics import MeanAbsoluteError, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

import lightning_modules.experiments.significance
from lightning_modules.experiments.graded_examples import GradedSet, load_examples, save_examples
from lightning_modules.experiments.paired_tests import differences, format_differences
from lightning_modules.experiments.results import Result, result_frame
from lightning_modules.experiments.significance import Scores, holm, paired_difference, resample
from lightning_modules.tasks.causal_language_model import Share
from lightning_modules.tasks.scores import (
    F1,
    SCORES,
    BalancedAccuracy,
    Matthews,
    accuracy,
    f1,
    lower_is_better,
    matthews,
    not_shares,
)


def graded(correct):
    right = np.arange(len(correct)) % 2
    return GradedSet(np.array([f"{i:05}" for i in range(len(correct))]), np.where(correct, right, 1 - right), right)


def paired(*methods):
    """The second method less the first; each is a list of seeds, each an array of what was answered right."""
    sets = [[[graded(correct)] for correct in seeds] for seeds in methods]
    ones = np.ones(len(methods[0][0]))
    values = [np.array([accuracy(s.predictions, s.targets, ones) for (s,) in seeds]) for seeds in sets]
    scores = [Scores(v, r, len(ones)) for v, r in zip(values, resample(accuracy, sets), strict=True)]
    return paired_difference(scores[1], scores[0])


# ---------------------------------------------------------------- closed forms


def test_one_seed_is_the_paired_t_test_over_examples():
    generator = np.random.default_rng(0)
    first, second = generator.random(400) < 0.7, generator.random(400) < 0.65
    found = paired([first], [second])
    expected = stats.ttest_rel(second.astype(float), first.astype(float))
    assert found.mean == pytest.approx(second.mean() - first.mean())
    assert 0.01 < expected.pvalue < 0.9
    assert found.p == pytest.approx(expected.pvalue, rel=0.15)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()), abs=0.003)
    assert found.sources == "examples"


def test_without_examples_it_is_the_paired_t_test_over_seeds():
    first, second = np.array([0.5, 0.6, 0.7]), np.array([0.55, 0.68, 0.72])
    found = paired_difference(Scores(second), Scores(first))
    expected = stats.ttest_rel(second, first)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.sources == "seeds"
    alone = paired_difference(Scores(second[:1]), Scores(first[:1]))
    assert alone.mean == pytest.approx(0.05)
    assert math.isnan(alone.p)
    assert math.isnan(alone.low)


def test_interaction_of_seeds_and_examples_counts_once():
    """Every seed errs on examples of its own, so that the seeds' variance is the examples': 1/3 in the mean, and not 2/3."""
    resampled = np.random.default_rng(0).normal(size=(3, 20000))
    found = paired_difference(
        Scores(np.array([-1.0, 0.0, 1.0]), resampled, 10**6), Scores(np.zeros(3), np.zeros((3, 20000)), 10**6)
    )
    assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(1 / 3), rel=0.03)
    found = paired_difference(Scores(np.zeros(3), resampled[:1].repeat(3, 0), 10**6), Scores(np.zeros(3), 0 * resampled, 10**6))
    assert (found.high - found.low) / 2 == pytest.approx(stats.norm.ppf(0.975), rel=0.03)  # all of it is the examples'


def test_same_answers_differ_in_nothing_and_of_a_constant_difference_nothing_is_known():
    answers = np.random.default_rng(0).random(50) < 0.5
    same = paired([answers, answers], [answers, answers])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    of_one_example = paired([np.zeros(1, bool)], [np.ones(1, bool)])
    of_two_seeds = paired_difference(Scores(np.float32([0.65, 0.55])), Scores(np.float32([0.6, 0.5])))
    for constant, mean in ((of_one_example, 1), (of_two_seeds, 0.05)):
        assert constant.mean == pytest.approx(mean)
        assert all(math.isnan(value) for value in (constant.p, constant.low, constant.high))


def test_holm_against_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    corrected = holm([0.02, math.nan, 0.01])  # what could not be tested is no test
    assert corrected[0] == pytest.approx(0.02)
    assert math.isnan(corrected[1])
    assert corrected[2] == pytest.approx(0.02)


# ---------------------------------------------------------------- methods whose truth is known


def simulate(generator, difference, seeds, size, seed_spread):
    """Two methods on the same examples: each seed moves a method's accuracy by `seed_spread`, every example has its ease."""
    ease = generator.normal(0, 0.15, size)
    methods = []
    for mean in (0.7, 0.7 + difference):
        skills = mean + generator.normal(0, seed_spread, seeds)
        methods.append([generator.random(size) < np.clip(skill + ease, 0, 1) for skill in skills])
    return methods


@pytest.mark.parametrize(("seeds", "spread", "lowest"), [(1, 0.0, 0.91), (3, 0.0, 0.92), (3, 0.03, 0.88), (5, 0.03, 0.90)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch, seeds, spread, lowest):
    monkeypatch.setattr(lightning_modules.experiments.significance, "RESAMPLES", 100)
    generator, times = np.random.default_rng(0), 300
    found = [paired(*simulate(generator, 0.02, seeds, 300, spread)) for _ in range(times)]
    truth = 0.02  # the clipping at 1 hardly matters
    assert lowest < np.mean([one.low <= truth <= one.high for one in found]) <= 1 - 1 / times


def test_no_difference_is_seldom_found_and_a_clear_one_always(monkeypatch):
    monkeypatch.setattr(lightning_modules.experiments.significance, "RESAMPLES", 100)
    generator = np.random.default_rng(1)
    p_values = [paired(*simulate(generator, 0.0, 3, 300, 0.0)).p for _ in range(200)]
    assert np.mean(np.array(p_values) < 0.05) < 0.09
    assert 0.35 < np.mean(p_values) < 0.65  # uniform
    assert all(paired(*simulate(generator, 0.2, 3, 1000, 0.01)).p < 0.05 for _ in range(10))


def test_seeds_that_disagree_are_not_made_up_for_by_many_examples(monkeypatch):
    """One seed of three is far better on 20,000 examples: certain for these models, not for the method."""
    monkeypatch.setattr(lightning_modules.experiments.significance, "RESAMPLES", 100)
    generator = np.random.default_rng(0)
    first = [generator.random(20000) < 0.7 for _ in range(3)]
    second = [generator.random(20000) < skill for skill in (0.8, 0.7, 0.7)]
    assert paired(first[:1], second[:1]).p < 1e-6
    found = paired(first, second)
    assert found.p > 0.2
    assert found.low < 0 < found.high


def test_pairing_finds_what_lies_within_the_spread_of_each_method():
    generator = np.random.default_rng(0)
    first = generator.random(1000) < 0.7
    second = first.copy()
    second[np.flatnonzero(~first)[:20]] = True  # 20 of 1000 more are right, and none is lost
    found = paired([first], [second])
    assert found.mean == pytest.approx(0.02)
    assert found.p < 1e-4  # unpaired, the standard error is 0.02 as well


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_are_torchmetrics_and_weights_are_repetitions(classes):
    generator = torch.Generator().manual_seed(classes)
    right = torch.randint(classes, (200,), generator=generator)
    wrong = torch.rand(200, generator=generator) < 0.4
    given = torch.where(wrong, torch.randint(classes, (200,), generator=generator), right)
    weights = torch.randint(0, 3, (200,), generator=generator)
    repeated = [tensor.repeat_interleave(weights) for tensor in (given, right)]
    references = {
        "accuracy": MulticlassAccuracy(classes, average="micro"),
        "balanced_accuracy": MulticlassAccuracy(classes, average="macro"),
        "f1": BinaryF1Score() if classes == 2 else MulticlassF1Score(classes, average="macro"),
        "matthews": MulticlassMatthewsCorrCoef(classes),
    }
    assert references.keys() == SCORES.keys()
    for name, reference in references.items():
        own = SCORES[name](given.numpy(), right.numpy(), weights.double().numpy(), classes)
        assert own == pytest.approx(float(reference(*repeated)), abs=1e-6), name
        if name in ("f1", "matthews"):
            logged = {"f1": F1, "matthews": Matthews}[name](classes + 3)  # also in a head with classes of other tasks
            for part in zip(*(tensor.split(37) for tensor in repeated), strict=True):
                logged.update(*part, **({"num_classes": torch.full_like(part[0], classes)} if name == "f1" else {}))
            assert float(logged.compute()) == pytest.approx(own, abs=1e-6), name


@pytest.mark.parametrize(
    ("predictions", "targets", "expected"),
    [
        ([0, 0, 1, 2], [0, 0, 1, 1], 0.75),  # a class that is only predicted: scikit-learn's balanced_accuracy_score
        ([0, 0, 2, 2], [0, 0, 1, 1], 0.5),
        ([0, 1, 1, 0], [1, 1, 1, 1], 0.5),  # a single class occurs
        ([0, 0, 0, 1, 1], [0, 0, 0, 1, 2], 2 / 3),
    ],
)
def test_balanced_accuracy_is_the_mean_over_the_classes_that_occur(predictions, targets, expected):
    weights = np.ones(len(targets))
    assert SCORES["balanced_accuracy"](np.array(predictions), np.array(targets), weights) == pytest.approx(expected)
    assert float(BalancedAccuracy(3)(torch.tensor(predictions), torch.tensor(targets))) == pytest.approx(expected)


@pytest.mark.parametrize(("num_classes", "expected"), [(2, 2 / 3), (3, (0.8 + 2 / 3) / 2)])
def test_f1_of_three_classes_stays_the_mean_where_the_third_does_not_occur(num_classes, expected):
    """F1 of class 0 is 0.8, of class 1 it is 2/3."""
    targets, predictions = [0, 0, 0, 1], [0, 0, 1, 1]
    assert f1(np.array(predictions), np.array(targets), np.ones(4), num_classes) == pytest.approx(expected)
    metric = F1(5)  # a head that has classes of other tasks, too
    for first, end in ((0, 3), (3, 4)):
        sizes = torch.full((end - first,), num_classes)
        metric.update(torch.tensor(predictions[first:end]), torch.tensor(targets[first:end]), sizes)
    assert float(metric.compute()) == pytest.approx(expected)
    assert float(F1(num_classes)(torch.tensor(predictions), torch.tensor(targets))) == pytest.approx(expected)


def test_older_files_of_graded_examples_load_without_a_number_of_classes(tmp_path):
    one = graded(np.array([True, False]))
    np.savez_compressed(tmp_path / "x.npz", **{"/ids": one.ids, "/given": one.predictions, "/right": one.targets})
    loaded = load_examples(tmp_path / "x.npz")[""]
    assert loaded.num_classes is None
    assert np.array_equal(loaded.predictions, one.predictions)
    assert np.array_equal(loaded.targets, one.targets)


@pytest.mark.parametrize("prediction", [0, 1])
@pytest.mark.parametrize("targets", [[0] * 5, [1] * 5, [0, 0, 1, 1, 1]])
def test_matthews_of_one_prediction_for_all_is_zero(prediction, targets):
    predictions, targets = np.full(5, prediction), np.array(targets)
    assert matthews(predictions, targets, np.ones(5)) == 0
    assert Matthews(2)(torch.tensor(predictions), torch.tensor(targets)) == 0


def test_samples_are_shared_between_methods_and_stay_within_their_test_set():
    easy, hard = graded(np.ones(10, bool)), graded(np.zeros(1000, bool))
    samples = resample(accuracy, [[[easy, hard]], [[easy, hard]]])
    assert np.array_equal(*samples)
    assert (samples[0] == 0.5).all()  # the mean over two sets, however many examples they have


# ---------------------------------------------------------------- the table


def result(variant, seed, value):
    return Result(variant.upper(), variant, seed, "test/accuracy", {"test/accuracy": value}, {"head": 1}, 1.0)


def store(output: Path, variant, seed, correct, ids=None):
    one = graded(correct)
    path = output / f"cells/{variant}/seed_{seed}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_examples(path, {"": one if ids is None else GradedSet(np.array(ids), one.predictions, one.targets)})
    return result(variant, seed, float(np.mean(correct)))


def test_differences_are_against_the_named_method_on_common_seeds(tmp_path):
    generator = np.random.default_rng(0)
    draw = lambda skill: generator.random(500) < skill  # noqa: E731
    runs = [store(tmp_path, "b", 0, draw(0.9)), store(tmp_path, "a", 0, draw(0.6)), store(tmp_path, "c", 1, draw(0.6))]
    runs += [store(tmp_path, "b", 1, draw(0.9)), store(tmp_path, "a", 1, draw(0.6))]
    found, problems = differences(result_frame(runs), "a", tmp_path)
    assert problems == []
    assert list(found) == ["b", "c"]
    assert found["b"].mean == pytest.approx(
        np.mean(
            [
                runs[0].metrics["test/accuracy"] - runs[1].metrics["test/accuracy"],
                runs[3].metrics["test/accuracy"] - runs[4].metrics["test/accuracy"],
            ]
        )
    )
    assert (found["b"].sources, found["c"].sources) == ("seeds and examples", "examples")
    lines = format_differences(found, {"a": "A", "b": "B", "c": "C"}, "a").splitlines()
    assert lines[0].startswith("| against A | points | 95 % interval")
    assert len(lines) == 4
    as_numbers = format_differences(found, {"a": "A", "b": "B", "c": "C"}, "a", is_share=False).splitlines()
    assert [cell.strip() for cell in as_numbers[0].split("|")[1:4]] == ["against A", "difference", "95 % interval"]
    assert f"{found['b'].mean:+.4g} " in as_numbers[2]
    assert differences(result_frame(runs), "d", tmp_path) == ({}, ["d has no run to compare the others with"])


def test_one_of_several_test_sets_is_tested_by_itself(tmp_path):
    runs, answers = [], {"a": [True] * 6 + [False] * 2, "b": [True] * 8}
    for name, correct in answers.items():
        sets = {"cola": graded(np.array(correct)), "rte": graded(np.zeros(5, bool))}
        (tmp_path / f"cells/{name}").mkdir(parents=True)
        save_examples(tmp_path / f"cells/{name}/seed_0.npz", sets)
        share = np.mean(correct)
        runs.append(result(name, 0, share / 2))
        runs[-1].metrics["test/cola/accuracy"] = share
    one_set, problems = differences(result_frame(runs, "cola/accuracy"), "a", tmp_path)
    all_sets, _ = differences(result_frame(runs), "a", tmp_path)
    assert problems == []
    assert (one_set["b"].mean, all_sets["b"].mean) == (0.25, 0.125)
    assert one_set["b"].high == pytest.approx(2 * all_sets["b"].high, rel=0.1)


@pytest.mark.parametrize(
    ("metric", "change", "message"),
    [
        ("loss", {}, "test/loss is not computed from single answers"),
        ("accuracy", {"value": 0.123}, "b, seed 0: its answers do not give its test/accuracy"),
        ("accuracy", {"ids": ["x", "y", "z", "u"]}, "b, seed 0 was tested on other examples"),
        ("accuracy", {"missing": True}, "b, seed 0: its answers do not give its test/accuracy"),
    ],
)
def test_where_answers_cannot_be_paired_the_intervals_are_over_seeds_with_a_note(tmp_path, metric, change, message):
    correct = np.array([True, True, False, True])
    runs = [store(tmp_path, "a", 0, correct), store(tmp_path, "b", 0, ~correct, change.get("ids"))]
    if "value" in change:
        runs[1] = result("b", 0, change["value"])
    if "missing" in change:
        (tmp_path / "cells/b/seed_0.npz").unlink()
    for run in runs:
        run.metrics["test/loss"] = 1.0
    found, problems = differences(result_frame(runs, metric), "a", tmp_path)
    assert len(problems) == 1
    assert message in problems[0]
    assert "intervals are over seeds alone" in problems[0]
    assert math.isnan(found["b"].p)
    assert format_differences(found, {"a": "A", "b": "B"}, "a").splitlines()[2].count(" - ") == 3


def test_metrics_say_which_of_them_are_errors_and_which_are_shares():
    shares = {"accuracy": MulticlassAccuracy(3), "f1": F1(3), "matthews": Matthews(3), "share": Share("x")}
    others = {"balanced": BalancedAccuracy(3), "correlation": PearsonCorrCoef(), "mae": MeanAbsoluteError()}
    metrics = MetricCollection(shares | others)
    assert lower_is_better(metrics) == ["loss", "mae"]
    assert not_shares(metrics) == ["loss", "mae"]


def test_graded_examples_survive_the_file(tmp_path):
    sets = {"matched": replace(graded(np.array([True, False])), num_classes=3), "mis/matched": graded(np.array([False]))}
    save_examples(tmp_path / "x.npz", sets)
    loaded = load_examples(tmp_path / "x.npz")
    assert list(loaded) == list(sets)
    for name, one in sets.items():
        for field, value in vars(one).items():
            assert np.array_equal(getattr(loaded[name], field), value)
