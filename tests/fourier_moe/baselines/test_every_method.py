"""What every method keeps, whatever it computes: its start, what it trains, its files, its refusals."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.method_configs import LORA_RELATIVES, PEFT_LIBRARY
from support.models import Transformer, config
from support.routed_cases import CONFIGS as ROUTED
from torch import nn
from transformers.pytorch_utils import Conv1D

from fourier_moe import (
    AdaMoLEConfig,
    DoRAConfig,
    FFTMoEConfig,
    FourierFTConfig,
    FourierMoEConfig,
    GOATConfig,
    HydraLoRAConfig,
    KaSAConfig,
    LoRAConfig,
    LoRADashConfig,
    MELoRAConfig,
    MiLoRAConfig,
    MoLoRAConfig,
    PEANuTConfig,
    PiSSAConfig,
    RsLoRAConfig,
    TopLoRAConfig,
    adapters,
    after_step,
    balance_loss,
    inject,
    load_adapter,
    recording,
    regularization,
    save_adapter,
)
from fourier_moe.adapter import build_layer, layer_class

METHODS = [config(head=["classifier"], seed=3), *PEFT_LIBRARY, *LORA_RELATIVES, *ROUTED]
X = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3


def of_each(*kinds, but=()):
    """Parametrize by the configs of these classes, all if none is given."""
    chosen = [method for method in METHODS if type(method) not in but and (not kinds or type(method) in kinds)]
    return pytest.mark.parametrize("method", chosen, ids=lambda method: type(method).__name__)


def trained_parameters(model):
    return [p for adapter in adapters(model).values() for group in adapter.parameter_groups().values() for p in group]


def train(model, steps=20):
    """Losses of the task; adapters get their own losses and steps."""
    model.train()
    model.norm.eval()  # frozen, and so are its statistics
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        with recording(model):
            task = nn.functional.cross_entropy(model(X), LABELS)
            loss = task + balance_loss(model) + regularization(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step(model)
        losses.append(task.item())
    return losses


@pytest.fixture(scope="module")
def trained():
    """A trained model of each method; not to be changed."""
    models = {}

    def trained(method):
        key = METHODS.index(method)
        if key not in models:
            models[key] = Transformer()
            inject(models[key], method)
            train(models[key], 5)
        return models[key].eval()

    return trained


# ---------------------------------------------------------------- start


@of_each(but=(FourierFTConfig, KaSAConfig, GOATConfig))  # these begin beside it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_adapted_model_starts_as_the_pretrained_one_in_its_dtype_and_trains_in_float32(method, dtype):
    model = Transformer().to(dtype).eval()
    inject(model, method)
    assert {parameter.dtype for parameter in trained_parameters(model)} == {torch.float32}
    pretrained = Transformer().to(dtype).eval()
    if isinstance(method, FFTMoEConfig):  # trains the pretrained weights
        pretrained, dtype = pretrained.float(), torch.float32
    found, expected = model(X.to(dtype)), pretrained(X.to(dtype))
    if isinstance(method, (FourierMoEConfig, MoLoRAConfig, AdaMoLEConfig, HydraLoRAConfig)):
        assert torch.equal(found, expected)
    rough = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **rough)


@of_each()
def test_start_depends_on_the_seed_only_and_draws_nothing_that_others_would_miss(method):
    def start(seed):
        model = Transformer()
        inject(model, replace(method, seed=seed))
        return torch.cat([p.flatten() for p in trained_parameters(model)])

    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = start(4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert torch.equal(start(4), first)
    assert torch.equal(start(5), first) == isinstance(method, (PiSSAConfig, MiLoRAConfig))
    assert torch.equal(start(None), start(0))


@of_each(but={*map(type, PEFT_LIBRARY), KaSAConfig, MiLoRAConfig})
def test_start_depends_on_the_name_and_not_on_other_projections(method, monkeypatch):
    assert layer_class(method).named_generator
    model = Transformer()
    with monkeypatch.context() as patch:  # other threads may draw from the global generator
        patch.setattr(torch.random, "fork_rng", lambda **_: pytest.fail("the global generator was touched"))
        inject(model, method)

    def start(name):
        layer = build_layer(nn.Linear(16, 16), method, name)
        layer.base = nn.Identity()
        return torch.cat([value.double().flatten() for value in layer.state_dict().values()])

    def same(a, b):
        return torch.equal(a[a != 0], b[b != 0])

    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = start("proj")
        torch.manual_seed(1)
        assert same(start("proj"), first)
        torch.manual_seed(1)
        assert not same(start("other"), first)


# ---------------------------------------------------------------- what is trained

SIZES = {  # trained numbers of an M x N projection: experts or adapter, and router
    FourierMoEConfig: lambda c, M, N: (c.num_coefficients, 4 * N),
    LoRAConfig: lambda c, M, N: (c.r * (M + N),),
    RsLoRAConfig: lambda c, M, N: (c.r * (M + N),),
    DoRAConfig: lambda c, M, N: (c.r * (M + N) + M,),
    PiSSAConfig: lambda c, M, N: (c.r * (M + N),),
    FourierFTConfig: lambda c, M, N: (c.num_coefficients,),
    PEANuTConfig: lambda c, M, N: (2 * c.r * M + 2 * c.depth * c.r**2,),
    KaSAConfig: lambda c, M, N: (c.r * (M + N) + c.r,),
    MiLoRAConfig: lambda c, M, N: (c.r * (M + N),),
    LoRADashConfig: lambda c, M, N: (c.r * (M + N) + c.num_directions,),
    TopLoRAConfig: lambda c, M, N: (c.r * (M + 2 * N) + c.r,),
    MELoRAConfig: lambda c, M, N: (c.r * (M + N),),
    MoLoRAConfig: lambda c, M, N: (c.r * (M + N), 4 * N),
    GOATConfig: lambda c, M, N: (c.r * (M + N), 4 * N),
    AdaMoLEConfig: lambda c, M, N: (c.r * (M + N), 4 * N + N + 1),
    HydraLoRAConfig: lambda c, M, N: (c.r * (N + 4 * M), 4 * N),
    FFTMoEConfig: lambda c, M, N: (4 * (M * N + M), 4 * N),
}


@of_each()
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_are_counted_by_the_formula_and_nothing_else_is_trained(method, device):
    with torch.device(device):
        model = nn.ModuleDict({"q_proj": nn.Linear(20, 12), "v_proj": nn.Linear(12, 16), "other": nn.Linear(5, 2)})
        model["classifier"] = nn.Linear(4, 2)
    report = inject(model, method)
    counts = [SIZES[type(method)](method, *shape) for shape in ((12, 20), (16, 12))]
    kinds = ("experts", "router") if len(counts[0]) == 2 else ("adapter",)
    expected = {"experts": 0, "router": 0, "head": 10, "backbone": 0}
    expected |= {kind: sum(numbers) for kind, numbers in zip(kinds, zip(*counts, strict=True), strict=True)}
    pretrained = 12 * 20 + 12 + 16 * 12 + 16 + 12
    if method.trains_backbone:
        expected["backbone"] = 12
    assert report.trained == expected
    assert report.frozen == (0 if method.trains_backbone else pretrained)
    assert report.percent == pytest.approx(100 * sum(expected.values()) / pretrained)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.total == sum(expected.values())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}


@of_each()
def test_training_reduces_the_loss_moves_every_trained_tensor_and_no_frozen_one(method):
    model = Transformer()
    inject(model, method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < (0.8 if hasattr(method, "num_experts") else 0.9) * losses[0]
    for name, parameter in model.named_parameters():
        if not (method.trains_backbone and "k_proj.bias" in name):  # to which a softmax over the keys is blind
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


# ---------------------------------------------------------------- files and copies


@of_each()
def test_file_gives_a_fresh_model_the_same_outputs_and_holds_no_frozen_weight(method, trained, tmp_path):
    model = trained(method)
    save_adapter(model, tmp_path)
    fresh = Transformer().eval()
    assert load_adapter(fresh, tmp_path).config == method
    assert torch.equal(fresh(X), model(X))
    assert not torch.equal(fresh(X), Transformer().eval()(X))
    if not method.trains_backbone:
        state = load_file(tmp_path / "adapter.safetensors")
        assert not any(".base." in name for name in state)
        buffers = {name for name, _ in model.named_buffers() if name in state}
        stored = sum(tensor.numel() for name, tensor in state.items() if name not in buffers)
        assert stored == sum(p.numel() for p in model.parameters() if p.requires_grad)


@of_each(but=(FFTMoEConfig,))  # has no other weights: it holds its own
def test_file_that_does_not_fit_leaves_the_model_as_it_was(method, trained, tmp_path):
    save_adapter(trained(method), tmp_path)
    model = Transformer(seed=1)  # other pretrained weights
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="was trained on backbone"):
        load_adapter(model, tmp_path)
    assert not adapters(model)
    assert dict.fromkeys(expected, True) == {n: torch.equal(v, expected[n]) for n, v in model.state_dict().items()}


@of_each()
def test_copy_of_an_adapted_model_stands_on_its_own(method, trained):
    model = trained(method)
    expected, twin = model(X), copy.deepcopy(model)
    assert torch.equal(twin(X), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)


# ---------------------------------------------------------------- projections of other kinds


@pytest.mark.filterwarnings("error")
@of_each(but=(KaSAConfig, PEANuTConfig, FourierFTConfig))  # the first two cannot, the third does not start at the base
def test_conv1d_of_transformers_is_adapted(method):
    model = nn.Sequential(Conv1D(12, 16)).eval()
    expected = model(X)
    (projection,) = inject(model, replace(method, targets=["0"], head=[])).projections
    assert (projection.in_features, projection.out_features) == (16, 12)
    rough = {"rtol": 0.2, "atol": 0.1} if isinstance(method, GOATConfig) else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(model(X), expected, **rough)


@of_each(PiSSAConfig, KaSAConfig, MiLoRAConfig, GOATConfig)
def test_method_that_changes_the_weight_leaves_a_module_alone_that_is_tied_to_it(method):
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 16), "output": nn.Linear(16, 16, bias=False)})
    model["output"].weight = model["embedding"].weight
    expected = model["embedding"].weight.detach().clone()
    inject(model, replace(method, targets=["output"], head=[]))
    assert torch.equal(model["embedding"].weight, expected)
    assert not torch.equal(adapters(model)["output"].base.weight, expected)


class Quantized(nn.Linear):
    """What bitsandbytes' int8 looks like from outside."""

    def __init__(self):
        super().__init__(16, 16)
        self.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x


