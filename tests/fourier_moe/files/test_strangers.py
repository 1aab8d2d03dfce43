"""Adapter directories that somebody made to do harm, with valid checksums: refused in one line before any work."""

import json
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save
from support.adapter_files import TENSORS, embedded, rewrite
from support.method_configs import LORA_RELATIVES, PEFT_LIBRARY
from support.models import Tower, Transformer, config, tokens, trained
from support.routed_cases import CONFIGS as ROUTED
from torch import nn

from fourier_moe import (
    HeadOnly,
    LoRAConfig,
    adapter_state_dict,
    adapters,
    describe_adapter,
    inject,
    load_adapter,
    save_adapter,
)
from fourier_moe.files.format import config_of
from fourier_moe.models.module_names import ModuleNames, kept_module_names
from fourier_moe.serving.bank import AdapterBank
from fourier_moe.spectral import experts

METHODS = [config(head=["classifier"]), config(permute=True), *ROUTED, *LORA_RELATIVES, *PEFT_LIBRARY]
EVIL = r"(([a-z]|[a-z0-9])+[.]?)+!"  # on "layers.0.attention.q_proj" it tries 2^n ways
Q = "layers.0.attention.q_proj"


def alter(directory, *, without_modules=False, state=None, **changes):
    """Other tensors and another description, with a valid checksum."""
    if state is not None:
        text = embedded(directory)
        (directory / TENSORS).write_bytes(save(state, metadata={"fourier_moe": text}))
    rewrite(directory, **({"modules": None} if without_modules else {}), **changes)


@pytest.fixture
def saved(tmp_path):
    return save_adapter(trained(), tmp_path / "adapter", class_names=["a", "b", "c"], metrics={"accuracy": 0.5})


@pytest.fixture
def no_work(monkeypatch, saved):
    forbid_work(monkeypatch)


