"""sweep: the settings of every study, what does not fit, going on, and table, CSV file and plot."""

import csv
import re
from dataclasses import replace

import pytest
import yaml
from support import REPOSITORY
from support.commands import DEMO

import lightning_modules.experiments.grid
import lightning_modules.experiments.plots
from fourier_moe import FourierMoEConfig
from lightning_modules.experiments.plots import plot_study
from lightning_modules.experiments.report import publish
from lightning_modules.experiments.results import Result
from lightning_modules.experiments.studies.option import split_values
from lightning_modules.experiments.studies.paper import ABLATIONS, STUDIES, choose_settings
from lightning_modules.experiments.studies.study import Setting, study_frame, study_table

OWN = FourierMoEConfig(targets=["q_proj"], num_coefficients=512, num_experts=8, top_k=2)
OVERLAYS = sorted((REPOSITORY / ABLATIONS).glob("*.yaml"))
PARAMETERS = {"experts": 4096, "router": 4096, "head": 650, "backbone": 0}
RESULT = Result("FourierMoE", "full", 0, "test/accuracy", {"test/accuracy": 0.5}, PARAMETERS, 2.0)
RATE, LORA = "model.optimization.experts.lr", "configs/adapters/lora.yaml"
ROUTER = {"router/load_imbalance": 1.5, "router/dead_experts": 0.125}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "swept"


@pytest.fixture
def sweep(main, output):
    return lambda study, *words: main("sweep", study, *DEMO, "--output", str(output), *words)


@pytest.fixture
def trained(monkeypatch):
    """(name, seed, adapter) of every run that would have been trained; a run's accuracy counts them."""
    runs = []

    def train_and_test(cli, variant, seed):
        runs.append((variant, seed, cli.model.adapter))
        metrics = {"test/accuracy": 0.5 + len(runs) / 100, "test/loss": len(runs)}
        if isinstance(cli.model.adapter, FourierMoEConfig):
            return replace(RESULT, variant=variant, seed=seed, metrics=metrics, router=ROUTER), {}
        parameters = {"experts": 0, "router": 0, "adapter": 4096, "head": 650}
        return replace(RESULT, variant=variant, seed=seed, metrics=metrics, parameters=parameters), {}

    monkeypatch.setattr(lightning_modules.experiments.grid, "_train_and_test", train_and_test)
    monkeypatch.setattr(lightning_modules.experiments.plots, "plot_study", lambda *_: None)  # slower than all the rest
    return runs


def anything(adapter):
    """A model with room for every adapter."""


def labels(study, values=None, own=OWN):
    return [setting.label for setting in choose_settings(STUDIES[study], values, own, anything)[0]]


