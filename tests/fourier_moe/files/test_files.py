"""Adapter files: exact round trips, positions read rather than drawn again, and refusal of everything that does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import Transformer, config, randomize, tokens, trained
from torch import nn

from fourier_moe import (
    FourierMoEConfig,
    FullFineTuning,
    HeadOnly,
    adapter_state_dict,
    adapters,
    describe_adapter,
    inject,
    load_adapter,
    save_adapter,
)
from fourier_moe.inject import is_adapted
from fourier_moe.spectral import experts as experts_module

TENSORS, DESCRIPTION, CARD = "adapter.safetensors", "adapter.json", "README.md"


@pytest.fixture
def saved(tmp_path):
    return save_adapter(trained(), tmp_path / "adapter", class_names=["a", "b", "c"], metrics={"accuracy": 0.5})


@pytest.mark.parametrize(
    "settings",
    [
        config(head=["classifier"]),
        config(
            head=["classifier", "norm"], coefficients="imaginary", top_k=1, scaling=3.7, band_layout="stack", bandwidth=0.25
        ),
        config(conjugate_symmetry=False, frequency_bias=False),
        config(permute=True),
        config(densities=[1, 4, 2, 1], shared_coefficients=14, bandwidth=[0.3, 0.4, 0.5, 0.5]),
        FullFineTuning(head=["classifier"]),
        HeadOnly(head=["classifier"]),
    ],
    ids=["default", "imaginary", "free", "permuted", "unequal", "full", "head"],
)
@pytest.mark.parametrize("prepared", [False, True], ids=["fresh", "adapted"])
def test_round_trip_gives_bit_identical_output(tmp_path, settings, prepared):
    model, x = trained(settings), tokens(4, 5, 16)
    expected = model(x)
    directory = save_adapter(model, tmp_path / "some" / "where")
    fresh = Transformer().eval()
    assert not torch.equal(fresh(x), expected)
    if prepared:
        inject(fresh, settings)
    description = load_adapter(fresh, directory)
    assert torch.equal(fresh(x), expected)
    assert description.config == settings
    state, again = adapter_state_dict(model), adapter_state_dict(fresh)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in fresh.parameters()]


def test_holds_what_was_trained_and_the_positions_and_nothing_else(saved):
    parts = {"experts.coefficients", "experts.frequencies", "router.weight"}
    names = {f"layers.{i}.attention.{p}_proj.{part}" for i in range(2) for p in "qv" for part in parts}
    stored = load_file(saved / TENSORS)
    assert set(stored) == names | {"classifier.weight", "classifier.bias"}
    assert {str(t.dtype) for key, t in stored.items() if "frequencies" in key} == {"torch.int32"}


def test_positions_come_from_the_file(saved, monkeypatch):
    x, expected = tokens(4, 5, 16), trained()(tokens(4, 5, 16))
    original = experts_module.draw_frequencies

    def other_positions(*args, **kwargs):
        return original(*args, **kwargs).flip(0) * torch.tensor([1, -1], dtype=torch.int32)

    monkeypatch.setattr(experts_module, "draw_frequencies", other_positions)
    assert not torch.allclose(trained()(x), expected)  # drawn again they would differ
    fresh = Transformer().eval()
    load_adapter(fresh, saved)
    assert torch.equal(fresh(x), expected)


def test_loads_into_a_model_adapted_with_another_seed(saved):
    fresh, x = Transformer().eval(), tokens(4, 5, 16)
    inject(fresh, config(head=["classifier"], seed=99, dropout=0.5, balance_weight=0.7))
    load_adapter(fresh, saved)
    assert torch.equal(fresh(x), trained()(x))


def test_orders_of_the_permuted_control_come_from_the_file(tmp_path):
    model, fresh, x = trained(permute=True), Transformer().eval(), tokens(4, 5, 16)
    save_adapter(model, tmp_path)
    inject(fresh, config(head=["classifier"], permute=True, seed=99))
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


def test_loading_into_an_evaluating_model_leaves_no_dropout_on(tmp_path):
    model, x = trained(dropout=0.5), tokens(4, 5, 16)
    save_adapter(model, tmp_path)
    fresh = Transformer().eval()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


def test_fused_attention_round_trip(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()

    first, x = model(), tokens(2, 5, 16)
    inject(first, config())
    randomize(first)
    second = model()
    load_adapter(second, save_adapter(first, tmp_path))
    assert torch.equal(first(x), second(x))


def test_description_is_readable_json_and_needs_no_model(saved):
    raw = json.loads((saved / DESCRIPTION).read_text(encoding="utf-8"))
    assert raw["config"]["class"] == "FourierMoEConfig"
    assert raw["config"]["num_coefficients"] == 32
    assert raw["class_names"] == ["a", "b", "c"]
    assert raw["metrics"] == {"accuracy": 0.5}
    assert raw["trained_parameters"] == {"experts": 128, "router": 256, "head": 51, "backbone": 0}
    assert len((saved / DESCRIPTION).read_text().splitlines()) > 20
    description = describe_adapter(saved)
    assert description.config == config(head=["classifier"])
    assert (description.class_names, description.metrics, description.backbone) == (["a", "b", "c"], {"accuracy": 0.5}, None)


def test_names_in_any_script_survive(tmp_path):
    save_adapter(trained(), tmp_path, class_names=["mañana", "中文", "x"])
    assert describe_adapter(tmp_path).class_names == ["mañana", "中文", "x"]
    assert "中文" in (tmp_path / DESCRIPTION).read_text(encoding="utf-8")


def test_saving_again_replaces_and_leaves_no_temporary_files(saved):
    model = trained()
    with torch.no_grad():
        model.classifier.weight.zero_()
    save_adapter(model, saved)
    fresh = Transformer()
    load_adapter(fresh, saved)
    assert fresh.classifier.weight.abs().max() == 0
    assert sorted(path.name for path in saved.iterdir()) == [CARD, DESCRIPTION, TENSORS]


def test_metrics_that_json_cannot_hold_leave_the_old_adapter_intact(saved):
    model = trained()
    with torch.no_grad():
        model.classifier.weight.zero_()
    with pytest.raises(TypeError):
        save_adapter(model, saved, metrics={"accuracy": torch.tensor(0.5)})
    fresh = Transformer().eval()
    load_adapter(fresh, saved)
    assert torch.equal(fresh(tokens(4, 5, 16)), trained()(tokens(4, 5, 16)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.q_proj, self.output = nn.Embedding(5, 16), nn.Linear(16, 16), nn.Linear(16, 5, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids):
        return self.output(self.q_proj(self.embedding(ids)))


@pytest.mark.parametrize(
    "settings", [FullFineTuning(), HeadOnly(head=["output"]), config(targets=["q_proj"], head=["embedding", "output"])]
)
def test_tied_weights_round_trip(tmp_path, settings):
    first, second, ids = Tied(), Tied(), torch.arange(5)
    second.q_proj.load_state_dict(first.q_proj.state_dict())
    inject(first, settings)
    load_adapter(second, save_adapter(first, tmp_path))
    assert torch.equal(first(ids), second(ids))
    assert second.output.weight is second.embedding.weight


def test_other_shape_is_an_error_that_names_both(saved):
    with pytest.raises(ValueError, match=r"classifier.weight is \(3, 16\) in the file, \(5, 16\) in the model"):
        load_adapter(Transformer(classes=5), saved)
    with pytest.raises(ValueError, match=r"does not fit this model: .*router.weight is \(4, 16\) in the file, \(4, 32\)"):
        load_adapter(Transformer(width=32), saved)


def test_fewer_or_more_layers_is_an_error(saved):
    with pytest.raises(ValueError, match=r"it adapts 'layers.1.attention.q_proj', which this model does not have"):
        load_adapter(Transformer(layers=1), saved)
    with pytest.raises(ValueError, match=r"missing layers.2.attention.q_proj.experts.coefficients.* and 1 more"):
        load_adapter(Transformer(layers=3), saved)


def backbone(name, **options):
    model = Transformer(**options)
    model.backbone_name = name
    return model


@pytest.fixture
def saved_with_name(tmp_path):
    model = trained()
    model.backbone_name = "clip/a"
    return save_adapter(model, tmp_path / "named")


def test_same_weights_load_whatever_they_are_called(saved_with_name):
    assert describe_adapter(saved_with_name).backbone == "clip/a"
    x = tokens(4, 5, 16)
    for name in ("clip/a", "clip/b", None):
        model = backbone(name).eval()
        load_adapter(model, saved_with_name)
        assert torch.equal(model(x), trained()(x))


@pytest.mark.parametrize(
    ("name", "message"), [("clip/a", "with other weights"), ("clip/b", "this model is 'clip/b'"), (None, "is None")]
)
def test_other_weights_are_an_error_whatever_they_are_called_and_the_model_stays_unadapted(saved_with_name, name, message):
    model = backbone(name, seed=1)
    with pytest.raises(ValueError, match=rf"trained on backbone 'clip/a', .*{message}.*; load the same pretrained weights"):
        load_adapter(model, saved_with_name)
    assert_unadapted(model, backbone(name, seed=1))


def test_fine_tuned_backbone_is_another_backbone(saved_with_name):
    model, generator = backbone("clip/a"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    with pytest.raises(ValueError, match="with other weights"):
        load_adapter(model, saved_with_name)


def test_full_fine_tuning_has_no_frozen_weights_to_compare_and_goes_by_the_name(tmp_path):
    model = backbone("clip/a")
    inject(model, FullFineTuning(head=["classifier"]))
    save_adapter(model, tmp_path)
    assert describe_adapter(tmp_path).fingerprint == {}
    other, x = backbone("clip/a", seed=1).eval(), tokens(4, 5, 16)
    load_adapter(other, tmp_path)  # everything is replaced
    assert torch.equal(other(x), model.eval()(x))
    load_adapter(backbone(None), tmp_path)
    model = backbone("clip/b")
    with pytest.raises(ValueError, match=r"trained on backbone 'clip/a', this model is 'clip/b'"):
        load_adapter(model, tmp_path)
    assert_unadapted(model, backbone("clip/b"))


def assert_unadapted(model, original):
    assert not is_adapted(model)
    assert adapters(model) == {}
    assert [name for name, _ in model.named_modules()] == [name for name, _ in original.named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    state, expected = model.state_dict(), original.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("options", [{"classes": 5}, {"width": 32}, {"layers": 3}, {"layers": 1}], ids=str)
def test_adapter_that_does_not_fit_leaves_a_fresh_model_unadapted(saved, options):
    model = Transformer(**options)
    with pytest.raises(ValueError):
        load_adapter(model, saved)
    assert_unadapted(model, Transformer(**options))
    assert len(inject(model, config()).projections) == 2 * options.get("layers", 2)


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 1},
        {"num_coefficients": 16},
        {"scaling": 2.0},
        {"normalize_gates": False},
        {"targets": ["q_proj"]},
        {"head": ["classifier", "norm"]},
        {"coefficients": "real"},
        {"conjugate_symmetry": False},
        {"permute": True},
    ],
    ids=str,
)
def test_model_adapted_with_another_config_is_an_error_that_names_the_field(saved, change):
    model = Transformer()
    inject(model, config(**{"head": ["classifier"], **change}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"file and model differ in {next(iter(change))}: "):
        load_adapter(model, saved)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_model_adapted_with_another_method_is_an_error(saved):
    model = Transformer()
    inject(model, HeadOnly(head=["classifier"]))
    with pytest.raises(ValueError, match="differ in method: FourierMoEConfig against HeadOnly"):
        load_adapter(model, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, value):
    model = trained()
    with torch.no_grad():
        adapters(model)["layers.1.attention.v_proj"].experts.coefficients[0, 0, 0] = value
    with pytest.raises(ValueError, match=r"NaN or infinity in layers.1.attention.v_proj.experts.coefficients"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_model_that_is_not_adapted_is_an_error(tmp_path):
    for action in (adapter_state_dict, lambda model: save_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match="Transformer is not adapted"):
            action(Transformer())


def test_file_of_a_clip_sized_adapter_is_below_two_megabytes(tmp_path):
    names = [f"layers_{i}_{p}_proj" for i in range(12) for p in "qv"]
    model = nn.ModuleDict({name: nn.Linear(768, 768, bias=False) for name in names})
    model["head"] = nn.Linear(768, 196)
    settings = FourierMoEConfig(targets=[r"layers_.*"], head=["head"], num_coefficients=3008)
    assert inject(model, settings).total == 370_372
    save_adapter(model, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2_000_000
