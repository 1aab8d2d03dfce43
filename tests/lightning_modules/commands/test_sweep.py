"""sweep over a study of the paper: what does not fit, going on, failures."""

import re
from dataclasses import replace

import pytest
from support.sweeps import RESULT, table_of

import lightning_modules.experiments.grid


def test_bands_beyond_the_plane_are_left_out_before_any_run(sweep, trained, output, capsys):
    sweep("bandwidth", "--values", "0.12,0.24", "--seeds", "1", "--model.adapter.init_args.num_coefficients", "128")
    assert [name for name, *_ in trained] == ["bandwidth_0.12_cover", "bandwidth_0.12_stack", "bandwidth_0.24_cover"]
    expected = r"left out: bandwidth 0\.24 \(stack\): .*_proj: num_coefficients asks for 8 .* bandwidth=0\.24 holds only 0 in"
    for text in (capsys.readouterr().out, (output / "results.md").read_text()):
        assert re.search(expected, text)
    assert [row["layout"] for row in table_of(output)] == ["cover", "stack", "cover"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("coefficients", "--values", "512,100"), r"--values '100' .*num_coefficients=100 must .* nearest valid: 96 or 112"),
        (("coefficients", "--values", "40000"), r"--values '40000' does not fit .*only|multiple"),
        (("coefficients", "--values", "65536"), r"--values '65536' does not fit coefficients .*_proj: .* holds only|has only"),
        (("experts", "--values", "0"), r"num_experts=0 must be at least 1"),
        (("experts", "--values", "1"), r"top_k=2 must be between 1 and num_experts=1"),
        (("active_experts", "--values", "9"), r"top_k=9 must be between 1 and num_experts=8"),
        (("active_experts", "--values", "two"), r"active experts: 'two' is not a whole number"),
        (("active_experts", "--values", ""), r"active experts: '' is not a whole number"),
        (("balance_weight", "--values", "-1"), r"balance_weight=-1.0 must be 0 or more"),
        (("balance_weight", "--values", "nan"), r"balance_weight=nan must be 0 or more"),
        (("bandwidth", "--values", "wide"), r"bandwidth: 'wide' is not a number"),
        (
            ("bandwidth", "--model.adapter.init_args.frequency_bias", "false"),
            r"bandwidth has no effect with frequency_bias=False",
        ),
        (
            ("experts", "--model.adapter.init_args.bandwidth", "[0.2,0.1,0.1,0.1,0.1,0.1,0.1,0.1]"),
            r"densities=None and bandwidth=\(0.2, .*\) are for num_experts=8, .* set densities to null and bandwidth to",
        ),
        (
            ("ablations", "--values", "a/x.yaml,b/x.yaml"),
            r"--values a/x.yaml,b/x.yaml: the results of a/x.yaml and b/x.yaml would both go to x/",
        ),
        (("ablations", "--values", "reel"), r"variant: 'reel' is not one of full, all_experts_active, .*real_only"),
        (("ablations", "--config", "configs/adapters/lora.yaml"), r"the config's adapter is LoRAConfig"),
    ],
)
@pytest.mark.usefixtures("_no_run")
def test_what_does_not_fit_is_refused_before_any_run(sweep, words, message):
    with pytest.raises(ValueError) as error:
        sweep(*words)
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("_no_run")
def test_wrong_command_line(sweep, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep("experts", "--seeds", "0")
    assert stop.value.code == 2
    assert "seeds=0 must be >0" in capsys.readouterr().err


@pytest.mark.slow
def test_real_runs_with_their_load(sweep, output):
    short = ("--trainer.max_steps", "4", "--trainer.log_every_n_steps", "2", "--trainer.limit_test_batches", "2")
    results = sweep("active_experts", "--values", "8,2", "--seeds", "1", *short)
    assert [result.variant for result in results] == ["active_experts_8", "active_experts_2"]
    rows = {row["active experts"]: row for row in table_of(output)}
    assert rows["8"]["load imbalance"] == "1.00"  # all experts serve every token
    assert rows["8"]["dead experts"] == "0.00"
    assert float(rows["2"]["load imbalance"]) > 1
    assert rows["2"]["against 2"] == "-"
    assert rows["2"]["trained"] == "8,842"
    assert {path.name for path in output.glob("*.*")} == {"results.md", "results.json", "results.csv", "plot.png"}
    assert len(list(output.glob("*/seed_0/version_0/router_load.csv"))) == 2


def test_same_command_goes_on_and_more_seeds_and_values_are_added(sweep, trained):
    sweep("balance_weight", "--values", "0", "--seeds", "1")
    sweep("balance_weight", "--values", "0,0.1", "--seeds", "2")
    pairs = [(name, seed, adapter.balance_weight) for name, seed, adapter in trained]
    assert pairs == [(f"balance_weight_{value:g}", seed, value) for value, seed in ((0, 0), (0.1, 0), (0, 1), (0.1, 1))]
    assert [adapter.seed for _, seed, adapter in trained] == [seed for _, seed, _ in trained]  # other positions too


def test_ablation_wins_over_the_command_line_and_a_path_will_do(sweep, trained, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {adapter: {init_args: {top_k: 3}}}")
    words = ("--values", f"full,all_experts_active,{path}", "--seeds", "1", "--model.adapter.init_args.top_k", "1")
    sweep("ablations", *words)
    assert [(name, adapter.top_k) for name, _, adapter in trained] == [("full", 1), ("all_experts_active", 8), ("mine", 3)]


def test_configured_router_load_is_not_doubled(sweep, monkeypatch, tmp_path):
    from lightning_modules.callbacks import RouterLoad

    counts = []

    def count(cli, variant, seed):
        counts.append(sum(isinstance(callback, RouterLoad) for callback in cli.trainer.callbacks))
        return replace(RESULT, variant=variant, seed=seed), {}

    monkeypatch.setattr(lightning_modules.experiments.grid, "_train_and_test", count)
    own = tmp_path / "load.yaml"
    own.write_text("trainer: {callbacks: [{class_path: lightning_modules.callbacks.RouterLoad}]}")
    sweep("active_experts", "--values", "2", "--seeds", "1")
    sweep("active_experts", "--values", "2", "--seeds", "1", "--config", str(own))
    assert counts == [1, 1]


def test_failing_run_is_reported_and_the_rest_goes_on(sweep, trained, output, monkeypatch):
    train_and_test = lightning_modules.experiments.grid._train_and_test

    def some_fail(cli, variant, seed):
        if variant == "active_experts_2" and seed == 1:
            raise ValueError("a bad day")
        return train_and_test(cli, variant, seed)

    monkeypatch.setattr(lightning_modules.experiments.grid, "_train_and_test", some_fail)
    with pytest.raises(SystemExit) as stop:
        sweep("active_experts", "--values", "1,2", "--seeds", "2")
    assert stop.value.code == 1
    assert "failed: active_experts_2, seed 1: ValueError: a bad day" in (output / "results.md").read_text()
    rows = {row["active experts"]: row for row in table_of(output)}
    assert rows["1"]["each seed"] == "51.0 / 53.0"
    assert rows["2"]["each seed"] == "52.0"
    assert rows["1"]["against 2"] == "-1.0"  # of the one seed that both have


def test_nothing_but_failures_leaves_no_table(sweep, output, monkeypatch):
    def fail(*_):
        raise ValueError("a bad day")

    monkeypatch.setattr(lightning_modules.experiments.grid, "_train_and_test", fail)
    with pytest.raises(SystemExit):
        sweep("active_experts", "--values", "2", "--seeds", "1")
    assert "failed: active_experts_2, seed 0: ValueError: a bad day" in (output / "results.md").read_text()
    assert not (output / "plot.png").exists()
