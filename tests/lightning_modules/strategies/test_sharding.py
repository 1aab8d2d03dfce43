"""ShardedBaseStrategy: how a run starts, averages gradients and answers, and what is refused."""

import os
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from support.language_models import TOKENIZER, adapted_llama, collate, example, language_module
from support.processes import run_in_two
from support.sharded_runs import ADAPTER, Llama, fit
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from fourier_moe import FFTMoEConfig, FullFineTuning, HeadOnly, inject
from lightning_modules.strategies import sharding
from lightning_modules.strategies.sharding import ShardedBaseStrategy, average_gradients, check_strategy, shard_frozen
from lightning_modules.tasks.generation import GenerationSettings, generate, is_sharded

# ---------------------------------------------------------------- the start


def big_llama():
    """Tied weights, and blocks that are small beside the whole."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, pad_token_id=0, **sizes)).bfloat16()
    inject(model, ADAPTER)
    return model


def with_values():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = big_llama()
    for buffer in model.buffers():
        buffer += 1  # what another process would not make itself
    return model


def held_bytes(model):
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in chain(model.parameters(), model.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def start():
    with torch.device("cpu" if os.environ["RANK"] == "0" else "meta"):
        model = with_values() if os.environ["RANK"] == "0" else big_llama()
    held = []

    def shard(module, **options):
        held.append(held_bytes(model))
        fully_shard(module, **options)

    with pytest.MonkeyPatch.context() as patch, one_mesh() as mesh:
        patch.setattr(sharding, "fully_shard", shard)
        shard_frozen(model, mesh, torch.device("cpu"))
        shard_frozen(model, mesh, torch.device("cpu"))  # as when a trainer tests after it has fitted
        expected = with_values()
        different = []
        for (name, tensor), other in zip(named_tensors(model), dict(named_tensors(expected)).values(), strict=True):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if whole.dtype != other.dtype or not torch.equal(whole, other):
                different.append(name)
            assert isinstance(tensor, DTensor) == (isinstance(other, nn.Parameter) and not other.requires_grad), name
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return different, held, held_bytes(model), held_bytes(expected)


def named_tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]


@contextmanager
def one_mesh():
    distributed.init_process_group("gloo")
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


def test_every_process_starts_with_the_first_one_s_values_and_none_but_it_ever_holds_them_all():
    (_, first_held, first_end, whole), (_, held, end, _) = found = run_in_two(start)
    for different, *_ in found:
        assert different == []
    one_block = whole / 8
    assert max(held) < end + one_block < 0.8 * whole
    assert max(first_held) <= whole
    # Of both together, at any time: one copy, the block that is handed on, and what is held twice (adapters and buffers).
    doubled = first_end + end - whole
    assert max(map(sum, zip(first_held, held, strict=True))) <= whole + one_block + doubled


def failing_start(directory):
    def build(self, num_classes=None, class_names=None):
        raise ValueError("its weights are damaged")

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "0":
            patch.setattr(Llama, "build", build)
        with pytest.raises(ValueError) as raised:
            fit(directory, "fsdp")
    return str(raised.value)


def test_nobody_waits_for_weights_that_the_first_process_cannot_load(tmp_path):
    first, second = run_in_two(failing_start, tmp_path)
    assert first == "its weights are damaged"
    assert second == "the first process could not build the model: its weights are damaged"


def averaged():
    rank = int(os.environ["RANK"])
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.full((2, 2), 1.0 + rank)
    if rank == 1:
        parameters[1].grad = torch.ones(3)
    with one_mesh():
        average_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def test_gradients_are_averaged_and_stay_none_where_no_process_has_one():
    for whole, of_one, of_none in run_in_two(averaged):
        assert torch.equal(whole, torch.full((2, 2), 1.5))
        assert torch.equal(of_one, torch.full((3,), 0.5))
        assert of_none is None


# ---------------------------------------------------------------- answers


def answers(end):
    model = adapted_llama()
    model.generation_config.eos_token_id = end
    batch = collate([example(1, 2) if os.environ["RANK"] == "0" else example(700, 8)])
    ways = [GenerationSettings(max_new_tokens=6, num_beams=beams) for beams in (1, 2)]

    def answer():
        return [generate(model, TOKENIZER, batch["prompt_ids"], batch["prompt_mask"], settings) for settings in ways]

    alone = answer()
    with one_mesh() as mesh:
        shard_frozen(model, mesh, torch.device("cpu"))
        sharded = answer()
        assert is_sharded(model)  # also after a forward
    return alone, sharded


def test_a_process_that_has_answered_goes_on_for_the_others():
    batch = collate([example(1, 2)])
    prompt = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
    end = adapted_llama().generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1].item()
    (alone, sharded), (other_alone, other_sharded) = run_in_two(answers, end)
    assert sharded == alone
    assert other_sharded == other_alone
    assert alone[0] == [""]  # the first process has nothing to say but the end
    assert len(other_alone[0][0]) > 1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (FSDPStrategy(), r"trainer\.strategy=FSDPStrategy \(FSDP1\) flattens .*fsdp.yaml"),
        (ModelParallelStrategy(), "trainer.strategy=ModelParallelStrategy splits projections .*fsdp.yaml"),
        (object.__new__(DeepSpeedStrategy), "trainer.strategy=DeepSpeedStrategy writes checkpoints that .*fsdp.yaml"),
    ],
)
def test_strategies_that_do_something_else_are_refused(strategy, reason):
    with pytest.raises(ValueError, match=reason):
        check_strategy(strategy, ADAPTER)


@pytest.mark.parametrize(
    "adapter", [FullFineTuning(), FFTMoEConfig(targets=["q_proj"])], ids=lambda adapter: type(adapter).__name__
)
def test_full_fine_tuning_is_refused_with_the_sharded_base_alone(adapter):
    with pytest.raises(
        ValueError, match=rf"shards frozen weights, and {type(adapter).__name__} trains them all; use .*ddp\.yaml"
    ):
        check_strategy(ShardedBaseStrategy(), adapter)
    check_strategy(DDPStrategy(), adapter)
    check_strategy(SingleDeviceStrategy(), adapter)


def test_a_method_without_a_backbone_to_train_is_taken_by_the_sharded_base():
    check_strategy(ShardedBaseStrategy(), HeadOnly(head=["head"]))
    with pytest.raises(ValueError, match=r"not tested with compile; use configs/strategies/ddp\.yaml, or set"):
        check_strategy(ShardedBaseStrategy(), ADAPTER, compiles=True)


def test_quantized_weights_are_refused_with_the_sharded_base_alone():
    with pytest.raises(ValueError, match=r"cannot shard weights with quantization='nf4'; use .*ddp"):
        check_strategy(ShardedBaseStrategy(), ADAPTER, "nf4")
    check_strategy(DDPStrategy(), ADAPTER, "nf4")


def test_strategy_is_refused_before_weights_are_loaded(monkeypatch):
    module = language_module()
    monkeypatch.setattr(module.task, "build", lambda *_: pytest.fail("the model was built"))
    module._trainer = SimpleNamespace(strategy=FSDPStrategy(), precision="32-true")
    with pytest.raises(ValueError, match="FSDP1"):
        module.configure_model()


def test_tensor_parallel_is_refused():
    with pytest.raises(ValueError, match="tensor_parallel_size=2 must be 1"):
        ShardedBaseStrategy(tensor_parallel_size=2)
