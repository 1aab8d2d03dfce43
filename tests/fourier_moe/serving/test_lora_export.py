"""Experts as LoRA: exact in every variant and shape, no wider than needed, and read by peft on real architectures."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.models import randomize
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

import fourier_moe.serving.lora_export
from fourier_moe import FourierMoEConfig, LoRAConfig, adapters, inject
from fourier_moe.models.attention import split_attention
from fourier_moe.serving.lora_export import ExpertLoRA, export_loras
from fourier_moe.spectral.experts import SpectralExperts

VARIANTS = {
    "complex": {},
    "real": {"coefficients": "real"},
    "imaginary": {"coefficients": "imaginary"},
    "asymmetric": {"conjugate_symmetry": False},
    "uniform": {"frequency_bias": False},
    "permuted": {"permute": True},
    "unequal": {"densities": [3, 1], "shared_coefficients": 6},
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def experts_of(shape, pairs=6, **options):
    sizes = {"num_coefficients": 4 * pairs, "num_experts": 2, "bandwidth": 2.0}
    config = FourierMoEConfig(targets=["x"], **sizes, **options)
    return randomize(SpectralExperts(shape[1], shape[0], config, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (16, 16), (9, 9), (2, 40), (40, 2)])
def test_lora_is_the_experts_update_in_every_variant(variant, shape):
    experts = experts_of(shape, **VARIANTS[variant])
    for expert in range(len(experts.segments)):
        lora = ExpertLoRA.of(experts, expert)
        update = copy.deepcopy(experts).double().delta_weight(expert).detach()
        product = lora.lora_B.double() @ lora.lora_A.double()
        torch.testing.assert_close(product, update, rtol=0, atol=1e-6 * float(update.abs().max()))
        assert update.norm() > 0.1
        assert lora.difference < 1e-6
        assert lora.rank <= min(2 * len(experts.of_expert(expert)[0]), *shape)


@pytest.mark.parametrize("shape", [(12, 7), (9, 40), (40, 2)])
@pytest.mark.parametrize("rank", [1, 4, 100])
def test_truncated_lora_is_the_nearest_of_its_rank_and_tells_its_error(shape, rank):
    experts = experts_of(shape)
    lora = ExpertLoRA.of(experts, 0, rank)
    update = copy.deepcopy(experts).double().delta_weight(0).detach()
    product = lora.lora_B.double() @ lora.lora_A.double()
    lost = torch.linalg.svdvals(update)[rank:].norm() / update.norm()
    assert lora.rank <= rank
    assert float((product - update).norm() / update.norm()) == pytest.approx(float(lost), abs=1e-6)
    assert lora.difference == pytest.approx(float(lost), abs=1e-6)


def test_a_rank_that_truncates_nothing_does_not_excuse_a_wrong_lora(monkeypatch, tmp_path):
    layer = nn.Sequential(nn.Linear(12, 12))
    inject(layer, FourierMoEConfig(targets=["0"], num_coefficients=8, num_experts=2, bandwidth=2.0))
    randomize(layer)
    factors = SpectralExperts.factors
    monkeypatch.setattr(
        SpectralExperts, "factors", lambda self, expert: (1.5 * factors(self, expert)[0], factors(self, expert)[1])
    )
    with pytest.raises(ValueError, match="more than rounding"):
        export_loras(layer, tmp_path, rank=12)


def placed(positions, shape, **options):
    """Experts with two positions each at given (u, v)."""
    experts = experts_of(shape, pairs=2, **options)
    experts.frequencies.copy_(torch.tensor(positions))
    return experts


def test_sines_that_vanish_are_left_out_and_opposite_frequencies_share_a_wave():
    # Rows 0 and M/2 have no sine; u = 3 and u = -3 share both waves; five distinct columns would be wider.
    experts = placed([[[0, 1], [4, 2]], [[3, 1], [-3, 2]]], (8, 11))
    assert [ExpertLoRA.of(experts, expert).rank for expert in range(2)] == [2, 2]
    assert all(ExpertLoRA.of(experts, expert).difference < 1e-6 for expert in range(2))


def test_self_conjugate_positions_and_the_input_side():
    # Without symmetry DC and Nyquist are drawn, too. Both v are 0: the input side is narrower, one constant row.
    experts = placed([[[0, 0], [4, 5]], [[1, 0], [2, 0]]], (8, 10), conjugate_symmetry=False)
    loras = [ExpertLoRA.of(experts, expert) for expert in range(2)]
    assert [lora.rank for lora in loras] == [2, 1]
    assert all(lora.difference < 1e-6 for lora in loras)
    assert loras[1].lora_A.unique().numel() == 1  # the fixed basis is in lora_A


def test_basis_is_the_same_whatever_the_coefficients():
    experts = experts_of((12, 30))
    before = ExpertLoRA.of(experts, 0)
    nn.init.normal_(experts.coefficients)
    after = ExpertLoRA.of(experts, 0)
    assert torch.equal(before.lora_B, after.lora_B)
    assert not torch.equal(before.lora_A, after.lora_A)


def test_an_untrained_expert_is_a_lora_of_zeros():
    experts = experts_of((8, 8))
    nn.init.zeros_(experts.coefficients)
    lora = ExpertLoRA.of(experts, 0)
    assert lora.difference == 0
    assert not (lora.lora_B @ lora.lora_A).any()


def llama():
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES))


def roberta():
    return Roberta(RobertaConfig(max_position_embeddings=40, num_labels=3, **SIZES))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=40))


MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], ()),
    "roberta": (roberta, ["query", "output.dense"], ["classifier"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"], ()),
}


def adapted(make, targets, head=(), **options):
    """The same pretrained model twice: plain, and with experts that do something."""
    torch.manual_seed(0)
    base = make().eval()
    model = make().eval()
    model.load_state_dict(base.state_dict())
    config = FourierMoEConfig(targets=targets, head=head, num_coefficients=32, num_experts=4, **options)
    inject(model, config)
    return base, randomize(model)


@pytest.mark.parametrize("kind", MODELS)
def test_peft_reads_every_expert_and_adds_it_to_every_projection(kind, tmp_path):
    base, model = adapted(*MODELS[kind])
    if kind == "roberta":
        nn.init.normal_(model.classifier.out_proj.weight)
    exports = export_loras(model, tmp_path)
    assert [export.name for export in exports] == list(adapters(model))
    for expert in (0, 3):
        plain_head = copy.deepcopy(base.classifier) if kind == "roberta" else None
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / f"expert_{expert}")).eval()
        for name, layer in adapters(model).items():
            x = torch.randn(2, 5, layer.in_features)
            expected = layer.base(x) + x @ layer.experts.delta_weight(expert).T
            torch.testing.assert_close(loaded.get_submodule(f"base_model.model.{name}")(x), expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(expected, layer.base(x), atol=1e-2)
        if kind == "roberta":
            features = torch.randn(2, 5, 32)
            classifier = loaded.get_submodule("base_model.model.classifier")
            torch.testing.assert_close(classifier(features), model.classifier(features))
            with loaded.disable_adapter():
                torch.testing.assert_close(classifier(features), plain_head(features))
        base = loaded.unload()


def test_ranks_are_those_of_whole_names(tmp_path):
    """One projection is called like the end of another one's name."""

    def make():
        return nn.ModuleDict({"proj": nn.Linear(2, 40), "inner": nn.ModuleDict({"proj": nn.Linear(30, 20)})})

    base, model = adapted(make, ["proj"], bandwidth=2.0)
    ranks = [export.ranks[0] for export in export_loras(model, tmp_path)]
    assert ranks[0] != ranks[1]
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "expert_0"))
    x, layer = torch.randn(3, 30), model["inner"].proj
    actual = loaded.base_model.model["inner"].proj(x)
    torch.testing.assert_close(actual, layer.base(x) + x @ layer.experts.delta_weight(0).T)


