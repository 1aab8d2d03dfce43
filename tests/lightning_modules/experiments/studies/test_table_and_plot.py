"""Table, CSV file and picture of a study."""

import csv
from dataclasses import replace

import pytest
from support.sweeps import PARAMETERS, RESULT, ROUTER

from lightning_modules.experiments.plots import plot_study
from lightning_modules.experiments.report import publish
from lightning_modules.experiments.studies.paper import STUDIES
from lightning_modules.experiments.studies.study import Setting, study_frame, study_table


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
    left, right = drawn("bandwidth", rows)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["cover", "stack"]
    assert [container.lines[0].get_ydata().tolist() for container in left.containers] == [[50, 70], [60]]
    assert right.get_ylabel() == "seconds of training"  # no load was logged


def test_ablations_have_a_row_each(drawn):
    left, _ = drawn("ablations", [row("full", [0.5, 0.6]), row("real only", [0.4, 0.5])], "name_full")
    assert ticks(left.yaxis) == ["full", "real only"]
    assert [container.lines[0].get_xdata()[0] for container in left.containers] == pytest.approx([55, 45])
