"""The plugins of axolotl and ms-swift, on stand-ins for the interfaces that they meet in axolotl 0.19 and ms-swift 4.6."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import REPOSITORY
from support.tiny_bert import SIZES
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fourier_moe import adapter_state_dict, load_adapter

SETTINGS = {"num_coefficients": 64, "num_experts": 4, "balance_weight": 0.1}
TARGETS = ["q_proj", "v_proj"]
RATES = {"experts": 1e-2, "router": 5e-3}
ROWS = [{"input_ids": torch.arange(row, row + 8), "labels": torch.arange(row, row + 8)} for row in range(16)]


def stand_in(monkeypatch, name, **members):
    """A module, and the packages around it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:depth])) or ModuleType(".".join(parts[:depth]))
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), module)
    for key, value in members.items():
        setattr(module, key, value)


def base_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=8))


def trained(trainer_class, model, directory, steps=2, resume=None):
    arguments = TrainingArguments(
        str(directory), max_steps=steps, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, logging_steps=1
    )
    trainer = trainer_class(model=model, args=arguments, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    logged = [entry for entry in trainer.state.log_history if "adapter_loss" in entry]
    assert all(entry["adapter_loss"] > 0 for entry in logged)
    assert len(logged) >= 1
    assert {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups} == RATES
    return trainer


def require_same(model, directory, load=load_adapter):
    again = base_model()
    load(again, directory)
    expected = adapter_state_dict(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state_dict(again).items())


class DictDefault(dict):
    """As axolotl's: an attribute that is missing is None."""

    __getattr__ = dict.get


@pytest.fixture
def axolotl(monkeypatch):
    capability = lambda name, lora_like=False, relora=False: SimpleNamespace(name=name)  # noqa: E731
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}), AdapterCapabilities=capability)

    class AxolotlTrainer(Trainer):
        def _save(self, output_dir=None, state_dict=None):
            raise AssertionError("it would call save_pretrained of an adapted model")

    stand_in(monkeypatch, "axolotl.core.trainers.base", AxolotlTrainer=AxolotlTrainer)
    monkeypatch.delitem(sys.modules, "fourier_moe.integrations.axolotl", raising=False)
    yield importlib.import_module("fourier_moe.integrations.axolotl")
    sys.modules.pop("fourier_moe.integrations.axolotl", None)


def test_axolotl_plugin_trains_saves_and_loads(axolotl, tmp_path):
    plugin = axolotl.FourierMoEPlugin()
    assert [one.name for one in plugin.get_adapter_capabilities()] == ["fourier_moe"]
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(sys.modules[module], name)(fourier_moe={"targets": TARGETS, **SETTINGS, "learning_rates": RATES})
    config = DictDefault(adapter="fourier_moe", fourier_moe=arguments.fourier_moe)
    model, peft_config = plugin.load_adapter(base_model(), config)
    assert peft_config is None
    trainer = trained(plugin.get_trainer_cls(config), model, tmp_path)
    assert (tmp_path / "checkpoint-1/adapter.safetensors").is_file()
    trainer.model.save_pretrained(str(tmp_path / "out"), safe_serialization=True)
    require_same(model, tmp_path / "out")
    loaded = DictDefault(config | {"lora_model_dir": tmp_path / "out"})
    require_same(model, loaded, plugin.load_adapter)


def test_axolotl_plugin_leaves_other_adapters_alone_and_refuses_what_it_cannot_train(axolotl):
    plugin = axolotl.FourierMoEPlugin()
    assert plugin.load_adapter(None, DictDefault(adapter="lora")) is None
    assert plugin.get_trainer_cls(DictDefault(adapter="lora")) is None
    config = DictDefault(adapter="fourier_moe", fourier_moe={"targets": TARGETS, **SETTINGS})
    for changes, options, message in [
        ({"fourier_moe": None}, {}, "needs a block `fourier_moe:` with targets"),
        ({"fourier_moe": {"targets": TARGETS, "num_experst": 64}}, {}, "has no setting 'num_experst'"),
        ({"load_in_4bit": True}, {}, "needs load_in_4bit and load_in_8bit false"),
        ({"rl": "dpo"}, {"config_only": True}, "rl=dpo"),
    ]:
        with pytest.raises(ValueError, match=message):
            plugin.load_adapter(base_model(), DictDefault(config | changes), **options)


@pytest.fixture
def swift(monkeypatch):
    class Seq2SeqTrainer(Trainer):
        """The parts of ms-swift's that meet the plugin."""

        def create_optimizer_and_scheduler(self, num_training_steps):
            raise AssertionError("ms-swift's optimizer callback knows no rates by kind")

        def _save(self, output_dir=None, state_dict=None):
            tuners_map["fourier_moe"].save_pretrained(self.model, output_dir, state_dict=state_dict, safe_serialization=True)

    tuners_map, mapping = {}, {"causal_lm": "swift.trainers.Seq2SeqTrainer"}
    stand_in(monkeypatch, "swift.trainers", Seq2SeqTrainer=Seq2SeqTrainer)
    stand_in(monkeypatch, "swift.trainers.trainer_factory", TrainerFactory=SimpleNamespace(TRAINER_MAPPING=mapping))
    stand_in(monkeypatch, "swift.tuner_plugin", Tuner=type("Tuner", (), {}), tuners_map=tuners_map)
    monkeypatch.syspath_prepend(REPOSITORY / "examples/ms_swift_plugin")
    plugin = importlib.import_module("fourier_moe_swift")
    monkeypatch.setattr(plugin, "SETTINGS", SETTINGS)
    monkeypatch.setattr(plugin, "LEARNING_RATES", RATES)
    yield tuners_map, mapping
    sys.modules.pop("fourier_moe_swift", None)


def test_ms_swift_plugin_trains_saves_loads_and_resumes(swift, tmp_path):
    tuners_map, mapping = swift
    tuner = tuners_map["fourier_moe"]
    module, _, name = mapping["causal_lm"].rpartition(".")
    trainer_class = getattr(sys.modules[module], name)
    model = tuner.prepare_model(SimpleNamespace(target_modules=TARGETS), base_model())
    trained(trainer_class, model, tmp_path / "whole")
    require_same(model, tmp_path / "whole/checkpoint-2", tuner.from_pretrained)
    resumed = tuner.from_pretrained(base_model(), tmp_path / "whole/checkpoint-1", is_trainable=True)
    trained(trainer_class, resumed, tmp_path / "rest", resume=str(tmp_path / "whole/checkpoint-1"))
    require_same(model, tmp_path / "rest/checkpoint-2")