@pytest.mark.parametrize("top_k", [1, 2])
def test_routed_model_can_be_computed_from_the_exported_files(tmp_path, top_k):
    unequal = {"densities": [1, 1, 4, 2], "shared_coefficients": 14} if top_k == 2 else {}
    _, model = adapted(llama, ["q_proj", "k_proj", "v_proj"], router_scope="input", top_k=top_k, **unequal)
    export_loras(model, tmp_path)
    router = json.loads((tmp_path / "router.json").read_text())
    weights = load_file(tmp_path / "router.safetensors")
    shared = "shared" if (tmp_path / "shared").is_dir() else None
    assert router == {
        "router": "router.safetensors",
        "experts": [f"expert_{expert}" for expert in range(4)],
        "shared": shared,
        "top_k": top_k,
        "normalize_gates": top_k > 1,
        "split_attention": [],
    }
    folders = [f"expert_{expert}" for expert in range(4)] + ["shared"] * (top_k == 2)
    experts = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in folders]
    for name, layer in adapters(model).items():
        x = torch.randn(7, layer.in_features)
        gates, active = (x @ weights[name].T).softmax(-1).topk(router["top_k"])
        if router["normalize_gates"]:
            gates = gates / gates.sum(-1, keepdim=True)
        gates = torch.cat([torch.zeros(7, 4).scatter(1, active, gates), torch.ones(7, len(experts) - 4)], 1)
        y = layer.base(x)
        for expert, tensors in enumerate(experts):
            lora_A, lora_B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            y = y + gates[:, [expert]] * (x @ lora_A.T @ lora_B.T)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


def test_fused_attention_loads_after_the_split_that_the_export_names(tmp_path):
    def encoder():
        return nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, batch_first=True)})

    base, model = adapted(encoder, ["q_proj", "v_proj"])
    export_loras(model, tmp_path)
    names = json.loads((tmp_path / "router.json").read_text())["split_attention"]
    assert names == ["attention"]
    for name in names:
        base.set_submodule(name, split_attention(base.get_submodule(name)))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "expert_1"))
    x, layer = torch.randn(3, 16), model["attention"].q_proj
    q_proj = loaded.base_model.model["attention"].q_proj
    torch.testing.assert_close(q_proj(x), layer.base(x) + x @ layer.experts.delta_weight(1).T)


def test_another_method_is_refused_by_name(tmp_path):
    model = llama()
    inject(model, LoRAConfig(targets=["q_proj"]))
    with pytest.raises(ValueError, match="LoRAConfig has no spectral experts"):
        export_loras(model, tmp_path)


def test_a_lora_that_is_not_its_expert_is_refused(tmp_path, monkeypatch):
    _, model = adapted(llama, ["q_proj"])
    exact = SpectralExperts.factors
    monkeypatch.setattr(SpectralExperts, "factors", lambda *arguments: tuple(1.0001 * side for side in exact(*arguments)))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: expert_0 as LoRA differs from it by 2\.0e-04"):
        export_loras(model, tmp_path)
    monkeypatch.setattr(fourier_moe.serving.lora_export, "LARGEST_DIFFERENCE", 1e-3)
    assert export_loras(model, tmp_path)[0].differences == pytest.approx([2e-4] * 4, rel=0.01)