@of_each(but={*map(type, PEFT_LIBRARY)} - {PiSSAConfig, PEANuTConfig})  # peft knows bitsandbytes by its classes
def test_quantized_weight_is_refused_where_it_is_read(method):
    model = nn.ModuleDict({"other": nn.Linear(16, 16), "q_proj": Quantized()})
    method = replace(method, targets=["other", "q_proj"], head=[])
    if method.reads_weights:
        with pytest.raises(
            ValueError, match=f"^{type(method).__name__} computes with the pretrained weights, and those of 'q_pr"
        ):
            inject(model, method)
    elif method.trains_backbone:
        for targets in (["other"], ["other", "q_proj"]):
            with pytest.raises(
                ValueError, match=f"^{type(method).__name__} trains the pretrained weights, and these are quant"
            ):
                inject(model, replace(method, targets=targets))
    else:
        inject(model, method)
        assert torch.equal(model["q_proj"](X), X)
    assert bool(adapters(model)) == (not method.reads_weights and not method.trains_backbone)
    reading = (PiSSAConfig, PEANuTConfig, KaSAConfig, MiLoRAConfig, LoRADashConfig, GOATConfig)
    assert method.reads_weights == isinstance(method, reading)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (LoRAConfig, {"r": 0}, "LoRAConfig: r=0 must be at least 1"),
        (LoRAConfig, {"alpha": 0.0}, "alpha=0.0 must be a positive number"),
        (DoRAConfig, {"alpha": math.nan}, "alpha=nan must be a positive number"),
        (LoRAConfig, {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        (LoRAConfig, {"targets": []}, "targets is empty"),
        (FourierFTConfig, {"num_coefficients": 0}, "num_coefficients=0 must be at least 1"),
        (FourierFTConfig, {"scaling": math.inf}, "scaling=inf must be a positive number"),
        (PEANuTConfig, {"r": 0}, "r=0 must be at least 1"),
        (PEANuTConfig, {"depth": -1}, "depth=-1 must be 0 or more"),
        (PEANuTConfig, {"scaling": 0.0}, "scaling=0.0 must be a positive number"),
        (MiLoRAConfig, {"r": 0}, "r=0 must be at least 1"),
        (KaSAConfig, {"beta": -1.0}, "beta=-1.0 must be 0 or more"),
        (KaSAConfig, {"gamma": math.nan}, "gamma=nan must be 0 or more"),
        (TopLoRAConfig, {"alpha": 0.0}, "alpha=0.0 must be a positive number"),
        (TopLoRAConfig, {"targets": []}, "targets is empty"),
        (MELoRAConfig, {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        (MELoRAConfig, {"num_blocks": 0}, "num_blocks=0 must be at least 1"),
        (LoRADashConfig, {"num_directions": 0}, "num_directions=0 must be at least 1"),
        (LoRADashConfig, {"start": 0}, "start=0 must be at least 1"),
        (MoLoRAConfig, {"num_experts": 0}, "MoLoRAConfig: num_experts=0 must be at least 1"),
        (MoLoRAConfig, {"r": 30}, "r=30 must be a positive multiple of num_experts = 8; nearest valid: 24 or 32$"),
        (MoLoRAConfig, {"r": 4}, "r=4 .* nearest valid: 8$"),
        (MoLoRAConfig, {"r": 0}, "r=0 .* nearest valid: 8$"),
        (MoLoRAConfig, {"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        (MoLoRAConfig, {"top_k": 0}, "top_k=0 must be between 1"),
        (MoLoRAConfig, {"alpha": 0.0}, "alpha=0.0 must be a positive number"),
        (MoLoRAConfig, {"alpha": None}, "alpha=None must be a positive number"),
        (MoLoRAConfig, {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        (MoLoRAConfig, {"balance_weight": -1.0}, "balance_weight=-1.0 must be 0 or more"),
        (AdaMoLEConfig, {"max_threshold": 0.0}, "max_threshold=0.0 must be above 0 and at most 1"),
        (AdaMoLEConfig, {"max_threshold": 1.1}, "max_threshold=1.1 must be above 0 and at most 1"),
        (HydraLoRAConfig, {"r": 0}, "r=0 must be at least 1"),
        (GOATConfig, {"rho": 0.0}, "rho=0.0 must be a positive number"),
        (GOATConfig, {"eta": 1.0}, "alpha=16.0 has no effect beside eta=1.0; set one of them to null"),
        (GOATConfig, {"alpha": None}, "alpha=None must be a positive number"),
        (GOATConfig, {"alpha": None, "eta": -1.0}, "eta=-1.0 must be a positive number"),
        (FFTMoEConfig, {"top_k": 1}, "top_k=1 must be between 2 and num_experts=8"),
        (FFTMoEConfig, {"balance_weight": math.nan}, "balance_weight=nan must be 0 or more"),
        (FFTMoEConfig, {"targets": []}, "targets is empty"),
    ],
)
def test_impossible_value_is_named(config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(**{"targets": ["q_proj"], **options})


@pytest.mark.parametrize(
    ("config_class", "target", "options", "message"),
    [
        (LoRAConfig, "quary", {}, "^targets entry 'quary' matches no module"),
        (LoRAConfig, "norm", {}, "^targets match 'layers.0.norm': LayerNorm is no linear projection"),
        (PEANuTConfig, "turned", {"r": 4}, "^turned: PEANuTConfig cannot adapt a Conv1D: "),
        (KaSAConfig, "turned", {"r": 4}, "^turned: KaSAConfig cannot adapt a Conv1D: "),
        (PiSSAConfig, "doubled", {"r": 4}, "^doubled: PiSSAConfig cannot adapt a Linear: .*float32"),
        (LoRAConfig, "small", {"r": 5}, "r=5 must be at most 4$"),
        (PiSSAConfig, "small", {"r": 5}, "r=5 must be at most 4$"),
        (MiLoRAConfig, "small", {"r": 5}, "r=5 must be at most 4$"),
        (PEANuTConfig, "small", {"r": 5}, "r=5 must be at most 4$"),
        (FourierFTConfig, "small", {"num_coefficients": 65}, "num_coefficients=65 must be at most 64$"),
        (KaSAConfig, "small", {"r": 4}, "r=4 must be at most 3$"),
        (LoRADashConfig, "small", {"r": 5, "num_directions": 4}, "r=5 must be at most 4$"),
        (LoRADashConfig, "small", {"r": 4, "num_directions": 5}, "num_directions=5 must be at most 4$"),
        (TopLoRAConfig, "small", {"r": 5}, "r=5 must be at most 4$"),
        (MELoRAConfig, "small", {"r": 2, "num_blocks": 8}, "num_blocks=8 must divide both sizes$"),
        (MELoRAConfig, "small", {"r": 2, "num_blocks": 4}, "r=2 must be at most 1$"),
        (MoLoRAConfig, "small", {"r": 40}, "r=40 must be at most 32$"),
        (HydraLoRAConfig, "small", {"r": 5}, "r=5 must be at most 4$"),
        (GOATConfig, "small", {"r": 8}, "r=8 must be at most 0$"),
        (GOATConfig, "small", {"num_experts": 4, "r": 8}, "r=8 must be at most 4$"),
    ],
)
def test_adapter_that_cannot_fit_is_one_message_and_leaves_the_model_as_it_was(config_class, target, options, message):
    model = Transformer()
    model.small, model.turned, model.doubled = nn.Linear(16, 4), Conv1D(16, 16), nn.Linear(16, 16).double()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    start = "^small is 4 x 16: " if target == "small" else ""
    with pytest.raises(ValueError, match=start + message) as error:
        inject(model, config_class(targets=["q_proj", target], **options))
    assert "\n" not in str(error.value)
    assert not adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    state = model.state_dict()
    assert {name: torch.equal(state[name], value) for name, value in expected.items()} == dict.fromkeys(state, True)