def table_of(output):
    lines = [line for line in (output / "results.md").read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


# ---------------------------------------------------------------- settings


def test_default_values_are_the_papers_or_lie_around_the_configs_own():
    assert labels("coefficients") == ["64", "128", "256", "512", "1024", "2048"]
    assert labels("experts") == ["2", "4", "8", "16", "32"]
    assert labels("active_experts") == ["1", "2", "4", "8"]
    assert labels("balance_weight") == ["0", "0.001", "0.005", "0.01", "0.05", "0.1"]
    assert labels("active_experts", own=replace(OWN, num_coefficients=480, num_experts=6, top_k=3)) == ["1", "2", "3", "4", "6"]
    assert labels("balance_weight", own=replace(OWN, balance_weight=0.0035))[2] == "0.0035"


@pytest.mark.parametrize("n", [1008, 3008, 8192])
def test_default_coefficients_fit_the_papers_recipes(n):
    own = replace(OWN, num_coefficients=n)
    settings, left_out = choose_settings(STUDIES["coefficients"], None, own, anything)
    assert left_out == []
    assert own in [setting.adapter(own) for setting in settings]
    assert len(settings) == 6


def test_unequal_experts_have_values_that_fit_in_every_study_that_keeps_their_number():
    own = replace(OWN, num_coefficients=60, num_experts=4, densities=[2, 1, 1, 1], bandwidth=[0.2, 0.1, 0.1, 0.1])
    assert labels("coefficients", own=own) == ["10", "20", "30", "60", "120", "240"]
    assert labels("bandwidth", own=own) == [label for value in (0.06, 0.12, 0.24, 0.48, 0.96) for label in [f"{value}"] * 2]
    assert choose_settings(STUDIES["active_experts"], None, own, anything)[1] == []


def test_experts_share_the_same_number_of_coefficients_as_nearly_as_they_can():
    own = replace(OWN, num_coefficients=1008)
    settings, _ = choose_settings(STUDIES["experts"], ["2", "8", "16", "7"], own, anything)
    assert [setting.adapter(own).num_coefficients for setting in settings] == [1008, 1008, 1024, 1008]
    tiny = replace(OWN, num_coefficients=16)
    assert STUDIES["experts"].settings("32", tiny)[0].adapter(tiny).num_coefficients == 64  # one pair each at least


def test_bandwidth_is_swept_in_both_layouts():
    settings, _ = choose_settings(STUDIES["bandwidth"], ["0.12", "0.5"], OWN, anything)
    assert [(setting.series, setting.adapter(OWN).bandwidth, setting.adapter(OWN).band_layout) for setting in settings] == [
        ("cover", 0.12, "cover"),
        ("stack", 0.12, "stack"),
        ("cover", 0.5, "cover"),
        ("stack", 0.5, "stack"),
    ]
    assert len({setting.name for setting in settings}) == 4


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.usefixtures("main")
def test_words_make_the_change_and_no_other(study):
    from lightning_modules.cli import AdaptationCLI

    base = AdaptationCLI([*DEMO], run=False).model.adapter
    settings, _ = choose_settings(STUDIES[study], None, base, anything)
    assert [setting.adapter(base) for setting in settings].count(base) == 1
    changed = [setting for setting in settings if setting.adapter(base) != base][-1]
    assert AdaptationCLI([*DEMO, *changed.words], run=False).model.adapter == changed.adapter(base)


@pytest.mark.parametrize("path", OVERLAYS, ids=[path.stem for path in OVERLAYS])
def test_ablation_overlay_changes_one_field(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    (fields,) = (content.pop("model")["adapter"].pop("init_args"),)
    assert content == {}
    ((name, value),) = fields.items()
    assert getattr(OWN, name) != value
    assert getattr(replace(OWN, **fields), name) == value


def test_ablations_are_those_of_figure_3_and_the_two_controls(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    settings, left_out = choose_settings(STUDIES["ablations"], None, OWN, anything)
    changes = [dict(setting.fields) for setting in settings]
    assert changes[0] == {}
    assert sorted(map(str, changes[1:])) == [
        "{'coefficients': 'imaginary'}",
        "{'coefficients': 'real'}",
        "{'conjugate_symmetry': False}",
        "{'frequency_bias': False}",
        "{'permute': True}",
        "{'top_k': 8}",
    ]
    assert left_out == []


# ---------------------------------------------------------------- what does not fit


def test_default_that_does_not_fit_is_left_out_and_said():
    settings, left_out = choose_settings(STUDIES["experts"], None, replace(OWN, top_k=4), anything)
    assert [setting.label for setting in settings] == ["4", "8", "16", "32"]
    assert left_out == ["experts 2: FourierMoEConfig: top_k=4 must be between 1 and num_experts=2"]


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
def test_no_value_fits():
    def refuse(adapter):
        raise ValueError("too small a model")

    with pytest.raises(ValueError, match=r"no value of the study fits this config, give --values: .*too small a model"):
        choose_settings(STUDIES["active_experts"], None, OWN, refuse)


@pytest.mark.usefixtures("_no_run")
def test_wrong_command_line(sweep, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep("experts", "--seeds", "0")
    assert stop.value.code == 2
    assert "seeds=0 must be >0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lambda",), r"sweep lambda: no such study; known: coefficients, .*, and arguments of fit with a dot"),
        ((RATE,), r"sweep model.optimization.experts.lr: give --values"),
        ((RATE, "--values", "0.1,0.1"), r"--values 0.1,0.1: values must differ"),
        (("model.optimization.expert.lr", "--values", "0.1"), r"expert.lr_0.1: .*expert"),
        ((RATE, "--values", "0.1,fast"), r"nothing was run; experts.lr_fast: .*fast"),
        ((RATE, "--values", "0.05,0.1,5e-2"), r"experts.lr_0.05 and experts.lr_5e-2 are the same run"),
        ((RATE, "--values", "-1e-3,0.1"), r"experts.lr_-1e-3: .*lr=-0.001"),
        (("trainer.logger.init_args.name", "--values", "a,b"), r"logger.name_a and logger.name_b are the same run"),
        (
            (RATE, "--values", "0.1", "--metric", "bleu"),
            r"--metric 'bleu' is not a metric of the task; known: accuracy, .*loss",
        ),
        ((RATE, "--values", "0.1", "--metric", "test/loss"), r"--metric 'test/loss' is not a metric"),
        (("experts", "--metric", "bleu"), r"--metric 'bleu' is not a metric"),
        (("model.adapter.init_args.num_coefficients", "--values", "512,100"), r"adapter.num_coefficients_100: .*nearest valid"),
        (("model.adapter.init_args.r", "--values", "2,4000", "--config", LORA), r"adapter.r_4000: .*r=4000"),
    ],
)
@pytest.mark.usefixtures("_no_run")
def test_option_or_value_that_does_not_fit_is_refused_before_any_run(sweep, words, message):
    with pytest.raises(ValueError, match=message) as error:
        sweep(*words)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- runs


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


