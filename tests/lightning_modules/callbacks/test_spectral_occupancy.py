"""SpectralOccupancy: what is logged, drawn and written."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from support.clock import Clock
from support.models import randomize
from support.token_task import ADAPTER, RATES, TokenData, token_batch, token_module, token_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from fourier_moe import ExpertSpectra, FourierMoEConfig, HeadOnly, SpectralExperts, adapters
from fourier_moe.spectral.frequencies import band_centers, named_generator
from lightning_modules.callbacks import SpectralOccupancy
from lightning_modules.callbacks.monitoring.logged import pixels
from lightning_modules.callbacks.monitoring.model_spectra import NUM_BINS, ModelSpectra
from lightning_modules.callbacks.monitoring.spectral_figures import overlap, radial_occupancy, rings
from lightning_modules.optimization import Optimization, ParameterGroup

E, P, LAYERS = ADAPTER.num_experts, ADAPTER.expert_pairs[0], ["q_proj", "v_proj"]
MEASURES = ["energy", "center", "radius_std", "in_band", "effective_coefficients", "effective_rank"]
FILES = [
    *("radial_occupancy.csv", "radial_occupancy.png", "spectral_occupancy.csv"),
    *("spectral_overlap.csv", "spectral_overlap.png", "spectral_rings.png", "token_rank.csv", "token_rank.png"),
]


def fit(directory, *callbacks, logger=None, module=None, **options):
    """An epoch has three steps and a validation."""
    trainer = token_trainer(directory, *callbacks, **{"num_sanity_val_steps": 1, **options})
    trainer.loggers = [logger] if logger else []
    trainer.fit(module or token_module(), TokenData())
    return trainer


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def spectra_of(trainer):
    found = adapters(trainer.lightning_module.model)
    return {name: ExpertSpectra.of(layer.experts) for name, layer in found.items()}


def values(spectra):
    """Measures (E,) of one layer, in the order of MEASURES."""
    centers = band_centers(E, ADAPTER.bandwidth, ADAPTER.band_layout)
    by_name = {"in_band": spectra.in_band(centers, ADAPTER.bandwidth)}
    return [by_name.get(name, getattr(spectra, name)) for name in MEASURES]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything: its trainer and directory."""
    directory = tmp_path_factory.mktemp("run")
    logger = TensorBoardLogger(directory, name="", version="")
    return fit(directory, SpectralOccupancy(detailed=True), logger=logger, max_epochs=2), directory


def test_logged_values_are_the_means_over_the_layers(finished):
    trainer, _ = finished
    logged, spectra = trainer.callback_metrics, spectra_of(trainer)
    by_layer = [values(spectra[layer]) for layer in LAYERS]
    for index, name in enumerate(MEASURES):
        for e in range(E):
            own = [float(layer[index][e]) for layer in by_layer]
            assert own[0] != own[1] or name != "energy"
            assert float(logged[f"spectrum/{name}/expert_{e}"]) == pytest.approx(sum(own) / 2)
            for layer, value in zip(LAYERS, own, strict=True):
                assert float(logged[f"spectrum_layers/{layer}/{name}/expert_{e}"]) == pytest.approx(value)


def test_csv_has_every_layer_and_the_mean(finished):
    trainer, directory = finished
    table = {(row["layer"], int(row["expert"])): row for row in rows(directory / "spectral_occupancy.csv")}
    assert list(table) == [(layer, e) for layer in ("all", *LAYERS) for e in range(E)]
    for layer, spectra in spectra_of(trainer).items():
        for e, column in enumerate(zip(*values(spectra), strict=True)):
            row = table[layer, e]
            assert [float(row[name]) for name in MEASURES] == pytest.approx([float(value) for value in column], rel=1e-5)
            assert float(row["band_center"]) == (e + 0.5) / E
    for e in range(E):
        mean = sum(float(table[layer, e]["energy"]) for layer in LAYERS) / 2
        assert float(table["all", e]["energy"]) == pytest.approx(mean, rel=1e-5)


