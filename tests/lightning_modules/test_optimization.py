"""Groups, optimizers and schedules."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.token_task import ADAPTER, TokenData, TokenModel, token_module, token_trainer
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import SWALR

from fourier_moe import FullFineTuning, HeadOnly, adapters, inject
from lightning_modules.optimization import Optimization, ParameterGroup


def adapted(config=ADAPTER):
    model = TokenModel(2)
    config = type(config)(**{**vars(config), "head": ["head"]})
    inject(model, config)
    return model, config


def groups_of(optimization, config=ADAPTER):
    model, config = adapted(config)
    return model, {group["name"]: group for group in optimization.build_optimizer(model, config).param_groups}


def same(parameters, others):
    return {id(parameter) for parameter in parameters} == {id(other) for other in others}


def test_each_kind_has_a_named_group_with_its_own_rate_and_weight_decay_and_its_own_parameters():
    optimization = Optimization(
        experts=ParameterGroup(0.1, 0.2), router=ParameterGroup(0.3, 0.4), head=ParameterGroup(0.5, 0.6), betas=(0.8, 0.99)
    )
    model, groups = groups_of(optimization)
    rates = {name: (group["lr"], group["weight_decay"], group["betas"]) for name, group in groups.items()}
    betas = (0.8, 0.99)
    assert rates == {"experts": (0.1, 0.2, betas), "router": (0.3, 0.4, betas), "head": (0.5, 0.6, betas)}
    layers = adapters(model).values()
    assert same(groups["experts"]["params"], [layer.experts.coefficients for layer in layers])
    assert same(groups["router"]["params"], [layer.router.weight for layer in layers])
    assert same(groups["head"]["params"], model.head.parameters())


def test_router_takes_the_experts_rate_and_weight_decay_unless_it_has_its_own():
    _, groups = groups_of(Optimization(experts=ParameterGroup(0.1, 0.2), head=ParameterGroup(0.5)))
    assert (groups["router"]["lr"], groups["router"]["weight_decay"]) == (0.1, 0.2)


def test_full_fine_tuning_has_the_pretrained_weights_in_the_backbone_group():
    rates = Optimization(backbone=ParameterGroup(0.1), head=ParameterGroup(0.5))
    model, groups = groups_of(rates, FullFineTuning())
    assert set(groups) == {"backbone", "head"}
    assert same(groups["backbone"]["params"], [p for name, p in model.named_parameters() if not name.startswith("head.")])


def test_head_only_has_one_group():
    _, groups = groups_of(Optimization(head=ParameterGroup(0.5)), HeadOnly())
    assert set(groups) == {"head"}


@pytest.mark.parametrize(
    ("config", "groups", "message"),
    [
        (ADAPTER, {"head": ParameterGroup(0.1)}, "optimization.experts is missing, but FourierMoEConfig trains experts"),
        (ADAPTER, {"experts": ParameterGroup(0.1)}, "optimization.head is missing, but FourierMoEConfig trains head"),
        (FullFineTuning(), {"head": ParameterGroup(0.1)}, "optimization.backbone is missing, but FullFineTuning"),
        (
            ADAPTER,
            {"experts": ParameterGroup(0.1), "head": ParameterGroup(0.1), "backbone": ParameterGroup(0.1)},
            "optimization.backbone is given, but FourierMoEConfig trains no backbone",
        ),
        (
            HeadOnly(),
            {"head": ParameterGroup(0.1), "experts": ParameterGroup(0.1)},
            "optimization.experts is given, but HeadOnly",
        ),
        (
            HeadOnly(),
            {"head": ParameterGroup(0.1), "router": ParameterGroup(0.1)},
            "optimization.router is given, but HeadOnly",
        ),
    ],
)
def test_kind_without_group_and_group_without_parameters_are_errors(config, groups, message):
    model, config = adapted(config)
    with pytest.raises(ValueError, match=message):
        Optimization(**groups).build_optimizer(model, config)


def test_rate_of_a_head_that_the_task_does_not_name_is_an_error_that_says_where_to_name_it():
    model = TokenModel(2)
    inject(model, ADAPTER)
    with pytest.raises(
        ValueError, match=r"optimization\.head is given, .* set it to null, or name the head in the task's head_"
    ):
        Optimization(experts=ParameterGroup(0.1), head=ParameterGroup(0.1)).build_optimizer(model, ADAPTER)


@pytest.mark.parametrize("field", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_negative_or_infinite_rate_is_an_error(field, value):
    with pytest.raises(ValueError, match=rf"optimization\.head\.{field}={value} must be 0 or more"):
        Optimization(head=ParameterGroup(**{"lr": 0.1, field: value}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "cosin"}, "schedule='cosin' must be one of linear, cosine, constant"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio=1.0 must be in \[0, 1\)"),
        ({"warmup_ratio": -0.1}, "warmup_ratio=-0.1"),
        ({"warmup_ratio": True}, "warmup_ratio=True must be a number"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be two numbers in \[0, 1\)"),
    ],
)
def test_impossible_setting_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        Optimization(**values)


def optimizer_and_scheduler(num_steps, rates=(0.1, 0.01), **options):
    optimization = Optimization(experts=ParameterGroup(rates[0]), head=ParameterGroup(rates[1]), **options)
    model, config = adapted()
    optimizer = optimization.build_optimizer(model, config)
    return optimization, optimizer, optimization.build_scheduler(optimizer, num_steps)


def advance(optimizer, scheduler, steps):
    """Rates (experts, head) before each of these steps and after the last."""
    seen = []
    for _ in range(steps):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]))
        optimizer.step()
        scheduler.step()
    return [*seen, (optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"])]


@pytest.mark.parametrize(
    ("schedule", "factors"),  # of 10 steps, 2 of them warm-up
    [
        ("linear", [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
        ("cosine", [0, 0.5, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060, 0]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedule_warms_up_and_decays_each_rate(schedule, factors):
    _, optimizer, scheduler = optimizer_and_scheduler(10, schedule=schedule, warmup_ratio=0.2)
    rates = advance(optimizer, scheduler, 10)
    assert [experts for experts, _ in rates] == pytest.approx([0.1 * factor for factor in factors], abs=1e-7)
    assert [head for _, head in rates] == pytest.approx([0.01 * factor for factor in factors], abs=1e-7)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    _, optimizer, _ = optimizer_and_scheduler(10, warmup_ratio=0.0)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("steps_before", [1, 3, 6])
@pytest.mark.parametrize("old", [(0.2, 0.05), (0.2, 0.0)], ids=["other rates", "head had rate 0"])
def test_override_puts_new_values_into_a_checkpoint_and_keeps_its_place_in_the_schedule(steps_before, old):
    options = {"schedule": "cosine", "warmup_ratio": 0.5}
    _, optimizer, scheduler = optimizer_and_scheduler(10, old, **options)
    advance(optimizer, scheduler, steps_before)
    checkpoint = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [scheduler.state_dict()]}

    new, fresh, fresh_scheduler = optimizer_and_scheduler(10, (0.1, 0.01), betas=(0.5, 0.9), **options)
    new.override(checkpoint)
    fresh.load_state_dict(checkpoint["optimizer_states"][0])
    fresh_scheduler.load_state_dict(checkpoint["lr_schedulers"][0])
    assert [group["betas"] for group in fresh.param_groups] == [(0.5, 0.9)] * 3

    _, reference, reference_scheduler = optimizer_and_scheduler(10, (0.1, 0.01), **options)
    expected = advance(reference, reference_scheduler, 10)[steps_before:]
    for rates, others in zip(advance(fresh, fresh_scheduler, 10 - steps_before), expected, strict=True):
        assert rates == pytest.approx(others, abs=1e-12)


def test_without_override_a_checkpoint_would_bring_its_own_rates_back():
    """Why override is there."""
    _, optimizer, scheduler = optimizer_and_scheduler(10, (0.2, 0.05))
    advance(optimizer, scheduler, 3)
    _, fresh, fresh_scheduler = optimizer_and_scheduler(10, (0.1, 0.01))
    fresh.load_state_dict(optimizer.state_dict())
    fresh_scheduler.load_state_dict(scheduler.state_dict())
    assert advance(fresh, fresh_scheduler, 2)[-1] == pytest.approx(advance(optimizer, scheduler, 2)[-1])


def test_override_leaves_a_checkpoint_without_optimizer_as_it_is():
    checkpoint = {"state_dict": {"a": torch.zeros(1)}}
    Optimization(experts=ParameterGroup(0.1)).override(checkpoint)
    assert list(checkpoint) == ["state_dict"]


STEPS = partial(lr_scheduler.StepLR, step_size=2, gamma=0.5)
PLATEAU = partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0)  # no epoch is good enough
MOMENTUM = partial(SGD, momentum=0.9)
HALVES = partial(lr_scheduler.ExponentialLR, gamma=0.5)


def chosen(optimizer=MOMENTUM, schedule=STEPS, rates=(0.1, 0.01), **options):
    groups = {"experts": ParameterGroup(rates[0], 0.1), "router": ParameterGroup(0.05), "head": ParameterGroup(rates[1])}
    return Optimization(**groups, optimizer=optimizer, schedule=schedule, warmup_ratio=0.0, **options)


def test_chosen_optimizer_has_the_groups_and_the_chosen_scheduler_scales_their_rates():
    model, config = adapted()
    optimizer = chosen().build_optimizer(model, config)
    rates = {group["name"]: (group["lr"], group["weight_decay"], group["momentum"]) for group in optimizer.param_groups}
    assert rates == {"experts": (0.1, 0.1, 0.9), "router": (0.05, 0.0, 0.9), "head": (0.01, 0.0, 0.9)}
    seen = advance(optimizer, chosen().build_scheduler(optimizer, 5), 4)
    assert seen == [(0.1, 0.01), (0.1, 0.01), (0.05, 0.005), (0.05, 0.005), (0.025, 0.0025)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": partial(SGD, lr=0.2)}, r"sets lr=0.2 for SGD, but every group has its own; set optimization.experts.lr"),
        ({"optimizer": partial(torch.optim.Adam, lr=1e-3)}, "sets lr=0.001 for Adam"),
        ({"optimizer": lambda groups: SGD(groups, lr=0.2)}, "sets lr=0.2 for SGD"),
        ({"optimizer": partial(SGD, weight_decay=0.2)}, "sets weight_decay=0.2 for SGD"),
        ({"optimizer": partial(SGD, nesterov=True)}, "optimization.optimizer cannot be built: Nesterov momentum requires"),
        ({"optimizer": partial(SGD, momentun=0.9)}, "optimization.optimizer cannot be built: .*momentun"),
        ({"optimizer": torch.optim.LBFGS}, "optimization.optimizer cannot be built: LBFGS doesn't support"),
        ({"optimizer": torch.optim.Rprop}, "Rprop has no weight decay; set weight_decay of all groups to 0"),
        ({"optimizer": dict}, "optimization.optimizer "),
        ({"betas": (0.8, 0.99)}, "are AdamW's, and optimization.optimizer is given"),
        ({"schedule": partial(lr_scheduler.StepLR)}, "optimization.schedule cannot be built: .*step_size"),
        ({"schedule": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9)}, "OneCycleLR replaces the learning rates"),
        ({"schedule": partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.2)}, "CyclicLR replaces the learning rates"),
        ({"schedule": partial(SWALR, swa_lr=0.06)}, r"SWALR replaces the learning rates .*\(router: 0.0502, not 0.05\)"),
        (
            {"schedule": partial(lr_scheduler.CosineAnnealingLR, T_max=9, eta_min=0.02)},
            r"CosineAnnealingLR replaces .*\(head: ",
        ),
        (
            {"schedule": partial(lr_scheduler.ReduceLROnPlateau, min_lr=[0.1] * 4)},
            "schedule cannot be built: expected 3 min_lrs",
        ),
        ({"schedule": PLATEAU, "schedule_interval": "epoch"}, "schedule_interval='epoch' has no effect on ReduceLROnPlateau"),
        ({"schedule": "constant", "schedule_interval": "epoch"}, "schedule='constant' counts steps"),
        ({"schedule_interval": "batch"}, "schedule_interval='batch' must be 'step' or 'epoch'"),
    ],
)
def test_class_that_cannot_train_these_groups_is_refused_before_there_is_a_model(options, message):
    with pytest.raises(ValueError, match=message):
        chosen(**options)


@pytest.mark.parametrize(
    "schedule",
    [
        partial(lr_scheduler.ReduceLROnPlateau, min_lr=[1e-3, 1e-3, 1e-3]),  # experts, router, head
        partial(lr_scheduler.CosineAnnealingLR, T_max=9, eta_min=1e-3),
        partial(lr_scheduler.LambdaLR, lr_lambda=[lambda step: 1 + step, lambda step: 2.0, lambda step: 0.5]),
        partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: [1.0, 0.5][step]),
    ],
    ids=["floors", "floor", "factors by group", "fewer steps"],
)
def test_schedule_may_have_a_floor_factors_by_group_and_an_end(schedule):
    chosen(schedule=schedule)


def test_list_by_group_fits_adapters_with_and_without_a_router_of_the_experts_rate():
    for number in (2, 3):
        floors = partial(lr_scheduler.ReduceLROnPlateau, min_lr=[1e-3] * number)
        Optimization(experts=ParameterGroup(0.1), head=ParameterGroup(0.1), schedule=floors, warmup_ratio=0.0)


def test_warm_up_is_of_named_schedules():
    with pytest.raises(ValueError, match=r"warmup_ratio=0.03 is of named schedules; set it to 0"):
        Optimization(schedule=STEPS)


def test_optimizer_that_does_not_take_these_parameters_is_one_line():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    muon = Optimization(experts=ParameterGroup(0.1), head=ParameterGroup(0.1), optimizer=torch.optim.Muon)
    with pytest.raises(ValueError, match=r"optimization.optimizer cannot be built: .*2D"):
        muon.build_optimizer(*adapted())


def trained(directory, optimization, epochs=4, checkpoint=None):
    """The module after a run with a checkpoint at the end of every epoch, and the experts' rate at the end."""
    module = token_module(optimization=optimization)
    saving = ModelCheckpoint(directory, "{epoch}", save_top_k=-1)
    trainer = token_trainer(directory, saving, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, TokenData(), ckpt_path=checkpoint)
    return module.model.state_dict(), trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 0.1 * 0.5**6),  # 12 steps
        ({"schedule": HALVES, "schedule_interval": "epoch"}, 0.1 * 0.5**4),
        ({"schedule": PLATEAU}, 0.1 * 0.1**4),
        ({"schedule": "constant", "optimizer": torch.optim.NAdam}, 0.1),
    ],
    ids=["step", "epoch", "plateau", "optimizer alone"],
)
def test_run_with_chosen_classes_resumes_to_the_bit(tmp_path, options, rate):
    whole, last = trained(tmp_path / "whole", chosen(**options))
    assert last == pytest.approx(rate)
    again, resumed = trained(tmp_path / "rest", chosen(**options), checkpoint=tmp_path / "whole/epoch=1.ckpt")
    assert resumed == last
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_checkpoint_of_another_class_is_refused_and_new_settings_replace_its_own(tmp_path):
    trained(tmp_path, chosen(), epochs=1)
    checkpoint = tmp_path / "epoch=0.ckpt"
    with pytest.raises(ValueError, match="the checkpoint's optimizer is SGD, this run's is AdamW; resume with the same"):
        trained(tmp_path, chosen(None), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="the checkpoint's scheduler is StepLR, this run's is ExponentialLR"):
        trained(tmp_path, chosen(schedule=HALVES), checkpoint=checkpoint)
    stored = torch.load(checkpoint, weights_only=True)
    slower = partial(lr_scheduler.StepLR, step_size=9, gamma=0.1)
    with pytest.raises(
        ValueError, match=r"schedule has step_size=2, gamma=0.5, this run's step_size=9, gamma=0.1; resume with"
    ):
        chosen(schedule=slower).override(stored)
    with pytest.raises(ValueError, match="has schedule_interval=step, this run's schedule_interval=epoch"):
        chosen(schedule_interval="epoch").override(stored)
    older = {**copy.deepcopy(stored), "optimization": {"optimizer": "SGD", "scheduler": "StepLR"}}
    chosen(schedule=slower).override(older)
    chosen(partial(SGD, momentum=0.5), rates=(0.2, 0.01)).override(stored)
    group = stored["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["momentum"]) == (0.1, 0.5)  # half of the peak after 3 steps


def nested(optimizer, halves=0.5, restart=3):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4)]
    sequence = lr_scheduler.SequentialLR(optimizer, parts, [restart])
    return lr_scheduler.ChainedScheduler([sequence, lr_scheduler.ExponentialLR(optimizer, halves)])


