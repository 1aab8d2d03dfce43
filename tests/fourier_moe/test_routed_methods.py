"""Other mixtures of experts against their equations token by token, their starts, files, statistics and refusals."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from fourier_moe_models import Transformer
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fourier_moe import (
    AdaMoLEConfig,
    AdapterConfig,
    FFTMoEConfig,
    GOATConfig,
    HydraLoRAConfig,
    MoLoRAConfig,
    StatisticsReader,
    adapters,
    balance_loss,
    inject,
    load_adapter,
    recording,
    save_adapter,
)

COMMON = {"targets": ["q_proj", "v_proj"], "head": ["classifier"], "num_experts": 4}
CONFIGS = [
    MoLoRAConfig(**COMMON, r=8, alpha=3.0, seed=3),
    MoLoRAConfig(**COMMON, r=4, top_k=4),
    MoLoRAConfig(**COMMON, r=4, top_k=3, normalize_gates=False),
    MoLoRAConfig(**COMMON, r=4, top_k=1),
    AdaMoLEConfig(**COMMON, r=8, alpha=3.0, seed=3),
    AdaMoLEConfig(**COMMON, r=4, max_threshold=0.6),
    HydraLoRAConfig(**COMMON, r=3, alpha=5.0, seed=3),
    GOATConfig(**COMMON, r=8, alpha=3.0, rho=4.0, seed=3),
    GOATConfig(**COMMON, r=4, alpha=None, eta=0.5),
    FFTMoEConfig(**COMMON, seed=3),
]
IDS = [
    "molora",
    "molora_dense",
    "molora_raw",
    "molora_1",
    "adamole",
    "adamole_high",
    "hydralora",
    "goat",
    "goat_eta",
    "fft_moe",
]
LORA = [config for config in CONFIGS if not isinstance(config, FFTMoEConfig)]
ONE_EACH = [config for config, name in zip(CONFIGS, IDS, strict=True) if "_" not in name or name == "fft_moe"]
SIZES = [(5, 7), (7, 5), (8, 8), (13, 9)]  # M, N


def of_each(configs):
    return pytest.mark.parametrize("config", configs, ids=[IDS[CONFIGS.index(config)] for config in configs])


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = tokens(8, 5, 16, seed=1).float()
LABELS = torch.arange(8) % 3


def projection(M, N, bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(N, M, bias=bias, dtype=torch.float64)


def fitting(config, M, N):
    """With a rank that a projection of this size allows."""
    return replace(config, r=config.num_experts) if hasattr(config, "r") and min(M, N) // 4 < 2 else config


def moved_layer(config, M, N, bias=True):
    """An adapted projection in float64 whose trained parameters are away from their start; and the pretrained one."""
    base = projection(M, N, bias)
    layer = fitting(config, M, N).build_layer(copy.deepcopy(base), "proj").double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in layer.parameter_groups().values():
            for parameter in group:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer, base


# ---------------------------------------------------------------- equations


def gates_by_the_equations(config, layer, x):
    """Gates of one token (N,), one expert after the other."""
    E = config.num_experts
    scores = [math.exp(float(layer.router.weight[e] @ x)) for e in range(E)]
    p = [score / sum(scores) for score in scores]
    if isinstance(config, HydraLoRAConfig):
        return p
    if isinstance(config, AdaMoLEConfig):
        high = config.max_threshold or 1 / E
        tau = high / (1 + math.exp(-float(layer.router.threshold_weight[0] @ x + layer.router.threshold_bias)))
        kept = [p_e - tau if p_e >= tau else 0.0 for p_e in p]
        return [value / (sum(kept) or 1) for value in kept]
    chosen = sorted(range(E), key=p.__getitem__)[-config.top_k :]
    total = sum(p[e] for e in chosen) if config.top_k > 1 and getattr(config, "normalize_gates", True) else 1
    return [p[e] / total if e in chosen else 0.0 for e in range(E)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("M", "N"), SIZES)
@of_each(CONFIGS)
def test_output_is_that_of_the_equations_token_by_token(config, M, N, bias):
    layer, base = moved_layer(config, M, N, bias)
    config = fitting(config, M, N)
    x = tokens(3, 6, N)
    y = layer(x)
    assert y.shape == (3, 6, M)
    b = base.bias if bias else torch.zeros(M, dtype=torch.float64)
    num_active = set()
    for token, actual in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        gates = gates_by_the_equations(config, layer, token)
        num_active.add(sum(gate > 0 for gate in gates))
        if isinstance(config, FFTMoEConfig):
            experts = layer.experts
            expected = sum(
                gate * (experts.weight[e] @ token + (experts.bias[e] if bias else 0)) for e, gate in enumerate(gates)
            )
        else:
            rank = config.r if isinstance(config, HydraLoRAConfig) else config.r // 4
            s = math.sqrt(3 * config.eta * N / rank) if getattr(config, "eta", None) else config.alpha / rank
            A, B = layer.experts.A, layer.experts.B
            shared = isinstance(config, HydraLoRAConfig)
            weight = layer.base.weight if isinstance(config, GOATConfig) else base.weight
            update = sum(gate * B[e] @ (A[0 if shared else e] @ token) for e, gate in enumerate(gates))
            expected = weight @ token + b + s * update
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    if isinstance(config, AdaMoLEConfig):
        assert len(num_active) > 1  # else the threshold would not have been put to the test


@of_each(CONFIGS)
def test_gradients_are_those_of_finite_differences(config):
    layer, _ = moved_layer(config, 5, 4)
    x = tokens(3, 4, seed=2).requires_grad_()
    parameters = [p for group in layer.parameter_groups().values() for p in group]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


@of_each(LORA)
def test_delta_weight_of_each_expert_is_what_its_gate_weighs(config):
    layer, _ = moved_layer(config, 7, 5)
    x = tokens(6, 5)
    gates = layer.router(x).dense(4)
    updates = torch.stack([layer.experts.delta_weight(e) for e in range(4)])
    expected = layer.base(x) + torch.einsum("te,emn,tn->tm", gates, updates, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@of_each(LORA)
def test_merged_projection_is_the_adapted_one_where_all_tokens_have_the_same_gates(config):
    layer, _ = moved_layer(config, 7, 5)
    token = tokens(5)
    merged = layer.merged(layer.router(token).dense(4).detach())
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(token), layer(token), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="routes every token on its own; give the gates"):
        layer.merged()


def test_upcycled_experts_are_refused_by_a_merge():
    layer, _ = moved_layer(CONFIGS[-1], 7, 5)
    with pytest.raises(ValueError, match="FFTMoELinear: this method's update cannot be merged"):
        layer.merged()


@of_each(ONE_EACH)
@pytest.mark.parametrize("shape", [(7,), (0, 7), (1, 7), (2, 3, 4, 7)])
def test_any_leading_shape(config, shape):
    layer, _ = moved_layer(config, 5, 7)
    x = tokens(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y.reshape(-1, 5), layer(x.reshape(-1, 7)))


def test_upcycled_experts_compute_no_token_that_they_do_not_serve(monkeypatch):
    layer, _ = moved_layer(FFTMoEConfig(targets=["proj"], num_experts=16), 5, 7)
    x = tokens(6, 7)
    expected = layer(x)
    rows, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: rows.append(len(x)) or linear(x, *rest))
    torch.testing.assert_close(layer.experts(x, layer.router(x)), expected)
    rows.remove(6)  # the router
    assert sum(rows) == 6 * 2
    assert min(rows) >= 1


# ---------------------------------------------------------------- start


@of_each([config for config in CONFIGS if not isinstance(config, (GOATConfig, FFTMoEConfig))])
def test_adapted_model_starts_as_the_pretrained_one_bit_by_bit(config):
    model = Transformer().eval()
    inject(model, config)
    assert torch.equal(model(X), Transformer().eval()(X))


def test_upcycled_model_starts_as_the_pretrained_one():
    model = Transformer().eval()
    inject(model, CONFIGS[-1])
    torch.testing.assert_close(model(X), Transformer().eval()(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("M", "N"), [(8, 12), (13, 9), (9, 13)])
@of_each([config for config in CONFIGS if isinstance(config, GOATConfig)])
def test_goat_starts_with_the_first_triplets_of_every_segment(config, M, N):
    base = projection(M, N)
    layer = config.build_layer(copy.deepcopy(base), "proj").double()
    U, S, Vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    rank, length = config.r // 4, min(M, N) // 4
    rest = base.weight.detach().clone()
    for e in range(4):
        wanted = range(e * length, e * length + rank)
        expected = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in wanted) / config.rho
        torch.testing.assert_close(layer.experts.delta_weight(e), expected, rtol=1e-5, atol=1e-6)
        norms = torch.stack([S[i] for i in wanted]) / (layer.experts.scaling * config.rho)
        torch.testing.assert_close(layer.experts.A[e].square().sum(1), norms, rtol=1e-5, atol=1e-7)  # both halves alike
        torch.testing.assert_close(layer.experts.B[e].square().sum(0), norms, rtol=1e-5, atol=1e-7)
        rest -= expected / 4
    torch.testing.assert_close(layer.base.weight.detach(), rest, rtol=1e-5, atol=1e-6)


def test_goat_starts_at_the_pretrained_weight_where_gates_are_even_and_near_it_elsewhere():
    base = projection(16, 16)
    layer = replace(CONFIGS[7], rho=10.0).build_layer(copy.deepcopy(base), "proj").double()
    x = tokens(200, 16)
    away = (layer(x) - base(x)).norm() / base(x).norm()
    assert 0.01 < away < 0.1
    layer.router.weight.data.zero_()
    layer.router.top_k = 4
    torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-6)


@of_each(ONE_EACH)
def test_start_depends_on_seed_and_name_and_on_nothing_drawn_before(config):
    def start(seed, name="proj"):
        layer = replace(config, seed=seed).build_layer(projection(8, 8), name)
        return torch.cat([p.detach().flatten() for group in layer.parameter_groups().values() for p in group])

    torch.manual_seed(11)
    first, state = start(4), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert torch.equal(start(4), first)
    assert torch.equal(start(None), start(0))
    assert not torch.equal(start(5), first)
    assert not torch.equal(start(4, "other"), first)


# ---------------------------------------------------------------- counts and training


@of_each(CONFIGS)
def test_report_counts_by_the_formula_and_nothing_else_is_trained(config):
    model = Transformer()
    pretrained = sum(p.numel() for p in model.parameters())
    report = inject(model, config)
    M = N = 16
    experts = {
        HydraLoRAConfig: lambda: config.r * (N + 4 * M),
        FFTMoEConfig: lambda: 4 * (M * N + M),
    }.get(type(config), lambda: config.r * (M + N))()
    router = 4 * N + (N + 1 if isinstance(config, AdaMoLEConfig) else 0)
    replaced = 4 * (M * N + M) if isinstance(config, FFTMoEConfig) else 0
    rest = pretrained - 51 - replaced
    all_trained = config.trains_backbone()
    expected = {"experts": 4 * experts, "router": 4 * router, "head": 51, "backbone": rest if all_trained else 0}
    assert report.trained == expected
    assert report.frozen == (0 if all_trained else pretrained - 51)
    assert report.percent == pytest.approx(100 * report.total / (pretrained - 51))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.total


def losses(model, steps=20):
    model.train()
    model.norm.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(steps):
        with recording(model):
            task = nn.functional.cross_entropy(model(X), LABELS)
            loss = task + balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(task.item())
    return values


def trained(config):
    model = Transformer()
    inject(model, config)
    losses(model, 5)
    return model.eval()


@of_each(CONFIGS)
def test_training_reduces_the_loss_and_moves_all_that_is_trained_and_nothing_else(config):
    model = Transformer()
    inject(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = losses(model)
    assert values[-1] < 0.8 * values[0]
    for name, parameter in model.named_parameters():
        if "k_proj.bias" not in name:  # to which a softmax over the keys is blind
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@of_each(ONE_EACH)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_base_and_autocast_keep_the_trained_parameters_in_float32(config, autocast):
    model = Transformer() if autocast else Transformer().bfloat16()
    inject(model, config)
    assert {p.dtype for a in adapters(model).values() for group in a.parameter_groups().values() for p in group} == {
        torch.float32
    }
    x = X if autocast or isinstance(config, FFTMoEConfig) else X.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        layer = adapters(model)["layers.0.attention.q_proj"]
        assert layer(x).dtype == (torch.bfloat16 if autocast else x.dtype)
        y = model.eval()(x)
    torch.testing.assert_close(y.float(), Transformer().eval()(X), rtol=0.1, atol=0.1)


def test_dropout_acts_on_the_experts_and_not_on_router_and_base():
    layer, _ = moved_layer(replace(CONFIGS[0], dropout=0.5), 7, 5)
    x = tokens(6, 5)
    seen = []
    layer.router.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    noisy = layer(x)
    assert torch.equal(seen[0], x)
    assert not torch.equal(noisy, layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


# ---------------------------------------------------------------- balance loss and statistics


@of_each([config for config in ONE_EACH if not isinstance(config, HydraLoRAConfig)])
def test_balance_loss_is_that_of_the_tokens_that_are_no_padding(config):
    layer, _ = moved_layer(config, 5, 7)
    x, mask = tokens(2, 5, 7), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    with recording(layer, mask):
        layer(x)
        loss = layer.balance_loss()
    f, P = torch.zeros(2, 4, dtype=torch.float64)
    for token in x[mask]:
        p = torch.softmax(layer.router.weight @ token, -1).detach()
        if isinstance(config, AdaMoLEConfig):
            tau = torch.sigmoid(layer.router.threshold_weight[0] @ token + layer.router.threshold_bias) / 4
            p = (p - tau.detach()).clamp(min=0)
        gates = torch.tensor(gates_by_the_equations(config, layer, token), dtype=torch.float64)
        f, P = f + (gates > 0).double() / 7, P + p / 7
    torch.testing.assert_close(loss, config.balance_weight * 4 * (f * P).sum(), rtol=1e-9, atol=1e-12)
    (gradient, *_) = torch.autograd.grad(loss, list(layer.router.parameters()))
    assert gradient.abs().max() > 0


def test_hydralora_has_no_balance_loss_and_its_load_is_even():
    layer, _ = moved_layer(CONFIGS[6], 5, 7)
    reader = StatisticsReader(layer)
    with recording(layer):
        layer(tokens(6, 7))
        assert layer.balance_loss() is None
    statistics = reader.read()["router"]
    assert statistics.counts.tolist() == [6] * 4
    assert (float(statistics.active), float(statistics.spread)) == (4, 1)
    assert float(statistics.gate.sum()) == pytest.approx(1)


def test_statistics_of_a_threshold_count_however_many_experts_a_token_has():
    layer, _ = moved_layer(CONFIGS[5], 5, 7)
    x, mask = tokens(2, 9, 7), torch.ones(2, 9).bool()
    mask[0, 4:] = False
    reader = StatisticsReader(layer)
    with recording(layer, mask, ["a", "b"]):
        layer(x)
        loss = layer.balance_loss() / layer.balance_weight
    gates = torch.tensor([gates_by_the_equations(CONFIGS[5], layer, token) for token in x[mask]])
    served = (gates > 0).double()
    assert set(served.sum(-1).tolist()) >= {0, 1, 2}
    statistics = reader.read()["router"]
    assert statistics.tokens == 13
    assert {task: int(own.tokens) for task, own in statistics.by_task.items()} == {"a": 4, "b": 9}
    assert statistics.counts.tolist() == served.sum(0).tolist()
    assert float(statistics.active) == pytest.approx(float(served.sum(-1).mean()))
    torch.testing.assert_close(statistics.gate, gates.sum(0) / served.sum(0).clamp(min=1), rtol=1e-6, atol=1e-8)
    assert float(statistics.balance_loss) == pytest.approx(float(loss))
    assert float(statistics.load_imbalance) == pytest.approx(float(served.sum(0).max() / served.sum(0).mean()))


def test_token_without_an_expert_gets_the_base_s_output_and_the_dead_are_seen():
    layer, base = moved_layer(replace(CONFIGS[5], max_threshold=1.0), 5, 7)
    layer.router.threshold_bias.data.fill_(50.0)  # tau = 1
    x = tokens(6, 7)
    reader = StatisticsReader(layer)
    with recording(layer):
        y = layer(x)
        loss = layer.balance_loss()
    assert torch.equal(y, base(x))
    (y.sum() + loss).backward()
    assert all(p.grad.isfinite().all() for group in layer.parameter_groups().values() for p in group)
    statistics = reader.read()["router"]
    assert (int(statistics.tokens), float(statistics.active), float(loss)) == (6, 0, 0)
    assert statistics.dead(0.01).all()
    assert not statistics.dead(0).any()
    assert float(statistics.spread) < 0.3


@pytest.mark.parametrize("checkpointed", [False, True])
@of_each(ONE_EACH)
def test_activation_checkpointing_counts_once_and_keeps_all_gradients(config, checkpointed):
    model = trained(config)
    expected, plain = losses_and_gradients(model, False), losses_and_gradients(model, checkpointed)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-6)
    assert plain["tokens"].tolist() == [40] * 4


def losses_and_gradients(model, checkpointed):
    model.zero_grad()
    reader = StatisticsReader(model)
    with recording(model):
        hidden = X
        for block in model.layers:
            hidden = checkpoint(block, hidden, use_reentrant=False) if checkpointed else block(hidden)
        balance = balance_loss(model)
        loss = model.classifier(model.norm(hidden.mean(1))).square().mean() + 10 * balance
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    tokens = torch.stack([statistics.tokens for statistics in reader.read().values()])
    return {**gradients, "balance": balance.detach(), "tokens": tokens}


# ---------------------------------------------------------------- files


@of_each(CONFIGS)
def test_file_gives_a_fresh_model_the_same_outputs(config, tmp_path):
    model = trained(config)
    save_adapter(model, tmp_path)
    fresh = Transformer().eval()
    assert load_adapter(fresh, tmp_path).config == config
    assert torch.equal(fresh(X), model(X))
    assert not torch.equal(fresh(X), Transformer().eval()(X))
    state = load_file(tmp_path / "adapter.safetensors")
    if not config.trains_backbone():
        assert not [key for key in state if ".base." in key]
        assert sum(tensor.numel() for tensor in state.values()) == inject(Transformer(), config).total


@of_each(ONE_EACH)
def test_file_of_other_experts_is_refused(config, tmp_path):
    save_adapter(trained(config), tmp_path)
    model = Transformer()
    inject(model, replace(config, num_experts=2))
    with pytest.raises(ValueError, match="num_experts: 4 against 2"):
        load_adapter(model, tmp_path)


@of_each(ONE_EACH)
def test_file_goes_on_with_another_seed_dropout_and_balance_weight_but_no_other_value(config):
    other = {"seed": 99, "dropout": 0.5, "balance_weight": 0.5}
    other = {name: value for name, value in other.items() if hasattr(config, name)}
    assert config.difference(replace(config, **other)) is None
    for name in ("r", "alpha", "top_k", "max_threshold", "rho"):
        if value := getattr(config, name, None):
            changed = replace(config, **{name: value * 2 if name in ("r", "alpha", "rho") else value + 1})
            assert config.difference(changed).startswith(f"{name}: ")


@of_each(CONFIGS)
def test_config_survives_json(config):
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ---------------------------------------------------------------- other projections


@of_each([config for config in ONE_EACH if isinstance(config, (GOATConfig, FFTMoEConfig, MoLoRAConfig))])
def test_conv1d_of_transformers_is_adapted(config):
    model = nn.Sequential(Conv1D(6, 16))
    expected = model(X)
    (adapted,) = inject(model, replace(fitting(config, 6, 16), targets=["0"], head=[])).projections
    assert (adapted.in_features, adapted.out_features) == (16, 6)
    torch.testing.assert_close(model(X), expected, rtol=0.2, atol=0.1 if isinstance(config, GOATConfig) else 1e-6)


def test_goat_leaves_a_module_alone_whose_weight_is_tied_to_a_target():
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 16), "output": nn.Linear(16, 16, bias=False)})
    model["output"].weight = model["embedding"].weight
    expected = model["embedding"].weight.detach().clone()
    inject(model, GOATConfig(targets=["output"], r=8))
    assert torch.equal(model["embedding"].weight, expected)
    assert not torch.equal(adapters(model)["output"].base.weight, expected)


@of_each(ONE_EACH)
def test_copy_of_an_adapted_model_stands_on_its_own(config):
    model = trained(config)
    expected, twin = model(X), copy.deepcopy(model)
    assert torch.equal(twin(X), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(model(X), expected)


# ---------------------------------------------------------------- refusals


class QuantizedLinear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.in_features = self.out_features = 16
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GOATConfig(targets=["q_proj", "packed"]),
            "^GOATConfig computes with the pretrained weights, and those of 'packed' are",
        ),
        (FFTMoEConfig(targets=["q_proj", "packed"]), "^FFT MoE trains the pretrained weights, and these are quantised"),
        (FFTMoEConfig(targets=["q_proj"]), "^FFT MoE trains the pretrained weights, and these are quantised"),
    ],
)
def test_quantised_weight_is_refused_by_methods_that_start_from_it(config, message):
    model = Transformer()
    model.packed = QuantizedLinear(torch.ones(16, 16, dtype=torch.int8))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        inject(model, config)
    assert "\n" not in str(error.value)
    assert not adapters(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_other_mixtures_take_a_quantised_projection_as_it_is():
    model = nn.ModuleDict({"packed": QuantizedLinear(torch.ones(16, 16, dtype=torch.int8))})
    for config in (MoLoRAConfig, AdaMoLEConfig, HydraLoRAConfig):
        assert inject(copy.deepcopy(model), config(targets=["packed"])).total > 0


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (MoLoRAConfig, {"num_experts": 0}, "MoLoRAConfig: num_experts=0 must be at least 1"),
        (MoLoRAConfig, {"r": 30}, "r=30 must be a positive multiple of num_experts=8, .* nearest valid: 24 or 32$"),
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
        (FFTMoEConfig, {"balance_weight": float("nan")}, "balance_weight=nan must be 0 or more"),
        (FFTMoEConfig, {"targets": []}, "targets is empty"),
    ],
)
def test_impossible_value_is_named(config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(**{"targets": ["q_proj"], **options})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MoLoRAConfig(targets=["q_proj", "small"], r=40), "^small is 4 x 16: r=40 must be at most 32$"),
        (HydraLoRAConfig(targets=["q_proj", "small"], r=5), "^small is 4 x 16: r=5 must be at most 4$"),
        (GOATConfig(targets=["q_proj", "small"], r=8), "^small is 4 x 16: r=8 must be at most 0$"),
        (GOATConfig(targets=["q_proj", "small"], num_experts=4, r=8), "^small is 4 x 16: r=8 must be at most 4$"),
    ],
)
def test_rank_that_a_projection_has_no_room_for_is_one_message_before_anything_changes(config, message):
    model = Transformer()
    model.small = nn.Linear(16, 4)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        inject(model, config)
    assert not adapters(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
