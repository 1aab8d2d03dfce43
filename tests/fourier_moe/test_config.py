"""Configs refuse impossible values, say what would be valid, and name several problems at once."""

import dataclasses
import json
import re

import pytest
from support.method_configs import LORA_RELATIVES, PEFT_LIBRARY
from support.models import config

from fourier_moe import (
    AdaMoLEConfig,
    FFTMoEConfig,
    FourierMoEConfig,
    FullFineTuning,
    GOATConfig,
    HeadOnly,
    HydraLoRAConfig,
    MoLoRAConfig,
)
from fourier_moe.files.format import config_of

ROUTED = [method(targets=["q_proj"]) for method in (MoLoRAConfig, GOATConfig, AdaMoLEConfig, HydraLoRAConfig)]
ROUTED += [config(), FFTMoEConfig(targets=["q_proj"])]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, r"top_k=5 must be between 1 and num_experts=4"),
        ({"top_k": 0}, r"top_k=0 must be between 1 and num_experts=4"),
        ({"num_experts": 0}, r"num_experts=0 must be at least 1"),
        ({"num_experts": 0, "densities": []}, r"num_experts=0 must be at least 1"),
        ({"num_experts": -2}, r"num_experts=-2 must be at least 1"),
        ({"num_coefficients": 0}, r"num_coefficients=0 must be a positive multiple of 2 \* num_experts = 8; nearest valid: 8$"),
        ({"num_coefficients": -3}, r"num_coefficients=-3 must be a positive multiple"),
        ({"bandwidth": 0.0}, r"bandwidth=0.0 must be a positive number"),
        ({"bandwidth": -0.1}, r"bandwidth=-0.1 must be a positive number"),
        ({"bandwidth": NAN}, r"bandwidth=nan must be a positive number"),
        ({"bandwidth": INF}, r"bandwidth=inf must be a positive number"),
        ({"bandwidth": [0.1, 0.2]}, r"bandwidth=\(0.1, 0.2\) must be num_experts=4 positive numbers, or one for all"),
        ({"bandwidth": [0.1, 0.2, 0.1, 0]}, r"bandwidth=\(0.1, 0.2, 0.1, 0\) must be num_experts=4 positive numbers"),
        ({"bandwidth": "wide"}, r"bandwidth='wide' must be a number or a list, each of it a number"),
        ({"densities": [1, 2]}, r"densities=\(1, 2\) must be num_experts=4 positive whole numbers"),
        ({"densities": [1, 1, 1, 0]}, r"densities=\(1, 1, 1, 0\) must be num_experts=4 positive whole numbers"),
        ({"densities": [1.5, 1, 1, 1]}, r"densities=\(1.5, 1, 1, 1\) must be a list, each of it a whole number or null"),
        (
            {"densities": [4, 2, 2, 1]},
            r"num_coefficients=32 must be a positive multiple of 2 \* sum\(densities\) = 18; .* 18 or 36",
        ),
        ({"shared_coefficients": 7}, r"shared_coefficients=7 must be 0 or a positive even number"),
        ({"shared_coefficients": -2}, r"shared_coefficients=-2 must be 0 or a positive even number"),
        ({"scaling": "absolute"}, r"scaling='absolute' must be a positive number or 'relative'"),
        ({"scaling": 0.0}, r"scaling=0.0 must be a positive number or 'relative'"),
        ({"scaling": -2}, r"scaling=-2 must be a positive number or 'relative'"),
        ({"scaling": NAN}, r"scaling=nan must be a positive number or 'relative'"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1 must be in \[0, 1\)"),
        ({"balance_weight": -1e-3}, r"balance_weight=-0.001 must be 0 or more"),
        ({"balance_weight": INF}, r"balance_weight=inf must be 0 or more"),
        ({"band_layout": "spread"}, r"band_layout='spread' must be one of cover, stack"),
        ({"band_layout": [0.1, 0.3, 0.5, 0.9]}, r"band_layout=\[0.1, .*\] must be one of cover, stack"),
        ({"coefficients": "phase"}, r"coefficients='phase' must be one of complex, real, imaginary"),
        ({"targets": []}, r"targets is empty; name at least one projection"),
        ({"top_k": 1.5}, r"top_k=1.5 must be a whole number"),
        ({"top_k": True}, r"top_k=True must be a whole number"),
        ({"num_experts": "4"}, r"num_experts='4' must be a whole number"),
        ({"num_coefficients": None}, r"num_coefficients=None must be a whole number"),
        ({"seed": 1.0}, r"seed=1.0 must be a whole number or null|seed=1.0 must be null or a whole number"),
        ({"scaling": True}, r"scaling=True must be a number or 'relative'"),
        ({"scaling": None, "dropout": "0"}, r"scaling=None must be a number or 'relative'; dropout='0' must be a number"),
        ({"normalize_gates": 1}, r"normalize_gates=1 must be true or false"),
    ],
)
def test_impossible_value_is_named_with_what_would_be_valid(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("settings", [*LORA_RELATIVES, *PEFT_LIBRARY, *ROUTED], ids=lambda each: type(each).__name__)
def test_every_method_refuses_values_of_another_type(settings):
    for field in dataclasses.fields(settings):
        if field.name not in ("targets", "head"):
            with pytest.raises(ValueError, match=rf"{type(settings).__name__}: {field.name}=\(1,\) must be "):
                dataclasses.replace(settings, **{field.name: (1,)})


@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_nearest_valid_numbers_of_coefficients_are_valid_and_nearest(num_experts):
    step = 2 * num_experts
    for asked in range(1, 5 * step):
        if asked % step == 0:
            assert config(num_coefficients=asked, num_experts=num_experts, top_k=1).expert_pairs[0] == asked // step
            continue
        with pytest.raises(ValueError, match="nearest valid") as caught:
            config(num_coefficients=asked, num_experts=num_experts, top_k=1)
        nearest = [int(n) for n in re.findall(r"\d+", str(caught.value).partition("nearest valid: ")[2])]
        for number in nearest:
            config(num_coefficients=number, num_experts=num_experts, top_k=1)
            assert abs(number - asked) < step
        assert len(nearest) == (1 if asked < step else 2)


def test_several_problems_are_reported_at_once():
    with pytest.raises(ValueError, match="FourierMoEConfig") as caught:
        config(top_k=9, num_coefficients=33, bandwidth=-1.0, band_layout="x", scaling="y", dropout=2.0)
    for name in ("top_k=9", "num_coefficients=33", "bandwidth=-1.0", "band_layout", "scaling", "dropout"):
        assert name in str(caught.value)


@pytest.mark.parametrize("field", ["targets", "head"])
@pytest.mark.parametrize("value", ["q_proj", ["q_proj", 3], ["", "q_proj"], [None]])
def test_names_must_be_a_list_of_names(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be a list of names"):
        config(**{field: value})


@pytest.mark.parametrize("field", ["targets", "head"])
def test_bad_regular_expression_is_named(field):
    with pytest.raises(ValueError, match=rf"{field} holds '\(q_proj', which is no valid regular expression"):
        config(**{field: ["v_proj", "(q_proj"]})


@pytest.mark.parametrize("config_class", [HeadOnly, FullFineTuning])
def test_targets_without_effect_are_an_error(config_class):
    with pytest.raises(TypeError, match="targets"):
        config_class(targets=["q_proj"])


def test_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="num_frequencies"):
        config(num_frequencies=8)


def test_defaults_are_the_paper_and_pairs_follow_from_n():
    paper = FourierMoEConfig(targets=["q_proj"], num_coefficients=3008)
    assert (paper.num_experts, paper.top_k, paper.bandwidth, paper.expert_pairs[0]) == (8, 2, 0.12, 188)
    assert FourierMoEConfig(targets=["q_proj"], num_coefficients=1008).expert_pairs[0] == 63
    assert FourierMoEConfig(targets=["q_proj"], num_coefficients=8192).expert_pairs[0] == 512
    unequal = config(num_coefficients=64, densities=[4, 2, 1, 1], shared_coefficients=6)
    assert (unequal.expert_pairs, unequal.segment_pairs) == ((16, 8, 4, 4, 3), 1)
    assert unequal.describe_size() == "num_coefficients=64, shared_coefficients=6"


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"num_experts": 8}, None),
        ({"num_experts": 8, "shared_coefficients": 1512}, None),
        ({"num_experts": 8, "shared_coefficients": 200}, r"189 segments of P=1, .*; set shared_coefficients=216$"),
        ({"densities": [1, 2, 3, 2]}, None),
        ({"densities": [4, 2, 1, 1], "shared_coefficients": 126}, None),
        ({"densities": [15, 16, 16, 16], "shared_coefficients": 48}, r"15 segments of P=24, .*; give smaller densities"),
    ],
)
def test_a_common_divisor_far_below_the_smallest_expert_is_advised_against(changes, remedy):
    advice = config(num_coefficients=3024, **changes).advice()
    assert advice is None if remedy is None else re.search(remedy, advice)


