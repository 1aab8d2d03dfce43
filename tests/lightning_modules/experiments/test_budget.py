"""Parameter budgets, and the outlines that sizes are tried on: counts equal those of the real injection."""

import dataclasses
import warnings

import pytest
import torch
from support import REPOSITORY
from torch import nn

from fourier_moe import FFTMoEConfig, FourierMoEConfig, LoRAConfig, inject
from fourier_moe.baselines import FullFineTuning, HeadOnly, PEANuTConfig
from lightning_modules.cli import AdaptationCLI
from lightning_modules.experiments.budget import Budget, adapter_parameters, match, nearest
from lightning_modules.experiments.preflight import Variant, outline, parse_grid
from lightning_modules.optimization import Optimization, ParameterGroup

OVERLAYS = sorted(path.stem for path in (REPOSITORY / "configs/adapters").glob("*.yaml"))
DEMO = ["--config", "configs/demo.yaml"]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(48, 64), nn.Linear(48, 48)
        self.head = nn.Linear(48, 3)


def variant(adapter):
    optimization = Optimization(ParameterGroup(1.0), None, None, ParameterGroup(1.0))
    if isinstance(adapter, HeadOnly):
        optimization = Optimization(head=ParameterGroup(1.0))
    elif not isinstance(adapter, FourierMoEConfig):
        optimization = Optimization(adapter=ParameterGroup(1.0), head=ParameterGroup(1.0))
    return Variant(adapter, optimization, outline(Model()), ["head"], {})


@pytest.fixture
def parse(main):
    return lambda *words: parse_grid({"x": [*DEMO, *words]})["x"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_outline_counts_what_the_real_model_trains(parse, name):
    words = ["--config", f"configs/adapters/{name}.yaml"]
    tried = parse(*words)
    assert all(parameter.is_meta for parameter in tried.outline.parameters())
    report = tried.try_out(tried.adapter)
    cli = AdaptationCLI([*DEMO, *words], run=False)
    cli.model.configure_model()
    assert report == cli.model.report
    if tried.adapter.size_field is not None:  # a method that says its size is bigger with the next one
        value = getattr(tried.adapter, tried.adapter.size_field)
        assert value % tried.adapter.size_step == 0
        larger = dataclasses.replace(tried.adapter, **{tried.adapter.size_field: value + tried.adapter.size_step})
        assert adapter_parameters(tried.try_out(larger)) > adapter_parameters(report)


def test_outline_leaves_the_model_alone_and_shares_what_is_shared():
    model = Model()
    model.tied = model.head
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = outline(model)
    assert copy.tied is copy.head
    inject(copy, LoRAConfig(targets=["q_proj"], head=["head"]))
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("text", "expected"), [("150000", 150000), ("150,000", 150000), ("2e4", 20000), ("0.5%", 0.005 * 5000)]
)
def test_budget_is_a_number_or_a_share_of_the_pretrained_model(text, expected):
    report = dataclasses.replace(variant(HeadOnly()).try_out(HeadOnly()), frozen=5000)
    assert Budget.parse(text).parameters(report) == pytest.approx(expected)


@pytest.mark.parametrize(
    "adapter", [HeadOnly(), LoRAConfig(targets=["q_proj"]), FullFineTuning(), FFTMoEConfig(targets=["q_proj"])]
)
def test_share_is_of_the_same_pretrained_model_whatever_becomes_of_it(adapter):
    report = inject(outline(Model()), dataclasses.replace(adapter, head=["head"]))
    assert Budget.parse("10%").parameters(report) == pytest.approx((64 * 48 + 64 + 48 * 48 + 48) / 10)


@pytest.mark.parametrize("text", ["", "%", "-1", "0", "nan", "inf", "1%%", "many"])
def test_budget_that_is_none(text):
    with pytest.raises(ValueError, match="must be a positive number"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("adapter", "budget", "size"),
    [
        (LoRAConfig(targets=["q_proj", "v_proj"]), "1000", 5),  # 112 + 96 = 208 a rank: 1,040 is nearer than 832
        (LoRAConfig(targets=["q_proj", "v_proj"]), "9000", 43),
        (LoRAConfig(targets=["q_proj", "v_proj"]), "10500", 48),  # the largest that fits: 9,984
        (FourierMoEConfig(targets=["q_proj"], num_coefficients=32, num_experts=4, top_k=1), "512", 320),  # 4 * 48 of the router
        (PEANuTConfig(targets=["q_proj"], depth=1), "1500", None),
    ],
)
def test_match_finds_the_nearest_size(adapter, budget, size):
    tried = variant(adapter)
    found = match(tried, Budget.parse(budget))
    field = adapter.size_field
    assert dataclasses.replace(found, **{field: getattr(adapter, field)}) == adapter  # nothing else changes
    wanted = float(budget)

    def miss(value):
        try:
            return abs(adapter_parameters(tried.try_out(dataclasses.replace(adapter, **{field: value}))) - wanted)
        except ValueError:
            return float("inf")

    step = adapter.size_step
    best = min(range(step, 60 * step, step), key=miss)  # by trying all
    assert getattr(found, field) == best
    assert size in (None, best)


def test_slow_sizes_are_warned_of_when_they_are_chosen():
    slow = FourierMoEConfig(targets=["q_proj"], num_coefficients=32, num_experts=4, shared_coefficients=26)
    with warnings.catch_warnings(record=True) as caught:
        found = match(variant(slow), Budget.parse("538"))
        assert caught == []
    with pytest.warns(UserWarning, match=r"num_coefficients=320 .* 40 segments of P=1, .*set shared_coefficients=30"):
        variant(slow).try_out(found)


def test_method_without_a_size_stays_as_it_is():
    assert match(variant(HeadOnly()), Budget.parse("1000")) == HeadOnly()


@pytest.mark.parametrize(
    ("budget", "message"), [("20", r"asks for 20 .*no nearer than 208 \(r=1\)"), ("99999", r"9,984 \(r=48\)")]
)
def test_impossible_budget_names_the_nearest(budget, message):
    with pytest.raises(ValueError, match=message):
        match(variant(LoRAConfig(targets=["q_proj", "v_proj"])), Budget.parse(budget))


@pytest.mark.parametrize("wanted", [1, 99, 1000, 123456, 10**7])
@pytest.mark.parametrize("largest", [1, 7, 4000])
def test_nearest_needs_few_counts(wanted, largest):
    for count in (lambda k: 100 * k, lambda k: 5000 + 3 * k, lambda k: 7 * k + k * k):
        calls = []

        def counted(k, count=count, calls=calls):
            calls.append(k)
            if k > largest:
                raise ValueError
            return count(k)

        found, value = nearest(counted, wanted)
        assert value == count(found)
        best = min(abs(count(k) - wanted) for k in range(1, largest + 1))
        assert abs(value - wanted) == best
        assert len(calls) <= 30
    affine = []
    nearest(lambda k: affine.append(k) or 5000 + 3 * k, 123456)
    assert len(affine) <= 5  # on a large model every count takes seconds
