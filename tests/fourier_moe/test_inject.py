"""Injection: what is matched, replaced, frozen, shared and counted."""

import pytest
import torch
from support.models import Transformer, config, randomize
from torch import nn

from fourier_moe import (
    FourierMoELinear,
    FullFineTuning,
    HeadOnly,
    ProjectionAdapterConfig,
    adapter_state_dict,
    adapters,
    inject,
    load_adapter,
    recording,
    save_adapter,
)

Q_AND_V = [f"layers.{i}.attention.{p}" for i in range(2) for p in ("q_proj", "v_proj")]


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def projection_count(width=16, n=32, experts=4):
    return n + experts * width


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], Q_AND_V),
        (["attention.q_proj"], Q_AND_V[::2]),
        (["layers.1.attention.v_proj"], Q_AND_V[3:]),
        ([r"layers\.0\..*_proj"], [f"layers.0.attention.{p}_proj" for p in ("q", "k", "v", "out")]),
        ([r".*\.[qv]_proj"], Q_AND_V),
        ([r"layers\.0\..*q_proj", "layers.1.attention.v_proj"], [Q_AND_V[0], Q_AND_V[3]]),
    ],
)
def test_targets_match_by_suffix_and_by_regular_expression(targets, expected):
    model = Transformer()
    report = inject(model, config(targets=targets))
    assert list(adapters(model)) == expected
    assert [p.name for p in report.projections] == expected
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith(".base")}
    assert linears == {n for n, m in Transformer().named_modules() if isinstance(m, nn.Linear)} - set(expected)


@pytest.mark.parametrize("entry", ["proj", "_proj", "q_pro", "attention.q", "ttention.q_proj", "Q_PROJ"])
def test_part_of_a_name_does_not_match(entry):
    with pytest.raises(ValueError, match=f"targets entry '{entry}' matches no module"):
        inject(Transformer(), config(targets=["v_proj", entry]))


def test_error_lists_near_names():
    with pytest.raises(ValueError, match=r"near names: .*q_proj"):
        inject(Transformer(), config(targets=["q_porj"]))
    with pytest.raises(ValueError, match=r"head entry 'clasifier' matches no module .* near names: classifier"):
        inject(Transformer(), config(head=["clasifier"]))
    with pytest.raises(ValueError, match=r"its modules are called: .*classifier.*q_proj"):
        inject(Transformer(), config(targets=["zzzzzzzz"]))


def test_everything_but_adapters_and_head_is_frozen():
    model = Transformer()
    inject(model, config(head=["classifier"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"{name}.{part}" for name in Q_AND_V for part in ("experts.coefficients", "router.weight")}
    assert trained == expected | {"classifier.weight", "classifier.bias"}


def test_report_counts_and_percent():
    model = Transformer()
    pretrained = sum(p.numel() for p in model.parameters())
    head = 16 * 3 + 3
    report = inject(model, config(head=["classifier"]))
    assert report.trained == {"experts": 4 * 32, "router": 4 * 64, "head": head, "backbone": 0}
    assert report.total == 4 * projection_count() + head
    assert report.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.frozen == pretrained - head
    assert report.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert report.percent == pytest.approx(100 * report.total / report.frozen)


def test_report_prints_as_a_table():
    lines = str(inject(Transformer(), config(head=["classifier"]))).splitlines()
    assert lines[0].split() == ["adapted", "count", "out", "x", "in", "experts", "router"]
    assert lines[1].split() == ["q_proj", "2", "16", "x", "16", "64", "128"]
    assert lines[2].split() == ["v_proj", "2", "16", "x", "16", "64", "128"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3] == "trained parameters: 435 (experts 128, router 256, head 51), 19.15 % of the pretrained model's"
    assert lines[4] == "frozen parameters:  2,272"


def test_report_without_projections_prints():
    lines = str(inject(Transformer(), HeadOnly(head=["classifier"]))).splitlines()
    assert lines == [
        "trained parameters: 51 (head 51), 2.24 % of the pretrained model's",
        "frozen parameters:  2,272",
    ]


@pytest.mark.parametrize("head", [["classifier"], ["classifier", "classifier.0"], ["classifier.*"]])
def test_overlapping_head_entries_count_each_parameter_once(head):
    model = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "classifier": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))})
    report = inject(model, config(targets=["q_proj"], head=head))
    assert report.trained["head"] == 16 * 17 + 2 * 17
    assert report.frozen == 16 * 17