def test_new_rates_reach_nested_schedulers_and_a_change_of_their_settings_is_refused():
    def built(rates, **options):
        optimization = chosen(schedule=partial(nested, **options), rates=rates)
        optimizer = optimization.build_optimizer(*adapted())
        return optimization, optimizer, optimization.build_scheduler(optimizer, 1)

    old, optimizer, scheduler = built((0.1, 0.01))
    advance(optimizer, scheduler, 2)
    states = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [scheduler.state_dict()]}
    for options, message in (({"halves": 0.7}, "schedulers.1.gamma=0.5"), ({"restart": 4}, "schedulers.0.milestones=")):
        with pytest.raises(ValueError, match=message):
            built((0.1, 0.01), **options)[0].override({**states, "optimization": old.description()})
    new, optimizer, scheduler = built((0.2, 0.03))
    new.override({**states, "optimization": old.description()})
    optimizer.load_state_dict(states["optimizer_states"][0])
    scheduler.load_state_dict(states["lr_schedulers"][0])
    _, reference, reference_scheduler = built((0.2, 0.03))
    expected = advance(reference, reference_scheduler, 9)[2:]
    assert advance(optimizer, scheduler, 7) == [pytest.approx(rates) for rates in expected]


def test_plateau_waits_for_the_direction_of_what_validation_is_judged_by(tmp_path):
    upward = partial(lr_scheduler.ReduceLROnPlateau, mode="max")
    with pytest.raises(ValueError, match="mode='max' must be 'min', since it follows val/loss"):
        trained(tmp_path, chosen(schedule=upward), epochs=1)


@pytest.mark.parametrize(
    "options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}, {}], ids=["off", "late", "no data"]
)
def test_plateau_needs_validation(tmp_path, monkeypatch, options):
    if not options:
        monkeypatch.setattr(TokenData, "val_dataloader", lambda self: [])
    trainer = token_trainer(tmp_path, num_sanity_val_steps=0, **options)
    with pytest.raises(ValueError, match="ReduceLROnPlateau advances after validations, and this run has none"):
        trainer.fit(token_module(optimization=chosen(schedule=PLATEAU)), TokenData())