def test_boundaries_are_valid():
    config(top_k=4, dropout=0.0, balance_weight=0.0, scaling=2)
    config(num_experts=1, top_k=1, num_coefficients=2)


@pytest.mark.parametrize(
    "settings",
    [config(head=["classifier"], scaling=3.5), config(band_layout="stack"), HeadOnly(head=["a"]), FullFineTuning()],
)
def test_dictionary_round_trip_through_json(settings):
    values = json.loads(json.dumps(settings.to_dict()))
    assert values["class"] == type(settings).__name__
    assert config_of(values) == settings


@pytest.mark.parametrize("values", [{}, {"class": "Unheard"}, {"class": ["HeadOnly"]}, "HeadOnly", [], None])
def test_dictionary_of_no_known_class_is_an_error_that_lists_the_known(values):
    with pytest.raises(ValueError, match=r"is unknown; known: .*FourierMoEConfig.*import the package"):
        config_of(values)


def test_difference_names_the_first_setting_that_matters():
    assert config().difference(config(seed=5, dropout=0.5, balance_weight=0.5)) is None
    assert config(top_k=1).difference(config()) == "top_k: 2 against 1"
    assert config().difference(config(scaling=2.0)) == "scaling: 2.0 against 'relative'"
    assert config().difference(HeadOnly()) == "method: HeadOnly against FourierMoEConfig"


def test_is_frozen_and_comparable_whatever_sequence_names_the_targets():
    settings = config(targets=["q_proj"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.top_k = 1
    assert settings == config(targets=("q_proj",))
    assert settings != config(targets=["v_proj"])
    assert hash(settings) == hash(config(targets=("q_proj",)))