def test_csv_of_the_curves_and_of_the_overlap(finished):
    trainer, directory = finished
    spectra, curves = spectra_of(trainer), rows(directory / "radial_occupancy.csv")
    assert [float(row["radius"]) for row in curves[:2]] == [0.5 / NUM_BINS, 1.5 / NUM_BINS]
    for e in range(E):
        energy = sum(float(row[f"energy/expert_{e}"]) for row in curves)
        assert energy == pytest.approx(sum(float(layer.energy[e]) for layer in spectra.values()) / 2, rel=1e-4)
        assert sum(float(row[f"positions/expert_{e}"]) for row in curves) == pytest.approx(1 / E, rel=1e-5)
    table = {(int(row["expert"]), int(row["other"])): row for row in rows(directory / "spectral_overlap.csv")}
    assert list(table) == [(e, f) for e in range(E) for f in range(E)]
    cosine = sum(layer.update_overlap() for layer in spectra.values()) / 2
    for (e, f), row in table.items():
        assert float(row["update_overlap"]) == pytest.approx(float(cosine[e, f]), abs=1e-5)
        assert float(row["radial_overlap"]) == float(table[f, e]["radial_overlap"])
        assert (float(row["radial_overlap"]) == pytest.approx(1, abs=1e-5)) == (e == f)


def test_tensorboard_gets_scalars_histograms_and_pictures(finished):
    trainer, directory = finished
    events = EventAccumulator(str(directory))
    events.Reload()
    tags = events.Tags()
    for e in range(E):
        assert {f"spectrum/{name}/expert_{e}" for name in MEASURES} <= set(tags["scalars"])
        assert [event.step for event in events.Scalars(f"spectrum/energy/expert_{e}")] == [2, 5]  # once an epoch
        assert [event.step for event in events.Scalars(f"spectrum/effective_rank/expert_{e}")] == [5]
        histogram = events.Histograms(f"spectrum/magnitude/expert_{e}")[-1].histogram_value
        modulus = torch.cat([layer.coefficients[e].abs() for layer in spectra_of(trainer).values()])
        assert histogram.num == len(LAYERS) * P
        assert (histogram.min, histogram.max) == pytest.approx((float(modulus.min()), float(modulus.max())))
    assert sorted(tags["images"]) == ["spectrum/overlap", "spectrum/radial_occupancy", "spectrum/rings", "spectrum/token_rank"]
    assert all([event.step for event in events.Images(tag)] == [5] for tag in tags["images"])


def test_run_directory(finished):
    _, directory = finished
    assert [path.name for path in sorted(directory.iterdir()) if path.suffix in (".csv", ".png")] == FILES
    for name in FILES:
        if name.endswith(".png"):
            assert min(Image.open(directory / name).size) > 500


def test_intervals_count_optimizer_steps(tmp_path):
    callback = SpectralOccupancy(every_n_steps=2, images_every_n_steps=3)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, callback, logger=logger, max_epochs=4, accumulate_grad_batches=2, limit_train_batches=2)  # 4 steps
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("spectrum/energy/expert_0")] == [1, 3]
    assert [event.step for event in events.Scalars("spectrum/effective_rank/expert_0")] == [2, 3]  # the last: at the end
    assert [event.step for event in events.Images("spectrum/rings")] == [2, 3]


def test_every_tenth_measurement_is_a_picture(tmp_path, no_figures):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, SpectralOccupancy(every_n_steps=1), logger=logger, max_epochs=4)
    logged = rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in logged if row["spectrum/energy/expert_0"]] == list(range(12))
    assert [int(row["step"]) for row in logged if row["spectrum/effective_rank/expert_0"]] == [9, 11]


