"""The settings of every study of the paper, and those that do not fit."""

from dataclasses import replace

import pytest
import yaml
from support import REPOSITORY
from support.commands import DEMO

from fourier_moe import FourierMoEConfig
from lightning_modules.experiments.studies.paper import ABLATIONS, STUDIES, choose_settings

OWN = FourierMoEConfig(targets=["q_proj"], num_coefficients=512, num_experts=8, top_k=2)
OVERLAYS = sorted((REPOSITORY / ABLATIONS).glob("*.yaml"))


def anything(adapter):
    """A model with room for every adapter."""


def labels(study, values=None, own=OWN):
    return [setting.label for setting in choose_settings(STUDIES[study], values, own, anything)[0]]


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


def test_default_that_does_not_fit_is_left_out_and_said():
    settings, left_out = choose_settings(STUDIES["experts"], None, replace(OWN, top_k=4), anything)
    assert [setting.label for setting in settings] == ["4", "8", "16", "32"]
    assert left_out == ["experts 2: FourierMoEConfig: top_k=4 must be between 1 and num_experts=2"]


def test_no_value_fits():
    def refuse(adapter):
        raise ValueError("too small a model")

    with pytest.raises(ValueError, match=r"no value of the study fits this config, give --values: .*too small a model"):
        choose_settings(STUDIES["active_experts"], None, OWN, refuse)
