"""FourierMoE as a tuner of peft: outputs as those of `inject`, saving and loading, several adapters, training, refusals."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from support.pages import section_code
from support.tiny_bert import BERT
from torch import nn
from torch.utils.data import Dataset
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fourier_moe import FourierMoEConfig, adapters, balance_loss, inject, recording, save_adapter
from fourier_moe.errors import UserError
from fourier_moe.integrations import AdapterTrainerMixin, add_balance_loss
from fourier_moe.integrations.peft import FourierMoEPeftConfig

METHOD = {"num_coefficients": 64, "shared_coefficients": 6, "num_experts": 4, "densities": [1, 3, 2, 2], "balance_weight": 0.1}
ALONE = {"num_experts": 1, "top_k": 1, "densities": None}
BATCH = {"input_ids": torch.arange(1, 33).view(4, 8), "labels": torch.tensor([0, 1, 0, 1])}


def fresh(dtype=torch.float32):
    torch.manual_seed(0)
    return BertForSequenceClassification(BERT).to(dtype).eval()


def config(**settings):
    return FourierMoEPeftConfig(target_modules=["query", "value"], modules_to_save=["classifier"], **{**METHOD, **settings})


def learn(model):
    """Give the experts values, the same in every model of one config."""
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters(model).values():
        adapter.experts.coefficients.data.normal_(generator=generator)
    return model


def logits(model):
    with torch.no_grad():
        return model(BATCH["input_ids"]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_losses_are_those_of_inject_to_the_bit(dtype):
    ours = fresh(dtype)
    inject(ours, FourierMoEConfig(targets=["query", "value"], **METHOD, head=["classifier"]))
    theirs = learn(get_peft_model(fresh(dtype), config()))
    assert torch.equal(logits(theirs), logits(learn(ours)))
    assert theirs.get_nb_trainable_parameters()[0] == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert {adapter.experts.coefficients.dtype for adapter in adapters(theirs).values()} == {torch.float32}
    with recording(ours), recording(theirs):
        assert torch.equal(ours(**BATCH).loss, theirs(**BATCH).loss)
        assert torch.equal(balance_loss(ours), balance_loss(theirs))


@pytest.mark.parametrize(
    ("settings", "low_cpu_mem_usage"),
    [({"seed": 3}, False), ({"densities": [1, 2, 1, 1], "shared_coefficients": 8, "num_coefficients": 80}, True)],
)
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, settings, low_cpu_mem_usage):
    model = learn(get_peft_model(fresh(), config(**settings)))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "FOURIER_MOE"
    loaded = PeftModel.from_pretrained(fresh(), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    stored, again = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded, adapter_name="other")
    assert stored.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in stored.items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_directory_of_save_adapter_loads_in_peft(tmp_path):
    ours = fresh()
    inject(ours, FourierMoEConfig(targets=["0.attention.self.query"], **METHOD, head=["classifier"]))
    with torch.no_grad():
        learn(ours).classifier.weight.add_(1)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(fresh(), tmp_path)
    assert torch.equal(logits(theirs), logits(ours))
    with theirs.disable_adapter():
        assert torch.equal(logits(theirs), logits(fresh()))
    shared = fresh()
    inject(shared, FourierMoEConfig(targets=["query", "value"], **METHOD, router_scope="input"))
    save_adapter(shared, tmp_path)  # which peft has not: its files of the old adapter must go
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.json", "adapter.safetensors", "README.md"}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for foreign, message in (('{"peft_type": "LORA"}', "peft_type LORA"), ("[", "peft_type unknown")):
        (tmp_path / "adapter_config.json").write_text(foreign, encoding="utf-8")
        with pytest.raises(UserError, match=rf"adapter_config.json is of another adapter \({message}\)"):
            save_adapter(ours, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
            **before, "adapter_config.json": foreign.encode()
        }  # fmt: skip


def test_adapters_are_disabled_chosen_removed_and_never_merged():
    plain = logits(fresh())
    model = learn(get_peft_model(fresh(), config()))
    first = logits(model)
    assert not torch.equal(first, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.add_adapter("second", FourierMoEPeftConfig(target_modules=["query"], num_coefficients=16, num_experts=2))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), plain)  # it has not learnt anything
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UserError, match="FourierMoELinear cannot be merged into one weight"):
            merge()
    model.delete_adapter("second")
    assert torch.equal(logits(model.unload()), plain)


def test_an_adapter_of_a_single_expert_merges_and_unmerges():
    model = learn(get_peft_model(fresh(), config(**ALONE)))
    adapted, plain = logits(model), logits(fresh())
    assert not torch.allclose(adapted, plain, atol=1e-3)
    model.merge_adapter(safe_merge=True)
    assert model.base_model.model.bert.encoder.layer[0].attention.self.query.merged
    torch.testing.assert_close(logits(model), adapted)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    torch.testing.assert_close(logits(model), adapted)
    merged = model.merge_and_unload()
    assert not adapters(merged)
    torch.testing.assert_close(logits(merged), adapted)


def test_a_single_expert_merges_beside_a_routed_adapter_which_is_refused_before_any_weight_changes():
    model = learn(get_peft_model(fresh(), config(**ALONE)))
    model.add_adapter("routed", FourierMoEPeftConfig(target_modules=["query"], num_coefficients=16, num_experts=2))
    adapted = logits(model)
    with pytest.raises(UserError, match="adapter routed: FourierMoELinear cannot be merged"):
        model.merge_adapter(adapter_names=["default", "routed"])
    assert torch.equal(logits(model), adapted)
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["default"])), adapted)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
def test_merging_a_tied_projection_leaves_the_embedding_as_it_is():
    torch.manual_seed(0)
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=32, n_layer=1, n_head=2)).eval()
    model = learn(get_peft_model(tied, FourierMoEPeftConfig(target_modules=["lm_head"], **{**METHOD, **ALONE})))
    ids = torch.arange(8).unsqueeze(0)
    adapted = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, adapted, rtol=1e-4, atol=1e-5)


def test_two_active_adapters_add_up_on_a_transposed_projection():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=32, n_layer=1, n_head=2)).eval()
    settings = {**METHOD, "target_modules": ["c_attn"]}
    model = get_peft_model(base, FourierMoEPeftConfig(**settings))
    model.add_adapter("second", FourierMoEPeftConfig(**settings, seed=1))
    learn(model)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 3, 32)
    outputs = []
    for names in ([], ["default"], ["second"], ["default", "second"]):
        layer.set_adapter(names)
        outputs.append(layer(x))
    none, first, second, both = outputs
    torch.testing.assert_close(both - none, (first - none) + (second - none))


def test_it_compiles_into_one_graph():
    base = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)).eval()
    model = learn(get_peft_model(base, FourierMoEPeftConfig(target_modules=["0", "2"], **METHOD)))
    x = torch.randn(4, 32)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


class Sentences(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(1, 40, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids[0] % 2}


def test_the_page_s_code_trains_saves_loads_and_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = section_code("guides/other_trainers", "PEFT").replace("num_coefficients=1024", "num_coefficients=64")
    args = TrainingArguments(
        "out", max_steps=4, save_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2
    )
    space = {"model": fresh(), "fresh_model": fresh(), "args": args, "data": Sentences()}
    exec(code, space)
    assert (tmp_path / "out/checkpoint-2/adapter_model.safetensors").exists()
    trained = get_peft_model_state_dict(space["model"])

    resumed = get_peft_model(fresh(), space["config"])
    add_balance_loss(resumed)
    Trainer(model=resumed, args=args, train_dataset=Sentences()).train(resume_from_checkpoint="out/checkpoint-2")
    again = get_peft_model_state_dict(resumed)
    assert all(torch.equal(value, again[name]) for name, value in trained.items())
    assert any(value.any() for name, value in trained.items() if name.endswith("coefficients"))


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    pass


def test_the_mixin_has_rates_by_role_and_peft_s_checkpoints(tmp_path):
    logs = []

    def train(resume=None, inactive=None):
        args = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        rates = {"experts": 1e-2, "router": 5e-3, "head": 1e-3}
        model = get_peft_model(fresh(), config())
        if inactive:
            model.add_adapter("second", inactive)
        trainer = AdapterTrainer(model=model, args=args, train_dataset=Sentences(), learning_rates=rates)
        trainer.train(resume_from_checkpoint=resume)
        assert {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups} == rates
        logs.append([(row["adapter_loss"], row["load_imbalance"]) for row in trainer.state.log_history if "loss" in row])
        return get_peft_model_state_dict(trainer.model)

    end, again = train(), train(str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").exists()
    assert all(torch.equal(value, again[name]) for name, value in end.items())
    train(inactive=config(num_experts=8, densities=None))
    assert logs[0] == logs[2]


def test_the_balance_loss_falls():
    model = get_peft_model(fresh(), config()).train()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name.endswith("router.weight")], lr=1.0)
    losses = []
    for _ in range(10):
        with recording(model):
            model(**BATCH)
            losses.append(balance_loss(model))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_coefficients": 63}, "num_coefficients=63 must be a positive multiple"),
        ({"router_scope": "block"}, "router_scope='block' must be 'projection' in peft"),
        ({"top_k": 9}, "top_k=9"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_what_is_no_projection_is_named():
    with pytest.raises(UserError, match=r"targets match '1': LayerNorm is no linear projection"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), FourierMoEPeftConfig(target_modules=["1"], **METHOD))