def test_validations_within_an_epoch_and_the_end_of_training_are_measured(tmp_path, no_figures):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, SpectralOccupancy(), logger=logger, val_check_interval=2)
    assert [int(row["step"]) for row in rows(tmp_path / "metrics.csv") if row.get("spectrum/center/expert_0")] == [1, 2]


def test_no_logger_and_no_validation_still_write_the_files(tmp_path):
    trainer = fit(tmp_path, SpectralOccupancy(), limit_val_batches=0)
    assert "spectrum/energy/expert_0" in trainer.callback_metrics
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_what_never_moved_has_numbers_and_pictures(tmp_path):
    rates = Optimization(ParameterGroup(1e-30), head=ParameterGroup(1e-3), schedule="constant")
    module = token_module(optimization=rates)
    module.configure_model()
    for layer in adapters(module.model).values():
        layer.experts.coefficients.data.zero_()
        layer.experts.coefficients.register_hook(torch.zeros_like)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    logged = fit(tmp_path, SpectralOccupancy(every_n_steps=1), module=module, logger=logger).callback_metrics
    assert all(math.isfinite(float(value)) for name, value in logged.items() if name.startswith("spectrum"))
    assert float(logged["spectrum/energy/expert_0"]) == float(logged["spectrum/effective_rank/expert_0"]) == 0
    assert float(logged["spectrum/center/expert_3"]) > float(logged["spectrum/center/expert_0"]) > 0
    assert "nan" not in (tmp_path / "spectral_occupancy.csv").read_text() + (tmp_path / "spectral_overlap.csv").read_text()


def test_model_without_fourier_moe_is_left_in_peace(tmp_path):
    module = token_module(HeadOnly(), Optimization(head=ParameterGroup(0.01)))
    trainer = fit(tmp_path, SpectralOccupancy(every_n_steps=1, layers=["q_proj"]), module=module)
    assert not any(tag.startswith("spectrum") for tag in trainer.callback_metrics)
    assert list(tmp_path.iterdir()) == []


