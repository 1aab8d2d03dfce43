"""sweep over any argument of fit, with any method."""

import pytest
from support import REPOSITORY
from support.sweeps import table_of

import lightning_modules.experiments.plots
from lightning_modules.experiments.studies.option import split_values

RATE, LORA = "model.optimization.experts.lr", "configs/adapters/lora.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lambda",), r"sweep lambda: no such study; known: coefficients, .*, and arguments of fit with a dot"),
        ((RATE,), r"sweep model.optimization.experts.lr: give --values"),
        ((RATE, "--values", "0.1,0.1"), r"--values 0.1,0.1: the results of experts.lr_0.1 and experts.lr_0.1 would both go to"),
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
