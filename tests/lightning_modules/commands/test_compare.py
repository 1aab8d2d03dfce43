"""compare: last and best weights, going on after an interruption, failures, and the table."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import DEMO

import lightning_modules.experiments.grid
import lightning_modules.experiments.plots
from lightning_modules import AdaptationModule
from lightning_modules.cli import user_error
from lightning_modules.experiments.graded_examples import load_examples
from lightning_modules.experiments.report import format_table, method_labels, unfair_runs
from lightning_modules.experiments.results import Result, result_frame
from lightning_modules.experiments.tuning import Trial

SHORT = ("--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "6")
PARAMETERS = {"experts": 0, "router": 0, "head": 650, "backbone": 0}
RESULT = Result("HeadOnly", "head_only", 0, "test/accuracy", {"test/accuracy": 0.5, "test/loss": 1.0}, PARAMETERS, 2.0)
UNKNOWN_TARGET = "model: {adapter: {init_args: {targets: [quary]}}}"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "comparison"


@pytest.fixture
def compare(main, output):
    return lambda *words: main("compare", *DEMO, "--output", str(output), *words)


@pytest.fixture
def trained(monkeypatch):
    """The (variant, seed) pairs that would have been trained."""
    pairs = []

    def train_and_test(cli, variant, seed):
        pairs.append((variant, seed))
        return replace(RESULT, variant=variant, seed=seed, metrics={"test/accuracy": 0.5 + len(pairs) / 100}), {}

    monkeypatch.setattr(lightning_modules.experiments.grid, "_train_and_test", train_and_test)
    monkeypatch.setattr(lightning_modules.experiments.plots, "plot_comparison", lambda *_: None)  # slower than all the rest
    return pairs


def kept(output):
    return {str(path.relative_to(output / "cells")) for path in (output / "cells").rglob("*.json")}


def read(output):
    header, _, *lines = (output / "results.md").read_text().partition("\n\n")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    return table[0], {row[0]: row for row in table[1:]}


# ---------------------------------------------------------------- real runs


@pytest.mark.slow
def test_metrics_and_parameters_by_kind_for_every_seed(compare, output, monkeypatch):
    words = ("--adapters", "lora", "--seeds", "2", *SHORT, "--trainer.max_epochs", "1")
    results = compare(*words)
    rows = json.loads((output / "results.json").read_text())
    assert [(row["variant"], row["seed"]) for row in rows] == [("lora", 0), ("lora", 1)]
    assert [row["metrics"] for row in rows] == [result.metrics for result in results]
    for row in rows:
        assert row["parameters"] == {**PARAMETERS, "adapter": 8 * 2 * 8 * 64}
        assert row["method"] == "LoRA"
        assert row["main_metric"] == "test/accuracy"
        assert row["seconds"] > 0
        assert {"test/loss", "test/accuracy", "test/balanced_accuracy"} <= set(row["metrics"])
        assert row["best_metrics"] == row["metrics"]  # one epoch: the best weights are the last ones
    assert results[0].metrics != results[1].metrics  # seeds do differ
    assert (output / "lora/seed_1/version_0/adapter_last").is_dir()

    columns, table = read(output)
    title = "test/accuracy (mean of 2)"
    assert columns == ["method", title, "best on validation", "each seed", "trained", "adapter", "head", "seconds", "MiB"]
    assert table["LoRA"][4:7] == ["8,842", "8,192", "650"]

    monkeypatch.setattr(AdaptationModule, "training_step", lambda *_: pytest.fail("training began"))
    text = (output / "results.md").read_text()
    assert compare(*words) == results  # read back
    assert (output / "results.md").read_text() == text


@pytest.mark.slow
def test_best_is_the_checkpoint_that_validation_chose(compare, run, output, tmp_path):
    overlay = tmp_path / "lowest.yaml"  # chooses the first of two epochs: its accuracy is the lowest
    checkpoint = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {monitor: val/accuracy, mode: min}}"
    overlay.write_text(f"trainer: {{callbacks: [{checkpoint}]}}")
    words = ("--trainer.limit_test_batches", "8", "--trainer.limit_train_batches", "12", "--trainer.max_epochs", "2")
    (result,) = compare("--adapters", str(overlay), "--seeds", "1", *words)
    (path,) = (output / "lowest/seed_0/version_0/checkpoints").glob("epoch=*.ckpt")  # beside the newest state
    assert torch.load(path, weights_only=True)["epoch"] == 0
    tested = run("test", *DEMO, "--config", str(overlay), *words, "--ckpt_path", str(path)).trainer.callback_metrics
    assert result.best_metrics == {name: pytest.approx(float(value)) for name, value in tested.items()}
    assert result.best_metrics["test/accuracy"] < result.metrics["test/accuracy"]
    assert result.best_metrics["test/loss"] > result.metrics["test/loss"]
    (row,) = json.loads((output / "results.json").read_text())
    assert (row["best_metrics"], row["metrics"]) == (result.best_metrics, result.metrics)
    _, table = read(output)
    percents = [f"{100 * metrics['test/accuracy']:.1f} %" for metrics in (result.metrics, result.best_metrics)]
    assert table["FourierMoE"][1:3] == percents


def test_without_validation_there_is_no_best(compare, output):
    words = ("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "1")
    (result,) = compare("--adapters", "head_only", "--seeds", "1", "--trainer.max_epochs", "1", *words)
    assert result.best_metrics is None
    assert read(output)[1]["HeadOnly"][2] == "-"


@pytest.mark.slow
def test_every_method_sees_the_same_examples_in_the_same_order_and_every_row_says_where_it_is_from(compare, output):
    words = ("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "6")
    names = "ablations/real_only,lora,head_only"  # these draw unlike many random numbers
    results = compare("--adapters", names, "--seeds", "2", "--trainer.max_epochs", "2", *words)
    orders = {seed: {result.data_order for result in results if result.seed == seed} for seed in (0, 1)}
    assert [len(order) for order in orders.values()] == [1, 1]
    assert orders[0] != orders[1]
    assert len({result.config_hash for result in results}) == 6
    for result in results:
        assert torch.__version__.startswith(result.versions["torch"])
        assert result.peak_memory > 2**20
    with open(output / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [(result.variant, str(result.seed)) for result in results]
    assert [row["size"] for row in rows[:3]] == ["num_coefficients=512", "r=8", ""]
    assert float(rows[1]["last"]) == results[1].metrics["test/accuracy"]
    assert (output / "plot.png").read_bytes().startswith(b"\x89PNG")

    text = (output / "results.md").read_text()
    notes = [line for line in text.splitlines() if line.startswith("Note")]
    assert notes == ["Note: tested on a part of the test examples (limit_test_batches=6)"]  # nothing unfair
    tests = [line for line in text.splitlines() if line.endswith("| seeds and examples |")]
    assert len(tests) == 2
    graded = [load_examples(output / f"cells/{name}/seed_1.npz")[""] for name in ("lora", "head_only")]
    assert len(graded[0].ids) == 6 * 32
    assert np.array_equal(graded[0].ids, graded[1].ids)
    assert np.array_equal(graded[0].targets, graded[1].targets)
    values = [
        result.metrics["test/accuracy"] for result in results if result.seed == 1 and result.variant in ("lora", "head_only")
    ]
    assert values == pytest.approx([(one.predictions == one.targets).mean() for one in graded])


def test_budget_sets_the_size_of_every_run(compare, output, trained, capsys):
    results = compare("--adapters", "fourier_moe,lora,head_only", "--seeds", "1", "--match-parameters", "5%")
    assert len(results) == 3
    configs = [json.loads((output / f"cells/{name}/seed_0.json").read_text())["config"] for name in ("fourier_moe", "lora")]
    adapters = [config["model"]["adapter"]["init_args"] for config in configs]
    assert (adapters[0]["num_coefficients"], adapters[1]["r"]) == (752, 10)
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    sizes = {row[0]: row[2:5] for row in table[:5]}
    assert sizes["fourier_moe"] == ["num_coefficients=752", "10,112", "5.003 %"]  # 5 % of 202,112 are 10,105.6
    assert sizes["lora"] == ["r=10", "10,240", "5.066 %"]
    assert sizes["head_only"] == ["as it is", "0", "0.000 %"]
    written = (output / "results.md").read_text()
    assert "Parameters matched to 5%" in written
    assert "Note: --match-parameters changed the size of fourier_moe, lora: do the rates" in written


@pytest.mark.parametrize("words", [("--match-parameters", "8192"), ("--match-parameters", "5%", "--tune", "1")])
def test_own_sizes_and_tuned_rates_need_no_note(compare, output, trained, monkeypatch, words):
    trials = [Trial({"adapter": 1e-3, "head": 1e-2}, 0.5, "val/accuracy", 1.0)]
    monkeypatch.setattr("lightning_modules.commands.compare.tune_rates", lambda *_: trials)
    compare("--adapters", "lora", "--seeds", "1", *words)
    assert "changed the size" not in (output / "results.md").read_text()


def test_losses_can_be_compared(compare, output, monkeypatch):
    def train_and_test(cli, variant, seed):
        loss = 0.91 if variant == "lora" else 0.875
        return replace(RESULT, variant=variant, seed=seed, metrics={"test/accuracy": 0.0, "test/loss": loss}), {}

    monkeypatch.setattr(lightning_modules.experiments.grid, "_train_and_test", train_and_test)
    compare("--adapters", "config,lora", "--seeds", "2", "--metric", "loss")
    header, rows = read(output)
    assert header[1] == "test/loss (mean of 2)"
    assert [row[1].split()[0] for row in rows.values()] == ["0.875", "0.91"]


# ---------------------------------------------------------------- going on


def test_same_command_goes_on_after_an_interruption(compare, output, trained, monkeypatch, capsys):
    train_and_test = lightning_modules.experiments.grid._train_and_test

    def interrupted(cli, variant, seed):
        if (variant, seed) == ("head_only", 0):
            raise SystemExit(1)  # as Lightning does on Ctrl-C and on SIGTERM
        return train_and_test(cli, variant, seed)

    words = ("--adapters", "lora,head_only,config", "--seeds", "1")
    with monkeypatch.context() as patch:
        patch.setattr(lightning_modules.experiments.grid, "_train_and_test", interrupted)
        with pytest.raises(SystemExit):
            compare(*words)
    assert trained == [("lora", 0)]  # it stops at once
    assert "interrupted: 1 of 3 runs are in" in capsys.readouterr().out
    assert kept(output) == {"lora/seed_0.json"}
    results = compare(*words)
    assert trained[1:] == [("head_only", 0), ("config", 0)]
    assert [result.metrics["test/accuracy"] for result in results] == [0.51, 0.52, 0.53]


def test_run_of_another_resolved_config_is_made_again_and_another_seed_added(compare, trained, tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("model: {optimization: {head: {lr: 0.1}}}")
    compare("--adapters", str(overlay), "--seeds", "1")
    overlay.write_text("model: {optimization: {head: {lr: 0.1}}} # another comment is the same config")
    compare("--adapters", str(overlay), "--seeds", "1")
    assert len(trained) == 1
    overlay.write_text("model: {optimization: {head: {lr: 0.2}}}")
    compare("--adapters", str(overlay), "--seeds", "1")
    compare("--adapters", str(overlay), "--seeds", "2")
    assert trained == [(str(overlay), seed) for seed in (0, 0, 1)]


def test_damaged_run_is_named_and_run_again(compare, output, trained, capsys):
    words = ("--adapters", "lora,head_only", "--seeds", "1")
    compare(*words)
    (output / "cells/lora/seed_0.json").write_text('{"format": 3, ')
    examples = output / "cells/head_only/seed_0.npz"
    examples.write_bytes(examples.read_bytes()[:-1])
    results = compare(*words)
    assert trained == [("lora", 0), ("head_only", 0)] * 2
    assert [result.metrics["test/accuracy"] for result in results] == [0.53, 0.54]
    printed = capsys.readouterr().out
    assert f"{output}/cells/lora/seed_0.json is damaged (JSONDecodeError" in printed
    assert f"{output}/cells/head_only/seed_0.json is damaged (the checksum of seed_0.npz differs): run again" in printed
    compare(*words)
    assert len(trained) == 4


def test_run_of_an_older_version_is_kept(compare, output, trained):
    words = ("--adapters", "lora", "--seeds", "1")
    compare(*words)
    path = output / "cells/lora/seed_0.json"
    stored = json.loads(path.read_text())
    stored["result"]["overlay"] = stored["result"].pop("variant")
    path.write_text(json.dumps({"format": 2, "config": stored["config"], "result": stored["result"]}))
    assert compare(*words)[0].variant == "lora"
    assert len(trained) == 1


@pytest.mark.parametrize("logger", ["false", "lightning.pytorch.loggers.MLFlowLogger"])
def test_logger_without_names_for_the_runs_is_refused_before_any_run(compare, trained, monkeypatch, logger):
    monkeypatch.setattr("lightning.pytorch.loggers.MLFlowLogger.__init__", lambda self, save_dir="x": None)
    with pytest.raises(ValueError, match=r"trainer.logger is .*; compare and sweep tell their runs apart by"):
        compare("--adapters", "lora", "--seeds", "1", "--trainer.logger", logger)
    assert trained == []


def test_progress_says_how_long_the_rest_will_take(compare, trained, monkeypatch, capsys):
    train_and_test, clock = lightning_modules.experiments.grid._train_and_test, [0.0]

    def slow(cli, variant, seed):
        clock[0] += {"lora": 100.0, "head_only": 20.0}[variant]
        return train_and_test(cli, variant, seed)

    monkeypatch.setattr(lightning_modules.experiments.grid, "_train_and_test", slow)
    monkeypatch.setattr(lightning_modules.experiments.grid.time, "perf_counter", lambda: clock[0])
    compare("--adapters", "lora,head_only", "--seeds", "1")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("===")]
    assert lines == ["=== 1/2: lora, seed 0 ===", "=== 2/2: head_only, seed 0, about 2 min left ==="]  # 100 s, as lora
    compare("--adapters", "lora,head_only", "--seeds", "3")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("===")]
    assert lines[:3] == ["=== 1/6: lora, seed 0 ===", "=== 2/6: head_only, seed 0 ===", "=== 3/6: lora, seed 1 ==="]
    assert lines[3] == "=== 4/6: head_only, seed 1, about 5 min left ==="  # three runs, each as long as lora's
    assert lines[5] == "=== 6/6: head_only, seed 2, about 20 s left ==="


# ---------------------------------------------------------------- fairness


def test_what_differs_beside_the_method_is_told(compare, output, trained, tmp_path):
    unfair = tmp_path / "unfair.yaml"
    unfair.write_text(
        "{trainer: {max_epochs: 1}, data: {init_args: {seed: 7}}, model: {adapter: {init_args: {targets: [q_proj]}}}}"
    )
    compare("--adapters", f"config,{unfair},lora", "--seeds", "1")
    notes = [line for line in (output / "results.md").read_text().splitlines() if line.startswith("Note")]
    assert [note.partition(" for ")[0] for note in notes[:3]] == [
        "Note: data.init_args.seed is 7",
        "Note: trainer.max_epochs is 1",
        "Note: targets are ['q_proj']",
    ]
    assert not any("lora" in note for note in notes[:3])


def test_runs_of_another_order_commit_or_version_are_told():
    runs = [
        replace(RESULT, data_order="a", commit="1", versions={"torch": "2"}),
        replace(RESULT, seed=1, data_order="b", commit="1"),
    ]
    assert (
        unfair_runs(result_frame([*runs[:1], replace(runs[0], variant="lora"), replace(runs[0], seed=1, data_order="b")])) == []
    )
    assert unfair_runs(result_frame([runs[0], replace(runs[0], variant="lora", data_order="c")])) == [
        "seed 0: the training examples came in 2 different orders"
    ]
    assert unfair_runs(result_frame([runs[0], replace(runs[0], commit=None)])) == ["the runs are of 2 commits: 1, none"]
    assert unfair_runs(result_frame(runs)) == ["the runs are of 2 versions of torch: 2, none"]


# ---------------------------------------------------------------- failures


def test_failing_run_is_reported_and_the_rest_goes_on(compare, output, trained, monkeypatch, capsys):
    train_and_test = lightning_modules.experiments.grid._train_and_test

    def some_fail(cli, variant, seed):
        if variant == "lora" and seed == 0:
            raise ValueError("a bad day")
        return train_and_test(cli, variant, seed)

    monkeypatch.setattr(lightning_modules.experiments.grid, "_train_and_test", some_fail)
    with pytest.raises(SystemExit) as stop:
        compare("--adapters", "lora,head_only", "--seeds", "2")
    assert stop.value.code == 1
    assert trained == [("head_only", 0), ("lora", 1), ("head_only", 1)]
    assert kept(output) == {"head_only/seed_0.json", "lora/seed_1.json", "head_only/seed_1.json"}
    text = (output / "results.md").read_text()
    for shown in (text, capsys.readouterr().err):
        assert "failed: lora, seed 0: ValueError: a bad day" in shown
    assert "HeadOnly" in text


def test_bug_shows_its_traceback_and_nothing_but_failures_is_no_table(compare, output, monkeypatch, capsys):
    monkeypatch.setattr(AdaptationModule, "training_step", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(SystemExit) as stop:
        compare("--adapters", "head_only", "--seeds", "1", *SHORT)
    assert stop.value.code == 1
    assert "Traceback" in capsys.readouterr().err
    assert re.fullmatch(r"failed: head_only, seed 0: RuntimeError: .*size.*\n", (output / "results.md").read_text())
    assert json.loads((output / "results.json").read_text()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--adapters", "config,had_only"), "'had_only'.*known: config, fourier_moe, .*head_only.*ablations/real_only"),
        (("--adapters", "ablations/reel_only"), "ablations/reel_only not found; known: config"),
        (("--adapters", "recipes/image_towr"), "recipes/image_towr not found; known: .*recipes/image_tower"),
        (
            ("--adapters", "lora,configs/adapters/lora.yaml"),
            "--adapters lora,configs/adapters/lora.yaml: the results of lora and configs/adapters/lora.yaml "
            "would both go to lora/; leave one out",
        ),
        (
            ("--adapters", "config,fourier_moe"),
            "--adapters config,fourier_moe: config and fourier_moe are both the config's own",
        ),
        (
            ("--adapters", "lora,head_only,lora"),
            "--adapters lora,head_only,lora: the results of lora and lora would both go to",
        ),
        (("--config", "configs/adapters/lora.yaml", "--adapters", "fourier_moe"), "fourier_moe: .*own adapter is LoRAConfig"),
        (
            ("--adapters", "lora", "--metric", "f1"),
            "lora: --metric 'f1' is not a metric of the task; known: accuracy, balanced_",
        ),
        (("--adapters", "lora", "--match-parameters", "many"), "'many' must be a positive number"),
        (("--adapters", "lora", "--match-parameters", "0%"), "'0%' must be a positive number"),
        (("--adapters", "lora", "--model.adapter.init_args.r", "65"), "lora: .*is 64 x 64: r=65 must be at most 64"),
    ],
)
@pytest.mark.usefixtures("_no_run")
def test_what_does_not_fit_is_one_message_before_any_run(compare, words, message):
    with pytest.raises(ValueError) as error:
        compare(*words)
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)
    assert user_error(error.value) is error.value


@pytest.mark.usefixtures("_no_run")
def test_problems_of_all_variants_are_told_together(compare, tmp_path, capsys):
    target, unparsed, group = tmp_path / "target.yaml", tmp_path / "unparsed.yaml", tmp_path / "group.yaml"
    target.write_text(UNKNOWN_TARGET)
    unparsed.write_text("model: {optimization: null}")
    group.write_text("model: {optimization: {backbone: {lr: 0.1}}}")
    with pytest.raises(ValueError) as error:
        compare("--adapters", f"{target},head_only,{group}")
    assert re.search(
        r"target\.yaml: targets entry 'quary' matches no module.*; .*group\.yaml: .*trains no back", str(error.value)
    )
    with pytest.raises(ValueError, match=r"nothing was run; .*unparsed\.yaml: .*optimization"):
        compare("--adapters", f"{unparsed},head_only")
    assert "usage:" not in capsys.readouterr().err


def test_metric_of_a_test_set_that_is_not_there_costs_no_run(compare, trained):
    with pytest.raises(ValueError, match=r"--metric 'cola/accuracy': lora was tested for test/accuracy"):
        compare("--adapters", "lora", "--seeds", "1", "--metric", "cola/accuracy")
    compare("--adapters", "lora", "--seeds", "1")
    assert len(trained) == 1


@pytest.mark.usefixtures("_no_run")
def test_no_seed_is_a_wrong_command_line(compare, capsys):
    with pytest.raises(SystemExit) as stop:
        compare("--adapters", "config", "--seeds", "0")
    assert stop.value.code == 2
    assert "seeds=0 must be >0" in capsys.readouterr().err


# ---------------------------------------------------------------- the table


def rows_of(results):
    frame = result_frame(results)
    labels = {name: {"method": label} for name, label in method_labels(frame).items()}
    kinds = [kind for kind in frame.attrs["kinds"] if frame[kind].any()]
    lines = format_table(frame, labels, kinds, ("seconds", "MiB")).splitlines()
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_has_mean_and_spread_of_the_last_and_of_the_best_weights():
    first = replace(RESULT, metrics={"test/accuracy": 0.5}, best_metrics={"test/accuracy": 0.7}, seconds=1.0)
    second = replace(RESULT, seed=1, metrics={"test/accuracy": 0.6}, best_metrics={"test/accuracy": 0.9}, seconds=2.0)
    first, second = replace(first, peak_memory=2 * 2**20), replace(second, peak_memory=3 * 2**20)
    header, _, row = rows_of([first, second])
    title = "test/accuracy (mean of 2)"
    assert header == ["method", title, "best on validation", "each seed", "trained", "head", "seconds", "MiB"]
    assert row == ["HeadOnly", "55.0 % ± 7.1", "80.0 % ± 14.1", "50.0 / 60.0", "650", "650", "1.5", "3"]


def test_table_shows_a_metric_that_is_no_share_as_a_number():
    first = replace(RESULT, metrics={"test/mae": 2.5}, main_metric="test/mae", not_shares=["loss", "mae"])
    row = rows_of([first, replace(first, seed=1, metrics={"test/mae": 3.5})])[2]
    assert row[1:4] == ["3 ± 0.7071", "-", "2.5 / 3.5"]


def test_table_names_the_overlay_where_a_method_comes_twice_and_leaves_out_a_best_that_not_all_have():
    best = replace(RESULT, best_metrics={"test/accuracy": 0.7})
    path = Path("elsewhere/other.yaml")
    lora = replace(RESULT, method="LoRA", variant="lora", parameters={**PARAMETERS, "adapter": 8192})
    rows = rows_of([best, replace(RESULT, seed=1), replace(best, variant=str(path)), lora])[2:]
    assert [row[0] for row in rows] == ["HeadOnly (head_only)", f"HeadOnly ({path})", "LoRA"]
    assert [row[2] for row in rows] == ["-", "70.0 %", "-"]
    assert [row[5:7] for row in rows] == [["650", "0"], ["650", "0"], ["650", "8,192"]]