@pytest.mark.parametrize("name", ["router", "experts", "base", "dropout"])
def test_head_may_be_called_like_a_part_of_an_adapter(name):
    model = nn.ModuleDict({"q_proj": nn.Linear(16, 16), name: nn.Linear(16, 2)})
    report = inject(model, config(targets=["q_proj"], head=[name]))
    assert report.trained == {"experts": 32, "router": 64, "head": 34, "backbone": 0}
    assert report.frozen == 16 * 17
    assert len(adapter_state_dict(model)) == 3 + 2


class Shared(nn.Module):
    """One projection under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.ModuleDict({"q_proj": nn.Linear(16, 16)}), nn.ModuleDict()
        self.second["q_proj"] = self.first["q_proj"]

    def forward(self, x):
        return self.second["q_proj"](self.first["q_proj"](x))


class SharedParent(Shared):
    """One block under two names."""

    def __init__(self):
        super().__init__()
        self.second = self.first


@pytest.mark.parametrize("kind", [Shared, SharedParent])
@pytest.mark.parametrize("targets", [["q_proj"], ["first.q_proj", "second.q_proj"]])
def test_shared_projection_is_adapted_once_and_stays_shared(kind, targets):
    model = kind()
    report = inject(model, config(targets=targets))
    assert model.first["q_proj"] is model.second["q_proj"]
    assert isinstance(model.first["q_proj"], FourierMoELinear)
    assert type(model.first["q_proj"].base) is nn.Linear
    assert len(adapters(model)) == len(report.projections) == 1
    assert report.total == projection_count()
    assert model(tokens(3, 16)).shape == (3, 16)


def test_module_that_is_no_projection_is_an_error():
    with pytest.raises(ValueError, match=r"targets match 'layers.0.norm': LayerNorm is no linear projection"):
        inject(Transformer(), config(targets=["layers.0.norm"]))
    with pytest.raises(ValueError, match=r"targets match 'layers.0.attention': Attention is no linear projection"):
        inject(Transformer(), config(targets=["attention"]))


@pytest.mark.parametrize("second", [config(), HeadOnly(head=["classifier"]), FullFineTuning()])
def test_injecting_twice_is_an_error(second):
    model = Transformer()
    inject(model, config())
    with pytest.raises(ValueError, match="adapted already"):
        inject(model, second)


def test_failed_injection_may_be_repeated_with_a_better_config():
    model = Transformer()
    with pytest.raises(ValueError, match="matches no module"):
        inject(model, config(targets=["nothing"]))
    assert len(inject(model, config()).projections) == 4


class Uneven(Transformer):
    """Two blocks, a fused attention, and a projection too small for the bands."""

    def __init__(self):
        super().__init__(layers=2)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.fused = nn.MultiheadAttention(16, 2, batch_first=True)
            self.narrow = nn.ModuleDict({"down": nn.Linear(16, 4), "v_proj": nn.Linear(4, 4), "up": nn.Linear(4, 16)})
        self.classifier.requires_grad_(False)  # a mixture, to see that it comes back

    def forward(self, x):
        x = self.layers(x)
        x = x + self.fused(x, x, x, need_weights=False)[0]
        x = x + self.narrow["up"](self.narrow["v_proj"](self.narrow["down"](x)))
        return self.classifier(self.norm(x.mean(1)))


def test_injection_that_fails_half_way_leaves_the_model_as_it_was(tmp_path):
    model, x = Uneven().eval(), tokens(4, 5, 16)
    modules = dict(model.named_modules())
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    before = model(x)
    with pytest.raises(ValueError, match=r"narrow\.v_proj: num_coefficients asks for 4 .* in a 4 x 4 projection"):
        inject(model, config(head=["classifier"]))
    assert model._modules.keys() == Uneven()._modules.keys()
    now = dict(model.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[name] is module for name, module in modules.items())  # also the fused attention, which was split before
    assert {name: set(vars(module)) for name, module in now.items()} == attributes
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == parameters
    assert torch.equal(model(x), before)

    later = config(targets=[r"layers.*\.[qv]_proj", "fused.q_proj"], head=["classifier"])
    assert len(inject(model, later).projections) == 5
    randomize(model)
    assert not torch.equal(model(x), before)
    fresh = Uneven().eval()
    load_adapter(fresh, save_adapter(model, tmp_path))
    assert torch.equal(fresh(x), model(x))


def test_encoder_layers_of_torch_keep_their_fused_kernel_after_a_failed_injection():
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), "linear1": nn.Linear(4, 4)})
    kernel = model["encoder"].activation_relu_or_gelu
    assert kernel != 0
    with pytest.raises(ValueError, match="linear1: num_coefficients asks for"):
        inject(model, config(targets=["linear1"]))
    assert model["encoder"].activation_relu_or_gelu == kernel
    assert type(model["encoder"].self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("second", [config(), HeadOnly(head=["classifier"]), FullFineTuning()])
def test_model_of_which_a_part_is_adapted_is_refused(second):
    model = Transformer()
    inject(model.layers[1], config())
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="adapted already, or a part of it is"):
        inject(model, second)
    assert [name for name, _ in model.named_modules()] == names


class Unbuilt(ProjectionAdapterConfig):
    """A config that no layer is registered for."""


def test_config_without_a_layer_says_how_one_is_registered():
    with pytest.raises(ValueError, match=r"Unbuilt has no layer; decorate one with @layer_of\(Unbuilt\)"):
        inject(Transformer(), Unbuilt(targets=["q_proj"]))


def test_method_that_would_train_nothing_is_refused():
    model = Transformer()
    with pytest.raises(ValueError, match="HeadOnly would train nothing of this model; name a head"):
        inject(model, HeadOnly())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert inject(model, HeadOnly(head=["classifier"])).total == 51


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (["head"], {"head"}),
        (["tower.head"], {"tower.head"}),
        ([r".*head"], {"head", "tower.head"}),
        (["head", "tower.head"], {"head", "tower.head"}),
    ],
)
def test_head_matches_whole_names_and_patterns_but_no_ends_of_names(head, expected):
    model = nn.ModuleDict({"tower": nn.ModuleDict({"head": nn.Linear(4, 4)}), "head": nn.Linear(4, 2)})
    inject(model, HeadOnly(head=head))
    assert {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == expected


def test_end_of_a_name_is_no_head():
    model = nn.ModuleDict({"tower": nn.ModuleDict({"head": nn.Linear(4, 4)})})
    with pytest.raises(ValueError, match=r"head entry 'head' matches no module of the model; near names: .*tower\.head"):
        inject(model, HeadOnly(head=["head"]))


def test_target_inside_the_head_is_trained_in_full_and_not_adapted():
    model = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "classifier": nn.ModuleDict({"q_proj": nn.Linear(16, 16)})})
    report = inject(model, config(targets=["q_proj"], head=["classifier"]))
    assert list(adapters(model)) == ["q_proj"]
    assert type(model["classifier"]["q_proj"]) is nn.Linear
    assert report.trained["head"] == 16 * 17


def test_targets_that_lie_in_the_head_alone_are_an_error():
    model = nn.ModuleDict({"other": nn.Linear(16, 16), "classifier": nn.ModuleDict({"q_proj": nn.Linear(16, 16)})})
    with pytest.raises(ValueError, match=r"targets match only classifier.q_proj, which head=\['classifier'\] trains"):
        inject(model, config(targets=["q_proj"], head=["classifier"]))


def test_full_fine_tuning_and_head_only():
    model = Transformer()
    report = inject(model, FullFineTuning(head=["classifier"]))
    assert all(p.requires_grad for p in model.parameters())
    assert (report.trained["backbone"], report.trained["head"], report.frozen) == (2272, 51, 0)
    assert report.percent == pytest.approx(100 * 2323 / 2272)

    model = Transformer()
    report = inject(model, HeadOnly(head=["classifier"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    assert (report.total, report.frozen) == (51, 2272)


def test_full_fine_tuning_is_in_float32_whatever_the_model_was_loaded_in():
    model = Transformer().bfloat16()
    inject(model, FullFineTuning(head=["classifier"]))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class FusedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["q_proj"], [r".*attn\.(q|v)_proj"], ["out_proj"], ["0.attn.k_proj"]]
)
def test_fused_attention_is_split_where_a_target_names_a_projection(targets):
    torch.manual_seed(0)
    model, x = nn.Sequential(FusedBlock(), FusedBlock()), tokens(2, 5, 16)
    before = model(x)
    report = inject(model, config(targets=targets))
    parts = {"0.attn.k_proj": ["k_proj"], "out_proj": ["out_proj"], "q_proj": ["q_proj"]}.get(targets[0], [])
    parts = ["q_proj", "v_proj"] if not parts or len(targets) == 2 else parts
    blocks = ["0"] if targets[0].startswith("0") else ["0", "1"]
    assert list(adapters(model)) == [f"{block}.attn.{part}" for block in blocks for part in parts]
    assert report.trained["experts"] == 32 * len(blocks) * len(parts)
    torch.testing.assert_close(model(x), before)
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.experts.coefficients)
    assert (model(x) - before).abs().max() > 1e-3
    with recording(model):
        model(x)
        assert all(adapter.balance_loss().isfinite() for adapter in adapters(model).values())
    assert isinstance(model[1].attn, nn.MultiheadAttention) == (len(blocks) == 1)


def test_fused_attention_that_no_target_names_is_left_alone():
    model = nn.ModuleDict({"block": FusedBlock(), "mlp": nn.Linear(16, 16)})
    inject(model, config(targets=["mlp"]))
    assert type(model["block"].attn) is nn.MultiheadAttention
    assert not any(p.requires_grad for p in model["block"].parameters())


@pytest.mark.parametrize("target", ["linear1", "linear2", "q_proj", "out_proj"])
@pytest.mark.parametrize("nested", [False, True])
def test_adapter_is_not_bypassed_by_the_fused_kernel_of_torch_encoder_layers(target, nested):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = (nn.TransformerEncoder(model, 2) if nested else model).eval()
    x = tokens(2, 5, 16)
    before = model(x)
    inject(model, config(targets=[target]))
    torch.testing.assert_close(model(x), before)
    adapter = list(adapters(model).values())[-1]
    nn.init.normal_(adapter.experts.coefficients)
    with torch.inference_mode():
        assert (model(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_adapters_are_in_the_mode_of_the_model(training):
    model = Transformer().train(training)
    inject(model, config(dropout=0.5))
    assert {module.training for module in model.modules()} == {training}


def test_shared_fused_attention_is_split_at_all_its_places():
    model = nn.ModuleDict({"first": FusedBlock(), "second": FusedBlock()})
    model["second"].attn = model["first"].attn
    inject(model, config(targets=["q_proj"]))
    assert model["second"].attn is model["first"].attn
    assert len(adapters(model)) == 1
    assert not isinstance(model["second"].attn, nn.MultiheadAttention)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_one_step_changes_experts_routers_and_head_and_no_other_tensor_by_a_bit(optimizer_class):
    model, x = Transformer(), tokens(4, 5, 16)
    inject(model, config(head=["classifier"], balance_weight=0.1))
    model.eval()  # batch norm's statistics would move in training mode
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    task = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
    gates_from_task = torch.autograd.grad(task, [a.router.weight for a in adapters(model).values()])
    assert all(gradient.abs().max() == 0 for gradient in gates_from_task)  # zero experts: the gates have no effect yet
    with recording(model):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
        loss = loss + sum(adapter.balance_loss() for adapter in adapters(model).values())
    loss.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    trained = {f"{name}.{part}" for name in Q_AND_V for part in ("experts.coefficients", "router.weight")}
    assert changed == trained | {"classifier.weight", "classifier.bias"}


def test_second_step_moves_the_router_through_the_task_too():
    model, x = Transformer(), tokens(4, 5, 16)
    inject(model, config())
    randomize(model, 0.5)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    assert all(adapter.router.weight.grad.abs().max() > 0 for adapter in adapters(model).values())
