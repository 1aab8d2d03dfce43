"""SpectralSensitivity and analyze: tasks, passes, files, the verdict, and what they refuse."""

import csv
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support.token_task import ADAPTER, TokenData, token_batch, token_module, token_trainer
from torch import nn
from torch.utils.data import DataLoader

from fourier_moe import HeadOnly, adapters, inject
from fourier_moe.analysis.sensitivity import measure
from lightning_modules.callbacks.sensitivity.sensitivity_report import (
    FROZEN,
    GRADIENT,
    MEAN,
    UPDATE,
    SensitivityReport,
    gradient_of,
)
from lightning_modules.callbacks.sensitivity.spectral_sensitivity import SpectralSensitivity, group_by_memory, split_by_task

DEMO = ("analyze", "--config", "configs/demo.yaml")
SMOKE = ("--batches", "2", "--permutations", "3", "--data.batch_size", "8", "--trainer.accelerator", "cpu")
TASKS = ["cola", "rte", "cola", "cola", "rte", "cola", "rte", "cola"]


class TaskData(TokenData):
    """Two tasks in every batch but the last, which has one."""

    def _loader(self, *seeds):
        batches = [token_batch(seed=seed) | {"task": TASKS} for seed in seeds[:-1]]
        return DataLoader([*batches, token_batch(seed=seeds[-1]) | {"task": ["rte"] * 8}], batch_size=None)


def measured(directory, data=None, module=None, **options):
    module = module or token_module()
    callback = SpectralSensitivity(permutations=3, stop=True, directory=str(directory / "sensitivity"), **options)
    token_trainer(directory, callback).fit(module, data or TokenData())
    return callback.report, module


def brute_force(module, batches):
    """Gradient of the sum of the examples' losses with respect to the frozen weights, by name."""
    module.eval()
    weights = {name: adapter.base.weight.requires_grad_(True) for name, adapter in adapters(module.model).items()}
    losses = [len(batch["id"]) * module.task.loss(batch) for batch in batches]
    return dict(zip(weights, torch.autograd.grad(sum(losses), list(weights.values())), strict=True))


def same(sensitivity, matrix):
    expected = measure(matrix, strongest=ADAPTER.num_coefficients, permutations=3)
    for one, other in zip((sensitivity.spectrum, *sensitivity.controls), (expected.spectrum, *expected.controls), strict=True):
        torch.testing.assert_close(one.energy, other.energy, rtol=1e-4, atol=1e-5)
        assert one.strongest_share == pytest.approx(other.strongest_share, rel=1e-4)


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("memory_gib", [4.0, 1e-9])
def test_gradient_of_each_task_and_of_all_is_exact_in_one_pass_or_in_several(tmp_path, memory_gib):
    report, module = measured(tmp_path, TaskData(), memory_gib=memory_gib)
    batches = list(TaskData().train_dataloader())
    together = brute_force(module, batches)
    assert list(together) == ["q_proj", "v_proj"]
    sources = [GRADIENT, gradient_of("cola"), gradient_of("rte"), FROZEN]
    assert {source for source, _ in report.results} == set(sources)
    for task in ("cola", "rte"):
        parts = [split_by_task(batch)[task] for batch in batches if task in batch["task"]]
        for name, matrix in brute_force(module, parts).items():
            same(report.results[gradient_of(task), name], matrix)
    for name, matrix in together.items():
        same(report.results[GRADIENT, name], matrix)
        same(report.results[FROZEN, name], module.model.get_submodule(name).base.weight.detach())


def test_without_tasks_there_is_one_gradient_and_the_number_of_batches_counts(tmp_path):
    report, module = measured(tmp_path, num_batches=2)
    assert [source for source, _ in report.results] == [GRADIENT, GRADIENT, FROZEN, FROZEN]
    for name, matrix in brute_force(module, list(TokenData().train_dataloader())[:2]).items():
        same(report.results[GRADIENT, name], matrix)


def test_split_by_task_keeps_rows_together():
    batch = token_batch() | {"task": TASKS, "note": "of the batch"}
    parts = split_by_task(batch)
    assert list(parts) == ["cola", "rte"]
    assert parts["rte"]["id"] == ["row 1", "row 4", "row 6"]
    assert torch.equal(parts["rte"]["tokens"], batch["tokens"][[1, 4, 6]])
    assert parts["rte"]["task"] == ["rte"] * 3
    assert parts["rte"]["note"] == "of the batch"
    assert split_by_task(token_batch())[""].keys() == token_batch().keys()


def test_groups_fit_in_memory_and_leave_nothing_out():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    inject(model, replace(ADAPTER, targets=[str(i) for i in range(5)]))
    names = [list(group) for group in group_by_memory(adapters(model), 2.5 * 4 * 16 * 16)]
    assert names == [["0", "1"], ["2", "3"], ["4"]]
    assert [list(group) for group in group_by_memory(adapters(model), 1)] == [["0"], ["1"], ["2"], ["3"], ["4"]]