def test_fast_dev_run_writes_nothing(tmp_path):
    fit(tmp_path, SpectralOccupancy(every_n_steps=1), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("devices", [1, 2])
def test_slow_measurements_leave_out_ends_of_epochs_unless_processes_have_to_agree(tmp_path, monkeypatch, no_figures, devices):
    monkeypatch.setattr("lightning_modules.callbacks.monitoring.spectral_occupancy.time", Clock())
    callback, options = SpectralOccupancy(), {"max_epochs": 4, "limit_train_batches": 1, "limit_val_batches": 0}
    if devices > 1:
        options |= {"devices": devices, "strategy": "ddp_fork"}
    for run in ("a", "b"):  # the second does not wait for the first
        fit(tmp_path / run, callback, logger=CSVLogger(tmp_path / run, name="", version=""), **options)
        measured = [int(row["step"]) for row in rows(tmp_path / run / "metrics.csv") if row["spectrum/energy/expert_0"]]
        assert measured == ([0, 3] if devices == 1 else [0, 1, 2, 3])


def test_a_callback_serves_two_runs(tmp_path, no_figures):
    callback = SpectralOccupancy()
    fit(tmp_path / "a", callback)
    fit(tmp_path / "b", callback)
    assert (tmp_path / "a/spectral_occupancy.csv").read_text() == (tmp_path / "b/spectral_occupancy.csv").read_text()


def test_training_is_not_changed(tmp_path, no_figures):
    weights = []
    for callbacks in ([], [SpectralOccupancy(every_n_steps=1)]):
        trainer = fit(tmp_path, *callbacks)
        weights.append([parameter.detach().clone() for parameter in trainer.lightning_module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_layers_of_the_rings(tmp_path):
    with pytest.raises(ValueError, match=r"layers names 'k_proj', which is not adapted; adapted are: q_proj, v_proj$"):
        fit(tmp_path, SpectralOccupancy(layers=["v_proj", "k_proj"]))
    fit(tmp_path, SpectralOccupancy(layers=["v_proj"]))
    assert Image.open(tmp_path / "spectral_rings.png").width < 1300  # one panel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be 1 or more, or null"),
        ({"images_every_n_steps": -1}, "images_every_n_steps=-1 must be 1 or more"),
        ({"layers": []}, r"layers=\[\] must be a list of names"),
        ({"layers": "q_proj"}, "layers='q_proj' must be a list of names"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpectralOccupancy(**arguments)


def test_two_processes(tmp_path):
    trainer = fit(tmp_path, SpectralOccupancy(), devices=2, strategy="ddp_fork")
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert "spectrum/energy/expert_0" in trainer.callback_metrics


def spectra(**changes):
    """Of one layer with random coefficients."""
    config = FourierMoEConfig(**{"targets": ["q_proj"], "num_coefficients": 128, **changes})
    layer = randomize(SpectralExperts(32, 48, config, generator=named_generator(0, "q_proj")))
    return ModelSpectra.of({"model.layers.0.q_proj": layer}, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 1, "top_k": 1, "frequency_bias": False},
        {"num_experts": 32, "num_coefficients": 64, "bandwidth": 0.5},
        {"bandwidth": 0.96},
        {"conjugate_symmetry": False},
        {"densities": [1, 4, 2, 1], "num_experts": 4, "shared_coefficients": 40, "bandwidth": [0.2, 0.3, 0.1, 0.2]},
        {"band_layout": "stack", "bandwidth": 0.2, "num_experts": 4},  # the last bands reach beyond the plane
    ],
)
def test_figures_of_all_kinds_are_drawn(changes):
    of = spectra(**changes)
    for figure in (rings(of, list(of.layers), "now"), radial_occupancy(of, "now"), overlap(of, "now")):
        image = pixels(figure)
        assert image.shape[-1] == 4
        assert image.std() > 10


def test_rings_show_every_coefficient_and_its_partner_where_they_are():
    of = spectra()
    axes = rings(of, list(of.layers), "now").axes[0]
    (dots,) = axes.collections
    (layer,) = of.layers.values()
    u, v = layer.frequencies.flatten(0, 1).T
    expected = torch.stack([2 * v / 32, 2 * u / 48], 1)
    order = layer.pair_energy.flatten().argsort(descending=True)  # small dots on top of large ones
    drawn = torch.tensor(dots.get_offsets().data).view(-1, 2, 2)
    torch.testing.assert_close(drawn, torch.stack([expected, -expected], 1)[order].double())
    sizes, energy = torch.tensor(dots.get_sizes()).view(-1, 2), layer.pair_energy.flatten()[order]
    assert torch.equal(sizes[:, 0], sizes[:, 1])
    free = (sizes[:, 0] > 0.3) & (sizes[:, 0] < 150)
    ratio = sizes[free, 0] / energy[free]
    assert free.sum() > 20
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert axes.get_title() == "q_proj"
    assert len(axes.patches) == 8


def test_unequal_and_shared_experts_have_rows_and_dots_of_their_own(tmp_path):
    of = spectra(densities=[1, 4, 2, 1], num_experts=4, shared_coefficients=40)
    (dots,) = rings(of, list(of.layers), "now").axes[0].collections
    assert len(dots.get_offsets()) == 2 * (128 + 40) // 2
    assert [len(values) for values in of.magnitudes] == [8, 32, 16, 8, 20]
    of.write(tmp_path)
    table = rows(tmp_path / "spectral_occupancy.csv")
    assert [row["expert"] for row in table if row["layer"] == "all"] == ["0", "1", "2", "3", "shared"]
    assert (table[-1]["band_center"], table[-1]["in_band"]) == ("", "")
    assert sum(float(row["positions/shared"]) for row in rows(tmp_path / "radial_occupancy.csv")) == pytest.approx(
        20 / 84, rel=1e-4
    )
    assert rows(tmp_path / "spectral_overlap.csv")[-1]["other"] == "shared"


class TaskData(TokenData):
    def train_dataloader(self):
        batches = [{**token_batch(seed=seed), "task": ["arc"] * 3 + ["boolq"] * 5} for seed in (0, 1)]
        return DataLoader([*batches, {**token_batch(seed=2), "task": ["boolq"] * 8}], batch_size=None)


@pytest.mark.parametrize("scope", ["projection", "input"])
def test_rank_of_a_tokens_update_by_task(tmp_path, monkeypatch, scope):
    monkeypatch.setattr(SpectralOccupancy, "_figures", lambda *arguments: {})  # drawing takes longer than all else
    changes = {"densities": [1, 2, 4, 1], "shared_coefficients": 6, "router_scope": scope, "bandwidth": 0.6}
    settings = replace(ADAPTER, **changes, num_coefficients=32)
    still = ParameterGroup(1e-30)  # routing stays what it is
    module = token_module(settings, replace(RATES, experts=still, router=still))
    trainer = token_trainer(tmp_path, SpectralOccupancy())
    trainer.fit(module, TaskData())
    found = adapters(module.model)
    routers = {name: getattr(layer.router, "leader", layer.router) for name, layer in found.items()}
    seen = {router: [] for router in routers.values()}
    for router, chosen in seen.items():
        router.register_forward_hook(lambda _, args, routing, chosen=chosen: chosen.append(routing.experts))
    batches = list(TaskData().train_dataloader())
    with torch.no_grad():
        for batch in batches:
            module.task.logits(batch)
    table = {row["layer"]: row for row in rows(tmp_path / "token_rank.csv")}
    for task, names in {"all": ["arc", "boolq"], "arc": ["arc"], "boolq": ["boolq"]}.items():
        of_task = [batch["mask"] & torch.tensor([own in names for own in batch["task"]])[:, None] for batch in batches]
        for name, layer in found.items():
            ranks = torch.stack([torch.linalg.matrix_rank(layer.experts.double().delta_weight(e)) for e in range(5)])
            assert ranks[2] > ranks[0] > 0
            passes = seen[routers[name]]  # of all projections of a router together
            masks = [mask for mask in of_task for _ in range(len(passes) // len(batches))]
            chosen = torch.cat([experts[mask] for experts, mask in zip(passes, masks, strict=True)])
            assert float(table[name][task]) == pytest.approx(
                float((ranks[chosen].sum(-1) + ranks[4]).double().mean()), rel=1e-5
            )
        mean = sum(float(table[name][task]) for name in LAYERS) / 2
        assert "spectrum/energy/shared" in trainer.callback_metrics
        assert "spectrum/in_band/shared" not in trainer.callback_metrics  # it has no band
        assert float(trainer.callback_metrics[f"spectrum/token_rank/{task}"]) == pytest.approx(mean, rel=1e-5)


def test_a_task_named_all_is_kept_apart_from_all_tasks(tmp_path, monkeypatch, no_figures):
    data = TaskData()
    renamed = [
        {**batch, "task": ["all" if name == "arc" else name for name in batch["task"]]} for batch in data.train_dataloader()
    ]
    monkeypatch.setattr(data, "train_dataloader", lambda: DataLoader(renamed, batch_size=None))
    trainer = token_trainer(tmp_path / "tasks", SpectralOccupancy())
    trainer.fit(token_module(), data)
    assert list(rows(tmp_path / "tasks/token_rank.csv")[0]) == ["layer", "all", "task_all", "boolq"]
    ranks = {name: trainer.callback_metrics[f"spectrum/token_rank/{name}"] for name in ("all", "task_all", "boolq")}
    assert min(ranks["task_all"], ranks["boolq"]) <= ranks["all"] <= max(ranks["task_all"], ranks["boolq"])


def test_without_bands_there_are_no_rings():
    of = spectra(frequency_bias=False)
    assert len(rings(of, list(of.layers), "now").axes[0].patches) == 0