def forbid_work(monkeypatch):
    """No layer is built, no position drawn."""

    def fail(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(experts, "draw_frequencies", fail)
    monkeypatch.setattr("fourier_moe.spectral.layer.TopKRouter", fail)


def refused(directory, match, model=Transformer):
    target = model()
    before = {name: id(module) for name, module in target.named_modules()}
    with pytest.raises(ValueError, match=match) as caught:
        load_adapter(target, directory)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1500
    assert before == {name: id(module) for name, module in target.named_modules()}
    bank = AdapterBank(model())
    with pytest.raises(ValueError, match=match):
        bank.load("stranger", directory)
    assert bank.names == ()


# ---------------------------------------------------------------- module names


@pytest.mark.parametrize("without_modules", [False, True])
@pytest.mark.parametrize("changes", [{"targets": [EVIL]}, {"head": [EVIL]}, {"targets": [EVIL], "head": [EVIL]}], ids=str)
def test_a_regular_expression_of_a_file_is_never_tried(saved, monkeypatch, changes, without_modules):
    alter(saved, without_modules=without_modules, config=changes)
    model, x, fullmatch = Transformer().eval(), tokens(2, 5, 16), re.fullmatch

    def unless_evil(pattern, *arguments):
        assert pattern != EVIL
        return fullmatch(pattern, *arguments)

    monkeypatch.setattr(re, "fullmatch", unless_evil)
    load_adapter(model, saved)
    assert torch.equal(model(x), trained()(x))
    bank = AdapterBank(Transformer())
    bank.load("a", saved)
    bank.activate("a")
    assert torch.equal(bank.model(x), trained()(x))


def test_files_list_their_modules_by_name(tmp_path):
    settings = config(targets=[r"layers\.\d\.attention\.[qv]_proj"], head=["class.*"])
    saved = save_adapter(trained(settings), tmp_path)
    names = [f"layers.{layer}.attention.{part}_proj" for layer in (0, 1) for part in "qv"]
    assert json.loads(embedded(saved))["modules"] == {"projections": names, "heads": ["classifier"]}
    description = describe_adapter(saved)
    assert description.modules == ModuleNames(tuple(names), ("classifier",))
    assert description.config.targets == (r"layers\.\d\.attention\.[qv]_proj",)


class Shared(nn.Module):
    """A projection at two places, and a block at two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.ModuleDict({"q_proj": nn.Linear(8, 8)}), nn.ModuleDict({"k_proj": nn.Linear(8, 8)})
        self.three = nn.ModuleDict({"q_proj": self.one["q_proj"], "block": self.two})
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        x = self.two["k_proj"](self.one["q_proj"](x))
        return self.head(self.three["block"]["k_proj"](self.three["q_proj"](x)))


SMALL = {"num_coefficients": 16, "num_experts": 2, "top_k": 1, "bandwidth": 1.0}
MODELS = {
    "plain": (Transformer, config(head=["classifier"]), (2, 5, 16)),
    "patterns": (Transformer, config(targets=[r".*\.[qv]_proj"], head=["class.*"]), (2, 5, 16)),
    "shared router": (Transformer, config(router_scope="block", head=["classifier", "norm"]), (2, 5, 16)),
    "head alone": (Transformer, HeadOnly(head=[r"(norm|classifier)"]), (2, 5, 16)),
    "shared": (Shared, config(targets=[".*[qk]_proj"], head=["he.d"], **SMALL), (3, 8)),
    "fused": (lambda: Tower().float(), config(targets=[r".*\.(q_proj|out_proj|linear1)"], head=["head"], **SMALL), (3, 4, 16)),
    **{type(method).__name__: (Transformer, method, (2, 5, 16)) for method in METHODS[2:]},
}


@pytest.mark.parametrize("kind", MODELS)
def test_files_without_a_list_of_modules_load_to_the_bit(tmp_path, kind):
    build, settings, shape = MODELS[kind]
    model = build()
    inject(model, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model.eval(), tmp_path)
    x = tokens(*shape)
    outputs, names = [model(x)], [kept_module_names(model)]
    for without_modules in (False, True):
        alter(tmp_path, without_modules=without_modules)
        assert (describe_adapter(tmp_path).modules is None) == without_modules
        loaded = build()
        load_adapter(loaded, tmp_path)
        outputs.append(loaded.eval()(x))
        names.append(kept_module_names(loaded))
        assert adapter_state_dict(loaded).keys() == adapter_state_dict(model).keys()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert names[0] == names[1]
    assert names[0].projections == names[2].projections


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"projections": ["layers.7.q_proj"]}, "it adapts 'layers.7.q_proj', which this model does not have"),
        ({"heads": ["nothing"]}, "it adapts 'nothing', which this model does not have"),
        ({"projections": []}, "targets entry .* matches no module of the model"),
        ({"projections": ["norm"]}, "is no linear projection|missing|unexpected"),
        ({"heads": ["layers"]}, "missing layers|it has no tensors"),
        ({"projections": "abc"}, "cannot be read as an adapter description"),
        ({"projections": [1]}, "cannot be read as an adapter description"),
        ({"others": []}, "cannot be read as an adapter description.* has no setting 'others'"),
    ],
    ids=str,
)
def test_lists_of_modules_that_do_not_fit_are_refused(saved, modules, message):
    alter(saved, config={"targets": [EVIL]}, modules=modules)
    refused(saved, message)


# ---------------------------------------------------------------- numbers of the config


@pytest.mark.parametrize("number", [5, 20_000, 10**7, 10**12, 2**61])
def test_more_experts_than_the_file_holds_are_refused_before_any_work(saved, no_work, number):
    alter(saved, config={"num_experts": number, "num_coefficients": 2 * number})
    refused(saved, rf"q_proj.router.weight is \(4, 16\) in the file, \({number}, 16\) in the model")


def test_experts_of_a_shared_router_are_counted_too(tmp_path, monkeypatch):
    directory = save_adapter(trained(router_scope="block"), tmp_path)
    state = {key: value for key, value in load_file(directory / TENSORS).items() if "router" not in key}
    forbid_work(monkeypatch)
    alter(directory, state=state)
    refused(directory, rf"missing {Q}.router.weight")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_no_method_builds_what_the_file_does_not_hold(tmp_path, method, monkeypatch):
    model = Transformer()
    inject(model, method)
    save_adapter(model, tmp_path)
    layer, stored = adapters(model)[Q], adapter_state_dict(model)
    numbers = sum(value.numel() for key, value in stored.items() if key.startswith(f"{Q}."))
    least = method.num_stored(layer.in_features, layer.out_features)
    assert isinstance(method, type(METHODS[0])) or 0.8 * numbers <= least <= numbers
    monkeypatch.setattr("fourier_moe.adapter.layer_class", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(type(method), "check_fit", lambda *_: None)
    for field in {"num_experts", "r", "num_coefficients", "num_directions", "depth", "num_blocks"} & vars(method).keys():
        huge = 10**9 * 16
        changes = {field: huge}
        if field == "num_experts" and "r" in vars(method):
            changes["r"] = huge
        if field == "num_experts" and "num_coefficients" in vars(method):
            changes["num_coefficients"] = 2 * huge
        if field == "num_blocks":
            changes = {"num_blocks": huge, "r": huge}
        alter(tmp_path, config=method.to_dict() | changes)
        with pytest.raises(ValueError, match="does not fit this model"):
            load_adapter(Transformer(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": True},
        {"num_experts": 4.0},
        {"num_experts": "4"},
        {"num_experts": None},
        {"num_experts": [4]},
        {"num_experts": 2**63},
        {"num_coefficients": 10**400},
        {"bandwidth": 10**400},
        {"bandwidth": float("inf")},
        {"bandwidth": "0.1"},
        {"scaling": {}},
        {"scaling": "absolute"},
        {"dropout": float("nan")},
        {"normalize_gates": 1},
        {"coefficients": 3},
        {"band_layout": [0.5]},
        {"targets": "q_proj"},
        {"targets": None},
        {"targets": [1]},
        {"targets": []},
        {"targets": ["(" * 500]},
        {"targets": ["x{99999999999}"]},
        {"targets": ["x" * 1_000_000]},
        {"head": {"a": 1}},
        {"class": 1},
        {"class": ["FourierMoEConfig"]},
        {"num_blocks": 2},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_wrong_types_and_numbers_in_the_config_are_one_line(saved, no_work, changes):
    alter(saved, config=changes)
    refused(saved, "cannot be read as an adapter description")


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"accuracy": "high"}},
        {"metrics": {"accuracy": True}},
        {"metrics": {"accuracy": 10**400}},
        {"class_names": [1, 2]},
        {"class_names": ["\ud800"]},
        {"task": {"class": 5}},
        {"trained_parameters": {"experts": 1.5}},
        {"backbone_fingerprint": {"layers.0.attention.k_proj.weight": "x"}},
        {"backbone_fingerprint": {"layers.0.attention.k_proj.weight": 10**400}},
        {"backbone_fingerprint": {"layers.0.attention.k_proj.weight": float("nan")}},
        {"fourier_moe_version": 3},
        {"backbone_revision": []},
        {"modules": []},
        {"format_version": True},
        {"format_version": 2.0},
        {"format_version": -1},
        {"format_version": 10**300},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_wrong_types_in_the_description_are_one_line(saved, no_work, changes):
    alter(saved, **changes)
    refused(saved, "cannot be read as an adapter description|is damaged")


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((9, 0), r"\|u\| = 9, and at most 8 is in the plane"),
        ((0, -9), r"\|v\| = 9, and at most 8"),
        ((2**31 - 1, 0), r"\|u\| = 2147483647"),
        ((-(2**31), 0), r"\|u\| = 2147483648"),
    ],
)
def test_positions_outside_of_the_plane_are_refused(saved, index, message):
    state = load_file(saved / TENSORS)
    state[f"{Q}.experts.frequencies"][1, 2] = torch.tensor(index, dtype=torch.int32)
    alter(saved, state=state)
    refused(saved, message)


def test_the_default_device_does_not_matter(tmp_path):
    """Trainer.configure_model makes the accelerator the default, and what is read from a file is on the CPU."""
    directory = save_adapter(trained(permute=True), tmp_path)
    model, x = Transformer().eval(), tokens(2, 5, 16)
    with torch.device("meta"):
        load_adapter(model, directory)
    assert torch.equal(model(x), trained(permute=True)(x))


def test_positions_at_the_edge_of_the_plane_are_taken(saved):
    state = load_file(saved / TENSORS)
    state[f"{Q}.experts.frequencies"][1, 2] = torch.tensor([8, -8], dtype=torch.int32)
    alter(saved, state=state)
    model = Transformer().eval()
    load_adapter(model, saved)
    assert model(tokens(2, 5, 16)).isfinite().all()


@pytest.mark.parametrize("order", ["input_order", "output_order"])
@pytest.mark.parametrize("value", [-1, 16, 3])
def test_orders_that_are_none_are_refused(tmp_path, order, value):
    directory = save_adapter(trained(permute=True), tmp_path)
    state = load_file(directory / TENSORS)
    state[f"{Q}.experts.{order}"][0] = value if value != 3 else state[f"{Q}.experts.{order}"][1]
    alter(directory, state=state)
    refused(directory, f"{order} is no order of 16 features")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("experts.coefficients", lambda t: t.fill_(torch.nan), "coefficients holds NaN or infinity"),
        ("router.weight", lambda t: t.index_fill_(0, torch.tensor([1]), torch.inf), "router.weight holds NaN or infinity"),
        ("experts.coefficients", lambda t: t.to(torch.int8), "coefficients is torch.int8 in the file, torch.float32 in"),
        ("experts.coefficients", lambda t: t.to(torch.complex64), "coefficients is torch.complex64"),
        ("experts.coefficients", lambda t: t.to(torch.float8_e5m2), "coefficients is torch.float8_e5m2"),
        ("experts.coefficients", lambda t: t.to(torch.bool), "coefficients is torch.bool in the file"),
        ("experts.frequencies", lambda t: t.float(), "frequencies is torch.float32 in the file, torch.int32 in the model"),
        ("experts.frequencies", lambda t: t.long(), "frequencies is torch.int64 in the file, torch.int32 in the model"),
        ("experts.frequencies", lambda t: t[:, :3].clone(), r"frequencies is \(4, 3, 2\) in the file, \(4, 4, 2\) in the"),
        ("router.weight", lambda t: t[:, :8].clone(), r"router.weight is \(4, 8\) in the file, \(4, 16\) in the model"),
        ("experts.frequencies", lambda t: None, rf"missing {Q}.experts.frequencies"),
    ],
)
def test_tensors_of_other_kinds_are_refused(saved, key, change, message):
    state = load_file(saved / TENSORS)
    state[f"{Q}.{key}"] = change(state[f"{Q}.{key}"])
    alter(saved, state={name: value for name, value in state.items() if value is not None})
    refused(saved, message)


def test_a_head_that_is_no_numbers_is_refused_for_every_method(tmp_path):
    for settings in (HeadOnly(head=["classifier"]), LoRAConfig(targets=["q_proj"], head=["classifier"], r=2)):
        directory = save_adapter(trained(settings), tmp_path / type(settings).__name__)
        state = load_file(directory / TENSORS)
        alter(directory, state=state | {"classifier.bias": torch.tensor([0.0, torch.nan, 0.0])})
        refused(directory, "classifier.bias holds NaN or infinity")
        alter(directory, state=state | {"classifier.bias": torch.zeros(3, dtype=torch.int64)})
        refused(directory, "classifier.bias is torch.int64 in the file, torch.float32 in the model")


def test_half_precision_is_taken(saved):
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in load_file(saved / TENSORS).items()}
    alter(saved, state=state)
    model = Transformer()
    load_adapter(model, saved)
    assert adapters(model)[Q].experts.coefficients.dtype == torch.float32


def test_other_tenants_are_served_on_after_a_refused_stranger(saved, tmp_path):
    good = save_adapter(trained(), tmp_path / "good")
    state = load_file(saved / TENSORS)
    state[f"{Q}.experts.frequencies"][0, 0, 0] = 1000
    alter(saved, state=state)
    bank, x = AdapterBank(Transformer()), tokens(2, 5, 16)
    bank.load("good", good)
    with torch.no_grad(), bank.per_example(["good", None]):
        before = bank.model(x)
    with pytest.raises(ValueError, match="in the plane"):
        bank.load("stranger", saved)
    with torch.no_grad(), bank.per_example(["good", None]):
        assert torch.equal(bank.model(x), before)


# ---------------------------------------------------------------- the header


def header(directory, content):
    (directory / TENSORS).write_bytes(struct.pack("<Q", len(content)) + content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{" + b" " * 2**23 + b"}", "its header would have 8,388,610 bytes"),
        (b"[" * 1_000_000, "is damaged"),
        (b'{"a":' * 100_000, "is damaged"),
        (b'{"__metadata__": {"fourier_moe": "a"}, "__metadata__": {"fourier_moe": "b"}}', "'__metadata__' is there twice"),
        (b'{"__metadata__": {"fourier_moe": "{\\"sha256\\": 1, \\"sha256\\": 2}"}}', "'sha256' is there twice"),
        (b'{"__metadata__": []}', "is damaged"),
        (b'{"__metadata__": {"fourier_moe": 3}}', "is damaged"),
        (b"9" * 10_000, "is damaged"),
        (b"\xff\xfe{}", "is damaged"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_headers_that_are_none_are_refused(saved, content, message):
    header(saved, content)
    refused(saved, message)


def test_a_header_longer_than_the_file_is_refused_unread(saved):
    with (saved / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**41)  # sparse: two terabytes that nobody has
    refused(saved, "its header would have 1,099,511,627,776 bytes")


def test_a_huge_copy_of_the_description_is_refused_unread(saved):
    with (saved / "adapter.json").open("wb") as file:
        file.truncate(2**40)
    refused(saved, "adapter.json is damaged: it has more than 8,388,608 bytes")


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    for arguments, message in (
        ({"metrics": {"accuracy": "high"}}, "'high' where float or int was expected"),
        ({"class_names": ["x" * 2**23]}, "take more than the 8,388,608 bytes"),
        ({"class_names": [1, 2, 3]}, "1 where str was expected"),
    ):
        with pytest.raises(ValueError, match=message):
            save_adapter(trained(), tmp_path / "adapter", **arguments)
    assert not (tmp_path / "adapter").exists()


def test_settings_of_every_method_survive_the_check_of_types():
    for method in METHODS:
        assert config_of(json.loads(json.dumps(method.to_dict()))) == method