def test_any_argument_of_fit_with_any_method(sweep, trained, output):
    sweep("model.adapter.init_args.r", "--values", "4,8", "--seeds", "2", "--config", LORA, "--metric", "loss")
    assert [(name, seed, adapter.r) for name, seed, adapter in trained] == [
        (f"adapter.r_{r}", seed, r) for seed in (0, 1) for r in (4, 8)
    ]
    rows = {row["model.adapter.init_args.r"]: row for row in table_of(output)}
    assert [row["test/loss (mean of 2)"] for row in rows.values()] == ["2 ± 1.414", "3 ± 1.414"]
    assert rows["4"]["against 8"] == "-1 ± 0"  # 8 is the overlay's own
    assert rows["4"]["adapter"] == "4,096"
    assert "load imbalance" not in rows["4"]


def test_config_as_it_is_is_known_however_its_value_is_written(sweep, trained, output):
    sweep(RATE, "--values", "5.0E-2,0.1", "--seeds", "1")
    assert [setting["against 5.0E-2"] for setting in table_of(output)] == ["-", "+1.0"]


def test_values_with_commas_slashes_and_brackets(sweep, trained, tmp_path, capsys):
    sweep("model.adapter.init_args.targets", "--values", "[q_proj],[q_proj,v_proj]", "--seeds", "1")
    assert [(name, adapter.targets) for name, _, adapter in trained] == [
        ("adapter.targets_q_proj", ("q_proj",)),
        ("adapter.targets_q_proj-v_proj", ("q_proj", "v_proj")),
    ]
    trained.clear()
    sweep("trainer.default_root_dir", "--values", "a/runs,b/runs", "--seeds", "1")
    assert [name for name, *_ in trained] == ["trainer.default_root_dir_a-runs", "trainer.default_root_dir_b-runs"]
    assert split_values([True, None, [1, 2], "a", 0.5]) == ["true", "null", "[1, 2]", "a", "0.5"]


def test_config_need_not_parse_without_the_value(sweep, trained):
    words = ("--seeds", "1", "--model.adapter.init_args.num_coefficients", "100")
    sweep("model.adapter.init_args.num_coefficients", "--values", "512", *words)
    assert [name for name, *_ in trained] == ["adapter.num_coefficients_512"]


