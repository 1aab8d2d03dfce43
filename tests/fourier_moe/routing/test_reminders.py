"""A training loop that leaves out balance loss, penalty or after_step is told so, once; no other loop is."""

import copy
import pickle
import warnings

import pytest
import torch
from support.models import Transformer, config
from torch.utils.checkpoint import checkpoint

from fourier_moe import (
    AdaMoLEConfig,
    FFTMoEConfig,
    GOATConfig,
    HydraLoRAConfig,
    KaSAConfig,
    LoRADashConfig,
    MoLoRAConfig,
    StatisticsReader,
    after_step,
    balance_loss,
    inject,
    recording,
    regularization,
)

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
COMMON = {"targets": ["q_proj", "v_proj"], "head": ["classifier"]}
BALANCED = [
    config(head=["classifier"]),
    config(head=["classifier"], router_scope="block"),
    MoLoRAConfig(**COMMON, r=4, num_experts=4),
    AdaMoLEConfig(**COMMON, r=4, num_experts=4),
    GOATConfig(**COMMON, r=4, num_experts=4),
    FFTMoEConfig(**COMMON, num_experts=2),
]


def adapted(settings):
    model = Transformer()
    inject(model, settings)
    return model


def reminders(run, times=3):
    """Return the reminders while `run` is called some times."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            run()
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "the adapters" in text]


@pytest.mark.parametrize("settings", BALANCED, ids=lambda settings: type(settings).__name__)
def test_training_without_balance_loss_is_said_once_with_what_to_add(settings):
    model = adapted(settings)
    (text,) = reminders(lambda: model(X).sum().backward())
    assert "with recording(model):\n        loss = compute_loss(model, batch) + balance_loss(model)" in text
    assert "balance_weight=0" in text
    assert reminders(lambda: model(X)) == []
    assert len(reminders(lambda: adapted(settings)(X))) == 3  # once a model


def test_recording_whose_balance_loss_is_not_read_is_said_too():
    model = adapted(BALANCED[0])
    reader = StatisticsReader(model)

    def step():
        with recording(model):
            loss = model(X).sum()
        loss.backward()

    assert len(reminders(step)) == 1
    assert reader.read()


def step_with_balance_loss(model):
    with recording(model):
        loss = model(X).sum() + balance_loss(model)
    loss.backward()


@pytest.mark.parametrize("settings", BALANCED, ids=lambda settings: type(settings).__name__)
def test_nothing_is_said_of_loops_that_need_no_balance_loss_here(settings):
    model = adapted(settings)
    with torch.no_grad():
        assert reminders(lambda: model(X)) == []
    assert reminders(lambda: model.eval()(X).sum().backward()) == []
    assert reminders(lambda: step_with_balance_loss(model.train())) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_backward_is_no_forward_outside_of_recording(reentrant):
    model = adapted(BALANCED[0])
    layers = model.layers

    class Checkpointed(torch.nn.Module):
        def forward(self, x):
            return checkpoint(layers, x, use_reentrant=reentrant)

    model.layers = Checkpointed()
    model.layers.inner = layers

    def step():
        with recording(model):
            loss = model(X.clone().requires_grad_()).sum() + (0 if reentrant else balance_loss(model))
        loss.backward()

    assert reminders(step) == []


def test_weight_0_and_methods_without_routing_need_none():
    for settings in (config(balance_weight=0.0), HydraLoRAConfig(**COMMON, num_experts=4)):
        model = adapted(settings)
        assert reminders(lambda model=model: model(X).sum().backward()) == []


def test_compiled_model_is_one_graph_and_says_nothing():
    model = adapted(BALANCED[0]).layers
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert reminders(lambda: compiled(X).sum().backward()) == []


def test_copies_and_pickles_remind_of_their_own():
    model = adapted(BALANCED[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(reminders(lambda other=other: other(X))) == 1
    assert len(reminders(lambda: model(X))) == 1


@pytest.mark.parametrize(
    ("settings", "does", "text"),
    [
        (KaSAConfig(**COMMON, r=2), regularization, r"loss + regularization(model)"),
        (LoRADashConfig(**COMMON, r=2, num_directions=2), after_step, "call after_step(model) after every optimizer.step()"),
    ],
    ids=["kasa", "lora_dash"],
)
def test_penalty_and_after_step_are_missed_after_a_while(settings, does, text):
    model = adapted(settings).layers

    def step():
        model(X)

    assert reminders(step, 100) == []
    (message,) = reminders(step, 300)
    assert text in message
    heeding = adapted(settings).layers
    does(heeding)
    assert reminders(lambda: heeding(X), 300) == []