@pytest.mark.parametrize(("suffix", "fused"), [(".ckpt", True), (".safetensors", False)])
def test_update_of_full_fine_tuning_is_measured(tmp_path, suffix, fused):
    _, module = measured(tmp_path)
    frozen = {name: adapter.base.weight.detach() for name, adapter in adapters(module.model).items()}
    updates = {name: torch.randn(16, 16) for name in frozen}
    full = {name: frozen[name] + updates[name] for name in frozen}
    if fused:
        state = {".in_proj_weight": torch.cat([full["q_proj"], torch.zeros(16, 16), full["v_proj"]])}
    else:
        state = {f"{name}.weight": weight for name, weight in full.items()}
    path = tmp_path / f"full{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": {f"task.model.{key}": value for key, value in state.items()}}, path)
    else:
        save_file(state, path)
    report, _ = measured(tmp_path, full_weights=str(path))
    for name, update in updates.items():
        same(report.results[UPDATE, name], update)


def test_training_is_the_same_with_the_callback(tmp_path):
    results = []
    for callbacks in ([], [SpectralSensitivity(permutations=2)]):
        torch.manual_seed(0)
        module = token_module()
        trainer = token_trainer(tmp_path, *callbacks)
        trainer.fit(module, TokenData())
        assert trainer.global_step == 3
        results.append({name: parameter.detach().clone() for name, parameter in module.named_parameters()})
    assert (tmp_path / "sensitivity/report.txt").is_file()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


# ---------------------------------------------------------------- what is written


def test_files_hold_every_layer_and_their_mean(tmp_path):
    report, _ = measured(tmp_path, TaskData())
    directory = tmp_path / "sensitivity"
    rows = list(csv.DictReader((directory / "layers.csv").open()))
    assert [row["layer"] for row in rows] == ["q_proj", "v_proj", MEAN] * 4
    first = report.results[GRADIENT, "q_proj"]
    assert float(rows[0]["mean_radius"]) == first.spectrum.mean_radius
    assert float(rows[0]["strongest_share/permuted"]) == first.control("strongest_share")[0]
    curve = [row for row in csv.DictReader((directory / "spectra.csv").open()) if row["layer"] == "q_proj"]
    own = [float(row["density"]) for row in curve if row["source"] == GRADIENT]
    filled = first.spectrum.positions > 0
    assert own == pytest.approx(first.spectrum.density[filled].tolist(), rel=1e-4)
    assert (directory / "report.txt").read_text() == f"{report}\n"
    assert (directory / "spectra.png").stat().st_size > 1000


def matrices(low_frequencies):
    """Two 96 x 80 matrices: white noise, or noise that is smooth along both axes."""
    for seed in range(2):
        matrix = torch.randn(96, 80, generator=torch.Generator().manual_seed(seed))
        if low_frequencies:
            for axis in (0, 1):
                matrix = sum(matrix.roll(shift, axis) for shift in range(6))
        yield matrix


def report_of(low_frequencies, config):
    results = {(GRADIENT, f"layer {i}"): measure(m, strongest=64) for i, m in enumerate(matrices(low_frequencies))}
    return SensitivityReport(results, config)


def test_white_spectrum_is_said_to_be_white():
    report = report_of(False, ADAPTER)
    assert not report.structured
    text = str(report)
    assert "The spectrum is white" in text


def test_low_frequencies_are_a_structure():
    config = replace(ADAPTER, targets=["0"], num_coefficients=320)
    report = report_of(True, config)
    assert report.structured
    text = str(report)
    assert "The gradient has a frequency structure" in text
    assert "On their own 2 of 2 layers" in text


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_batches": 0}, "num_batches=0 must be at least 1"),
        ({"permutations": 1}, "permutations=1 must be at least 2"),
        ({"num_bins": 1}, "num_bins=1 must be at least 2"),
        ({"memory_gib": 0.0}, "memory_gib=0.0 must be positive"),
        ({"full_weights": "nowhere.ckpt"}, "full_weights='nowhere.ckpt' does not exist"),
    ],
)
def test_impossible_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralSensitivity(**options)


def test_adapter_without_projections_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.AdaptationModule.configure_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="needs a FourierMoEConfig adapter, got HeadOnly"):
        measured(tmp_path, module=token_module(adapter=HeadOnly()))


def test_weights_of_another_model_or_not_trained_are_refused(tmp_path):
    _, module = measured(tmp_path)
    frozen = {f"{name}.weight": adapter.base.weight.detach() for name, adapter in adapters(module.model).items()}
    other = {key: torch.zeros(3, 3) for key in frozen}
    for state, message in (
        (frozen, "weight of q_proj is unchanged"),
        (other, r"weight of q_proj is \(3, 3\), not \(16, 16\)"),
        ({"head.weight": torch.zeros(2)}, "has no q_proj.weight"),
    ):
        save_file(state, tmp_path / "full.safetensors")
        with pytest.raises(ValueError, match=message):
            measured(tmp_path, full_weights=str(tmp_path / "full.safetensors"))


# ---------------------------------------------------------------- the command


def test_analyze_prints_table_and_verdict_and_trains_nothing(main, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_modules.AdaptationModule.training_step", lambda *_: pytest.fail("training began"))
    output = tmp_path / "analysis"
    report = main(*DEMO, *SMOKE, "--output", str(output), "--trainer.min_epochs", "1", "--trainer.min_steps", "1")
    assert len(report.results) == 2 * 8
    shown = capsys.readouterr().out
    assert str(report) in shown
    assert f"Written to {output}" in shown
    names = {"layers.csv", "spectra.csv", "report.txt", "spectra.png"}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == names  # no checkpoint, no log


def test_analyze_needs_a_config(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main("analyze")
    assert stop.value.code == 2
    assert "--config" in capsys.readouterr().err
