"""FSDP2, DDP and one process are the same training, and their files the same files."""

import json
from dataclasses import replace

import pytest
import torch
from support.language_models import adapted_llama
from support.processes import run_in_two
from support.sharded_runs import ADAPTER, CHECKPOINT, MICRO_BATCHES, STEPS_BEFORE_CHECKPOINT, AddAsTwoProcessesDo, fit, together

from fourier_moe import (
    AdaMoLEConfig,
    DoRAConfig,
    FourierFTConfig,
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
    TopLoRAConfig,
    adapters,
)
from lightning_modules.optimization import Optimization, ParameterGroup

pytestmark = pytest.mark.slow


def runs_of_two(directory):
    """Both strategies from the start, and from the checkpoint that each other way of running left before the last epoch."""
    found = {kind: fit(directory / kind, kind) for kind in ("ddp", "fsdp")}
    for kind, sources in {"ddp": ("one", "fsdp"), "fsdp": ("one", "ddp", "fsdp")}.items():
        for source in sources:
            checkpoint = directory / source / CHECKPOINT
            found[kind, source] = fit(directory / f"{kind}_{source}", kind, checkpoint=checkpoint)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    losses, state = fit(directory / "one", "auto", AddAsTwoProcessesDo())
    found = {"one": (losses, state)}
    first, second = run_in_two(runs_of_two, directory)
    for kind, (losses, state) in first.items():
        found[kind] = together(losses, second[kind][0]), state
        assert all(torch.equal(value, second[kind][1][key]) for key, value in state.items()), kind
    for source in ("ddp", "fsdp"):
        checkpoint = directory / source / CHECKPOINT
        found["one", source] = fit(directory / f"one_{source}", "auto", AddAsTwoProcessesDo(), checkpoint=checkpoint)
    return directory, found


def test_losses_of_20_steps_are_those_of_one_process_to_the_bit(runs):
    """With a bfloat16 base, accumulation, clipping, activation checkpointing, padding; gradients are added in one order."""
    _, found = runs
    assert len(found["one"][0]) == 80
    assert found["ddp"][0] == found["one"][0]
    assert found["fsdp"][0] == found["one"][0]


def test_adapter_files_are_the_same_to_the_byte(runs):
    directory, found = runs
    one = directory / "one"
    for kind in ("ddp", "fsdp"):
        for name in ("adapter.safetensors", "adapter.json"):
            assert (directory / kind / name).read_bytes() == (one / name).read_bytes(), (kind, name)
    assert json.loads((one / "adapter.json").read_text())["backbone_fingerprint"]
    start = adapted_llama()  # the same names
    moved = [key for key, value in found["one"][1].items() if "coefficients" in key and value.abs().max() > 0.01]
    assert len(moved) == len(adapters(start))


@pytest.mark.parametrize(
    ("kind", "source"),
    [("one", "ddp"), ("one", "fsdp"), ("ddp", "one"), ("ddp", "fsdp"), ("fsdp", "one"), ("fsdp", "ddp"), ("fsdp", "fsdp")],
)
def test_a_checkpoint_resumes_under_another_strategy_as_if_nothing_had_happened(runs, kind, source):
    _, found = runs
    losses, state = found[kind, source]
    assert losses == found["one"][0][STEPS_BEFORE_CHECKPOINT * MICRO_BATCHES :]
    assert all(torch.equal(value, found["one"][1][key]) for key, value in state.items())


def test_checkpoints_are_the_same_and_hold_nothing_frozen(runs):
    directory, _ = runs
    one, ddp, fsdp = (torch.load(directory / kind / CHECKPOINT, weights_only=True) for kind in ("one", "ddp", "fsdp"))
    for other in (ddp, fsdp):
        assert other["state_dict"].keys() == one["state_dict"].keys()
        assert not any(".base." in key or "embed" in key for key in other["state_dict"])
        assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
        assert other["adaptation"] == one["adaptation"]
        states, expected = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (other, one))
        assert states.keys() == expected.keys()
        for index, values in expected.items():
            assert all(torch.equal(value, states[index][name]) for name, value in values.items())


def runs_without_order(directory):
    return {kind: fit(directory, kind, base_dtype=torch.float32)[0] for kind in ("ddp", "fsdp")}


def test_without_ordered_addition_losses_differ_by_rounding_alone(tmp_path):
    """A float32 base; in bfloat16 the last bit of a float32 now and then rounds an activation the other way."""
    one, _ = fit(tmp_path / "one", base_dtype=torch.float32)
    first, second = run_in_two(runs_without_order, tmp_path)
    for kind in ("ddp", "fsdp"):
        losses = together(first[kind], second[kind])
        assert losses == pytest.approx(one, rel=1e-5)
        assert losses != one


TWO = ["q_proj", "down_proj"]
METHODS = {
    "LoRA": LoRAConfig(targets=TWO, r=2, dropout=0.3),
    "DoRA": DoRAConfig(targets=TWO, r=2),
    "PiSSA": PiSSAConfig(targets=TWO, r=2),
    "MiLoRA": MiLoRAConfig(targets=TWO, r=2),
    "KaSA": KaSAConfig(targets=TWO, r=2),
    "LoRA-Dash": LoRADashConfig(targets=TWO, r=2, num_directions=2, start=1),
    "TopLoRA": TopLoRAConfig(targets=TWO, r=2),
    "MELoRA": MELoRAConfig(targets=TWO, r=2),
    "FourierFT": FourierFTConfig(targets=["q_proj"], num_coefficients=16),
    "PEANuT": PEANuTConfig(targets=["q_proj"], r=2),
    "MoLoRA": MoLoRAConfig(targets=TWO, r=4, num_experts=4, dropout=0.3),
    "AdaMoLE": AdaMoLEConfig(targets=TWO, r=4, num_experts=4),
    "HydraLoRA": HydraLoRAConfig(targets=TWO, r=2, num_experts=4),
    "GOAT": GOATConfig(targets=TWO, r=4, num_experts=4),
    "shared routers": replace(ADAPTER, targets=["q_proj", "k_proj"], router_scope="input"),
}


def runs_of_methods(directory):
    """Two steps each: LoRA-Dash reads the weights after the first."""
    found = {}
    for name, adapter in METHODS.items():
        routed = hasattr(adapter, "num_experts")
        kinds = ("experts", "router") if routed else ("adapter",)
        rates = Optimization(**dict.fromkeys(kinds, ParameterGroup(0.01)))
        options = {"adapter": adapter, "rates": rates, "max_steps": 2, "base_dtype": torch.float32}
        found[name] = [fit(directory, kind, **options) for kind in ("ddp", "fsdp")]
    return found


def test_every_method_trains_sharded_what_it_trains_in_copies(tmp_path):
    """Also those that read the frozen weights at their start (PiSSA), after a step (LoRA-Dash) or in every forward (DoRA), and
    what is dropped (LoRA, MoLoRA) in the forward pass and once more where it is recomputed."""
    for found in run_in_two(runs_of_methods, tmp_path):
        for name, ((losses, state), (sharded_losses, sharded_state)) in found.items():
            assert len(losses) == 4
            assert sharded_losses == losses, name
            assert all(torch.equal(value, sharded_state[key]) for key, value in state.items()), name
