"""KaSA, MiLoRA, LoRA-Dash, TopLoRA and MELoRA against their equations in float64, token by token where a token matters."""

import copy
import json
import math
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.method_configs import DASH, KASA, MELORA, MILORA, TOP
from support.method_configs import LORA_RELATIVES as CONFIGS
from support.models import Transformer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fourier_moe import (
    KaSAConfig,
    LoRADashConfig,
    MELoRAConfig,
    MiLoRAConfig,
    TopLoRAConfig,
    adapter_state_dict,
    adapters,
    after_step,
    inject,
    load_adapter,
    regularization,
    save_adapter,
)
from fourier_moe.files.format import config_of

SIZES = [(12, 20), (20, 12), (16, 16)]  # (out, in)
X = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3


def of_each(configs=CONFIGS):
    return pytest.mark.parametrize("config", configs, ids=lambda config: type(config).__name__)


def layer_of(config, M, N, moved=True):
    """An adapted M x N projection, its pretrained weight and bias in float64, and its trained tensors, at random if `moved`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M))
    weight, bias = (p.detach().double().clone() for p in model[0].parameters())
    inject(model, replace(config, targets=["0"], head=[]))
    generator = torch.Generator().manual_seed(7)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained if moved else ():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model[0], weight, bias, [p.detach().double() for p in trained]


def tokens(N):
    return torch.randn(2, 3, N, generator=torch.Generator().manual_seed(2))


def assert_equal(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# ---------------------------------------------------------------- equations


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_milora_starts_as_the_smallest_triplets_and_trains_beside_what_is_left(M, N):
    layer, W, bias, (A, B) = layer_of(MILORA, M, N, moved=False)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    smallest = (U[:, -4:] * S[-4:]) @ Vh[-4:]
    assert_equal(2 * B @ A, smallest)
    assert_equal(B.norm(dim=0), (S[-4:] / 2).sqrt())  # half of S on each side
    assert_equal(A.norm(dim=1), (S[-4:] / 2).sqrt())
    assert_equal(layer.base.weight.detach(), W - smallest)
    assert_equal(layer(tokens(N)), tokens(N).double() @ W.T + bias)

    layer, W, bias, (A, B) = layer_of(MILORA, M, N)
    assert_equal(layer(tokens(N)), tokens(N).double() @ (W - smallest + 2 * B @ A).T + bias)


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_kasa_trains_a_diagonal_beside_the_weight_without_its_smallest_triplets(M, N):
    layer, W, bias, (A, B, d) = layer_of(KASA, M, N)
    assert (A.shape, B.shape, d.shape) == ((4, N), (M, 4), (4,))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = (U[:, :-4] * S[:-4]) @ Vh[:-4]
    assert_equal(layer(tokens(N)), tokens(N).double() @ (kept + 2 * B @ torch.diag(d) @ A).T + bias)
    assert_equal(layer.regularization(), kasa_penalty([(A, B, d)], 0.3, 0.2))


def kasa_penalty(layers, beta, gamma):
    """The authors' penalty with their Gram matrices, of all layers' A, B and d."""
    total = 0
    for A, B, d in layers:
        grams = [A.T @ A, B @ B.T]
        distances = [torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype)) for gram in grams]
        total = total + beta * d.square().sum() + gamma * sum(distances)
    return total / len(layers)


def kasa_tensors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]


def test_kasa_penalty_is_its_authors_in_value_and_gradient():
    model = Transformer()
    inject(model, KASA)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is zero at first, where its penalty has no slope
        (model(X).square().mean() + regularization(model)).backward()
        optimizer.step()
    model.zero_grad()
    tensors = [kasa_tensors(adapter.layer) for adapter in adapters(model).values()]
    trained = [tensor for layer in tensors for tensor in layer]
    total, expected = regularization(model), kasa_penalty(tensors, 0.3, 0.2)
    torch.testing.assert_close(total, expected)
    gradients = torch.autograd.grad(total, trained)
    assert len(gradients) == 12
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, trained))


def test_kasa_penalty_does_not_grow_with_the_number_of_projections():
    penalties = []
    for layers in (1, 5):
        model = Transformer(layers=layers)
        inject(model, replace(KASA, beta=0.0))
        with torch.no_grad():
            for adapter in adapters(model).values():
                for tensor in kasa_tensors(adapter.layer):
                    tensor.fill_(0.1)
        penalties.append(float(regularization(model)))
    assert penalties[0] == pytest.approx(penalties[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kasa_losses_are_those_of_peft_itself_with_the_authors_penalty(dtype):
    ours, theirs = Transformer().to(dtype), Transformer().to(dtype)
    inject(ours, KASA)
    torch.manual_seed(KASA.seed)
    kasa = peft.KasaConfig(beta=0.3, gamma=0.2)
    peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, kasa_config=kasa, target_modules=["q_proj", "v_proj"]))
    theirs.classifier.requires_grad_(True)
    layers = [kasa_tensors(module) for module in theirs.modules() if hasattr(module, "lora_diag")]
    expected = train(theirs, penalty=lambda _: kasa_penalty(layers, 0.3, 0.2))
    assert train(ours) == pytest.approx(expected, rel=1e-6)


@of_each([MILORA, DASH, TOP, MELORA])
def test_other_methods_have_no_penalty(config):
    model = Transformer()
    inject(model, config)
    assert regularization(model) == 0
    assert not regularization(model).requires_grad


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_lora_dash_is_lora_and_then_scales_the_directions_that_change_most(M, N):
    layer, W, bias, (A, B, t) = layer_of(DASH, M, N)
    x = tokens(N).double()
    assert t.shape == (5,)
    lora = x @ (W + 2 * B @ A).T + bias
    for _ in range(2):
        layer.after_step()
    assert_equal(layer(tokens(N)), lora)
    layer.after_step()  # the third optimiser step

    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    change = [abs(float(U[:, i] @ (2 * B @ A) @ Vh[i])) / float(S[i]) for i in range(len(S))]
    chosen = sorted(range(len(S)), key=change.__getitem__, reverse=True)[:5]
    assert chosen != sorted(chosen)
    extra = sum(t[k] * torch.outer(U[:, i], Vh[i]) for k, i in enumerate(chosen))
    assert_equal(layer(tokens(N)), lora + x @ extra.T)
    before = copy.deepcopy(dict(layer.named_buffers()))
    layer.B.data += 1.0
    layer.after_step()
    assert {name: torch.equal(value, before[name]) for name, value in layer.named_buffers()} == {
        "steps": False,
        "U": True,
        "V": True,
    }


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_toplora_weighs_its_directions_for_every_token(M, N):
    layer, W, bias, (A, B, Q, gain) = layer_of(TOP, M, N)
    x = tokens(N).double().flatten(0, 1)
    expected = []
    for token in x:
        scores = Q @ token
        normalized = scores / (scores.square().mean() + torch.finfo(torch.float32).eps).sqrt()
        weights = torch.exp(gain * normalized)
        expected.append(W @ token + bias + 2 * B @ (weights * (A @ token)))
    assert_equal(layer(tokens(N)).flatten(0, 1), torch.stack(expected))
    assert A.shape == Q.shape == (4, N)
    assert gain.shape == (4,)


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_melora_is_a_block_diagonal_update(M, N):
    layer, W, bias, (A, B) = layer_of(MELORA, M, N)
    update = torch.block_diag(*(4 * B[i] @ A[i] for i in range(4)))
    assert update.shape == (M, N)
    assert torch.linalg.matrix_rank(update) == 8  # r times the blocks
    assert_equal(layer(tokens(N)), tokens(N).double() @ (W + update).T + bias)


@of_each([TOP, DASH, MELORA])
def test_random_start_is_kaiming_uniform_as_that_of_lora_s_a(config):
    layer, _, _, (A, B, *_) = layer_of(replace(config, r=8, alpha=8), 64, 1024, moved=False)
    assert torch.count_nonzero(B) == 0
    for start in (A, layer.Q) if config is TOP else (A,):
        bound = start.shape[-1] ** -0.5
        assert 0.99 * bound < start.abs().max() <= bound
        assert float(start.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@of_each([DASH, TOP, MELORA])
def test_dropout_acts_on_the_input_of_a_in_training_only(config):
    layer, _, _, _ = layer_of(replace(config, dropout=0.5), 16, 16)
    plain, _, _, _ = layer_of(config, 16, 16)
    x = tokens(16)
    assert torch.equal(layer.eval()(x), plain(x))
    torch.manual_seed(0)
    found = layer.train()(x) - layer.base(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    if config is TOP:  # the weights of the directions see the whole token
        low = nn.functional.rms_norm(x @ layer.Q.T, (4,), layer.gain).exp() * (dropped @ layer.A.T)
        expected = 2 * low @ layer.B.T
    else:
        expected = plain(dropped) - plain.base(dropped)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- models


@of_each([MILORA, DASH, TOP, MELORA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_adapted_model_starts_as_the_pretrained_one_in_its_dtype_and_trains_in_float32(config, dtype):
    model = Transformer().to(dtype).eval()
    inject(model, config)
    found, expected = model(X.to(dtype)), Transformer().to(dtype).eval()(X.to(dtype))
    rough = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **rough)
    assert {p.dtype for adapter in adapters(model).values() for p in adapter.parameter_groups()["adapter"]} == {torch.float32}


COUNTS = {
    KaSAConfig: lambda M, N: 4 * (M + N) + 4,
    MiLoRAConfig: lambda M, N: 4 * (M + N),
    LoRADashConfig: lambda M, N: 4 * (M + N) + 5,
    TopLoRAConfig: lambda M, N: 4 * (M + 2 * N) + 4,
    MELoRAConfig: lambda M, N: 2 * (M + N),
}


@of_each()
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_are_counted_by_the_formula_and_nothing_else_is_trained(config, device):
    with torch.device(device):
        model = nn.ModuleDict({"q_proj": nn.Linear(20, 12), "v_proj": nn.Linear(12, 16), "classifier": nn.Linear(4, 2)})
    report = inject(model, config)
    expected = COUNTS[type(config)](12, 20) + COUNTS[type(config)](16, 12)
    assert report.trained == {"experts": 0, "router": 0, "head": 10, "backbone": 0, "adapter": expected}
    assert report.frozen == 12 * 20 + 12 + 16 * 12 + 16
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected + 10
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}


def train(model, steps=12, penalty=regularization):
    model.train()
    model.norm.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X.to(model.classifier.weight.dtype)).float(), LABELS)
        (loss + penalty(model)).backward()
        optimizer.step()
        after_step(model)
        losses.append(loss.item())
    return losses


@of_each()
def test_training_reduces_the_loss_moves_every_adapter_tensor_and_no_frozen_one(config):
    model = Transformer()
    inject(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@of_each()
def test_start_depends_on_the_seed_only_and_draws_nothing_that_others_would_miss(config):
    def start(seed):
        model = Transformer()
        inject(model, replace(config, seed=seed))
        return torch.cat([p.flatten() for adapter in adapters(model).values() for p in adapter.parameter_groups()["adapter"]])

    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = start(4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert torch.equal(start(4), first)
    assert torch.equal(start(5), first) == (config is MILORA)
    assert torch.equal(start(None), start(0))


@of_each([MILORA, DASH, TOP, MELORA])
def test_conv1d_of_transformers_is_adapted(config):
    model = nn.Sequential(Conv1D(8, 16))
    expected = model(X)
    inject(model, replace(config, targets=["0"], head=[]))
    torch.testing.assert_close(model(X), expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained[0].shape[-1] == (4 if config is MELORA else 16)
    if config is DASH:
        trained[1].data.normal_()
        for _ in range(3):
            after_step(model)
        W = model[0].base.weight.detach().T
        torch.testing.assert_close((model[0].U.T @ W @ model[0].V.T), torch.diag((model[0].U.T @ W @ model[0].V.T).diag()))


def test_kasa_and_milora_leave_a_module_alone_whose_weight_is_tied_to_a_target():
    for config in (KASA, MILORA):
        model = nn.ModuleDict({"embedding": nn.Embedding(16, 16), "output": nn.Linear(16, 16, bias=False)})
        model["output"].weight = model["embedding"].weight
        expected = model["embedding"].weight.detach().clone()
        inject(model, replace(config, targets=["output"], head=[]))
        assert torch.equal(model["embedding"].weight, expected)
        assert not torch.equal(adapters(model)["output"].base.weight, expected)


# ---------------------------------------------------------------- files and resuming


@of_each()
def test_file_gives_a_fresh_model_the_same_outputs_and_config_survives_json(config, tmp_path):
    model = Transformer()
    inject(model, config)
    train(model)
    save_adapter(model, tmp_path)
    fresh = Transformer().eval()
    assert load_adapter(fresh, tmp_path).config == config
    assert torch.equal(fresh(X), model.eval()(X))
    assert not torch.equal(fresh(X), Transformer().eval()(X))
    assert not any(".base." in name for name in load_file(tmp_path / "adapter.safetensors"))
    assert config_of(json.loads(json.dumps(config.to_dict()))) == config
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))


@pytest.mark.parametrize("interrupted", [1, 2, 3, 4, 7])
def test_lora_dash_resumes_at_any_step_as_if_it_had_not_stopped(interrupted):
    def steps(model, number):
        for _ in range(number):
            model.zero_grad()
            nn.functional.cross_entropy(model(X), LABELS).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.1 * parameter.grad
            after_step(model)
        model(X)  # evaluation counts nothing
        return adapter_state_dict(model)

    whole, first, second = Transformer().eval(), Transformer().eval(), Transformer().eval()
    for model in (whole, first, second):
        inject(model, DASH)
    expected = steps(whole, 8)
    second.load_state_dict(steps(first, interrupted), strict=False)
    found = steps(second, 8 - interrupted)
    assert {name: torch.equal(value, found[name]) for name, value in expected.items()} == dict.fromkeys(found, True)
    assert expected["layers.0.attention.q_proj.steps"] == 8
    assert expected["layers.0.attention.q_proj.t"].abs().max() > 0


def test_lora_dash_reads_a_weight_that_is_sharded_over_processes(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    sharded, _, _, _ = layer_of(DASH, 12, 20)
    whole, _, _, _ = layer_of(DASH, 12, 20)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded.base.weight = nn.Parameter(distribute_tensor(sharded.base.weight.detach(), mesh, [Shard(0)]))
        for layer in (sharded, whole):
            layer.choose_directions()
    finally:
        dist.destroy_process_group()
    assert torch.equal(sharded.U, whole.U)
    assert whole.U.abs().max() > 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (MiLoRAConfig, {"r": 0}, "r=0 must be at least 1"),
        (TopLoRAConfig, {"alpha": 0.0}, "alpha=0.0 must be a positive number"),
        (MELoRAConfig, {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        (MELoRAConfig, {"num_blocks": 0}, "num_blocks=0 must be at least 1"),
        (LoRADashConfig, {"num_directions": 0}, "num_directions=0 must be at least 1"),
        (LoRADashConfig, {"start": 0}, "start=0 must be at least 1"),
        (KaSAConfig, {"beta": -1.0}, "beta=-1.0 must be 0 or more"),
        (KaSAConfig, {"gamma": float("nan")}, "gamma=nan must be 0 or more"),
        (TopLoRAConfig, {"targets": []}, "targets is empty"),
    ],
)
def test_impossible_value_is_named(config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(**{"targets": ["q_proj"], **options})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (KASA, "^small is 4 x 16: r=4 must be at most 3$"),
        (replace(MILORA, r=5), "^small is 4 x 16: r=5 must be at most 4$"),
        (replace(DASH, r=5, num_directions=4), "^small is 4 x 16: r=5 must be at most 4$"),
        (replace(DASH, num_directions=5), "^small is 4 x 16: num_directions=5 must be at most 4$"),
        (replace(TOP, r=5), "^small is 4 x 16: r=5 must be at most 4$"),
        (replace(MELORA, num_blocks=8), "^small is 4 x 16: num_blocks=8 must divide both sizes$"),
        (replace(MELORA, r=2, num_blocks=4), "^small is 4 x 16: r=2 must be at most 1$"),
        (KASA, "^turned: KaSAConfig cannot adapt a Conv1D: "),
    ],
)
def test_adapter_that_cannot_fit_is_one_message_and_leaves_the_model_as_it_was(config, message):
    model = Transformer()
    model.small, model.turned = nn.Linear(16, 4), Conv1D(16, 16)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        inject(model, replace(config, targets=["q_proj", "turned" if "Conv1D" in message else "small"]))
    assert not adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    state = model.state_dict()
    assert {name: torch.equal(state[name], value) for name, value in expected.items()} == dict.fromkeys(state, True)


class Quantized(nn.Linear):
    """What bitsandbytes' int8 looks like from outside."""

    def __init__(self):
        super().__init__(16, 16)
        self.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x


@of_each()
def test_quantised_weight_is_refused_where_it_is_read(config):
    model = nn.ModuleDict({"q_proj": Quantized()})
    config = replace(config, targets=["q_proj"], head=[])
    if config.reads_weights:
        with pytest.raises(ValueError, match=f"^{type(config).__name__} computes with the pretrained weights, and those of"):
            inject(model, config)
    else:
        inject(model, config)
        assert torch.equal(model["q_proj"](X), X)
    assert config.reads_weights == (not isinstance(config, TopLoRAConfig | MELoRAConfig))


def test_kasa_says_which_peft_it_needs(monkeypatch):
    monkeypatch.setattr("fourier_moe.baselines.singular.version", lambda _: "0.20.1.dev0")
    with pytest.raises(ValueError, match=r"^KaSAConfig: needs peft 0.21 or newer, and 0.20.1.dev0 is installed"):
        KaSAConfig(targets=["q_proj"])
    MiLoRAConfig(targets=["q_proj"])