def test_each_list_of_configs_has_a_directory_of_its_own(main, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--values", "0.1", "--seeds", "1", "--config", str(REPOSITORY / "configs/demo.yaml"))
    main("sweep", "model.optimization.head.lr", *words, "--config", str(REPOSITORY / LORA))
    assert (tmp_path / "runs/sweep/demo+lora/model.optimization.head.lr/results.md").is_file()


def test_values_that_are_no_numbers_have_a_row_each(sweep, trained, output, monkeypatch):
    studies = []
    monkeypatch.setattr(lightning_modules.experiments.plots, "plot_study", lambda path, study, *_: studies.append(study))
    sweep("model.optimization.schedule", "--values", "cosine,constant", "--seeds", "1")
    assert [row["model.optimization.schedule"] for row in table_of(output)] == ["cosine", "constant"]
    sweep(RATE, "--values", "1e-2,5e-3", "--seeds", "1")
    assert [study.numeric for study in studies] == [False, True]


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


# ---------------------------------------------------------------- table, CSV file and plot


def row(label, accuracies, series="", **changes):
    """A setting and its runs, which have these accuracies."""
    name = f"name_{label}{series}"
    runs = [replace(RESULT, variant=name, seed=s, metrics={"test/accuracy": a}, **changes) for s, a in enumerate(accuracies)]
    return Setting(name, label, series=series), runs


def frame(study, rows):
    return study_frame(study, [setting for setting, _ in rows], [run for _, runs in rows for run in runs])


def table(study, rows, own=None):
    return study_table(STUDIES[study], [setting for setting, _ in rows], frame(study, rows), own)


def test_differences_are_taken_seed_by_seed():
    text = table("experts", [row("4", [0.40, 0.60]), row("8", [0.45, 0.66])], "name_8")
    assert "| 4 " in text
    assert "50.0 % ± 14.1" in text
    assert "-5.5 ± 0.7" in text  # of -5 and -6, whatever the seeds have in common


@pytest.mark.parametrize(("second", "expected"), [([0.5, 0.6], "(mean of 2)"), ([0.5], "(mean of 1 to 2)")])
def test_header_says_over_how_many_seeds_the_means_are(second, expected):
    assert expected in table("experts", [row("4", [0.4, 0.6]), row("8", second)]).splitlines()[0]


def test_unknown_load_and_best_are_dashes_and_loads_that_no_run_has_are_left_out():
    _, _, *lines = table("experts", [row("4", [0.4]), row("8", [0.4], router=ROUTER)]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["4", "40.0 %", "-", "40.0", "8,842", "4,096", "-", "-", "2.0"]
    assert rows[1][6:8] == ["1.50", "0.12"]
    assert "load imbalance" not in table("experts", [row("4", [0.4])])


def test_csv_has_a_line_per_run(tmp_path):
    best = {"best_metrics": {"test/accuracy": 0.75}, "router": ROUTER}
    runs = frame("bandwidth", [row("0.12", [0.5, 0.6], "cover", **best), row("0.24", [0.7], "stack")])
    publish(tmp_path, [], [], runs, lambda path: None, [])
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    names = ("study", "series", "value", "seed", "metric", "last", "best", "experts", "load_imbalance", "dead_experts")
    assert [tuple(line[name] for name in names) for line in lines] == [
        ("bandwidth", "cover", "0.12", "0", "test/accuracy", "0.5", "0.75", "4096", "1.5", "0.125"),
        ("bandwidth", "cover", "0.12", "1", "test/accuracy", "0.6", "0.75", "4096", "1.5", "0.125"),
        ("bandwidth", "stack", "0.24", "0", "test/accuracy", "0.7", "", "4096", "", ""),
    ]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """plot_study, and the two axes that it drew."""
    from matplotlib.figure import Figure

    def draw(study, rows, own=None):
        figures = []
        savefig = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw)))
        plot_study(tmp_path / "plot.png", STUDIES[study], frame(study, rows), own)
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        return figures[0].axes

    return draw


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_plot_orders_values_by_size_and_shows_the_load_where_all_train_as_much(drawn):
    rows = [row("0.1", [0.7, 0.8], router=ROUTER), row("0", [0.5, 0.6], router=ROUTER), row("0.01", [0.6], router=ROUTER)]
    left, right = drawn("balance_weight", rows, "name_0.1")
    assert ticks(left.xaxis) == ["0", "0.01", "0.1"]
    assert left.lines[0].get_ydata() == pytest.approx([55, 60, 75])
    assert right.get_ylabel() == "load imbalance (1: even)"
    assert right.lines[0].get_ydata() == pytest.approx([1.5] * 3)


def test_plot_shows_the_trained_parameters_where_they_differ(drawn):
    rows = [row("16", [0.5], parameters={**PARAMETERS, "experts": 16}), row("4", [0.5])]
    _, right = drawn("coefficients", rows)
    assert right.get_ylabel() == "trained parameters"
    assert right.lines[0].get_ydata() == pytest.approx([8842, 4096 + 650 + 16])


def test_plot_leaves_out_a_load_that_was_not_logged(drawn):
    _, right = drawn("balance_weight", [row("0", [0.5]), row("0.1", [0.7], router=ROUTER)])
    assert right.lines[0].get_xdata() == pytest.approx([1])
    assert right.lines[0].get_ydata() == pytest.approx([1.5])


def test_plot_shows_the_seconds_where_nothing_else_differs(drawn):
    _, right = drawn("balance_weight", [row("0", [0.5]), row("0.1", [0.7], seconds=4.0)])
    assert right.get_ylabel() == "seconds of training"
    assert right.lines[0].get_ydata() == pytest.approx([2.0, 4.0])


def test_plot_has_a_line_per_layout_and_a_missing_value_leaves_a_gap_in_its_own_only(drawn):
    rows = [row("0.12", [0.5], "cover"), row("0.12", [0.6], "stack"), row("0.24", [0.7], "cover")]
    left, _ = drawn("bandwidth", rows)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["cover", "stack"]
    assert [container.lines[0].get_ydata().tolist() for container in left.containers] == [[50, 70], [60]]


def test_ablations_have_a_row_each(drawn):
    left, _ = drawn("ablations", [row("full", [0.5, 0.6]), row("real only", [0.4, 0.5])], "name_full")
    assert ticks(left.yaxis) == ["full", "real only"]
    assert [container.lines[0].get_xdata()[0] for container in left.containers] == pytest.approx([55, 45])
