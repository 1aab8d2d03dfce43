"""RouterLoad: what is logged, drawn, written and warned of."""

import csv
import math
import warnings
from contextlib import nullcontext

import lightning as L
import pytest
import scipy.stats
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from support.clock import Clock
from support.token_task import ADAPTER, TokenData, token_batch, token_module, token_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from fourier_moe import AdaMoLEConfig, HeadOnly, RouterStatistics, StatisticsReader, adapters, routers
from lightning_modules.callbacks import RouterLoad
from lightning_modules.callbacks.monitoring.load_report import load_map
from lightning_modules.callbacks.monitoring.logged import pixels
from lightning_modules.callbacks.monitoring.router_load import enough_examples
from lightning_modules.optimization import Optimization, ParameterGroup

E, K, LAYERS = ADAPTER.num_experts, ADAPTER.top_k, ["q_proj", "v_proj"]
TASKS = ["boolq"] * 5 + ["piqa"] * 3


class TaskData(TokenData):
    """Every batch has five examples of one task and three of another, but the third, which has a third task alone."""

    def train_dataloader(self):
        batches = [{**token_batch(seed=seed), "task": TASKS} for seed in (0, 1)]
        return DataLoader([*batches, {**token_batch(seed=2), "task": ["arc"] * 8}], batch_size=None)


class Loads(L.Callback):
    """Measures the loads of every batch itself, with the routers as they are before the step."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        caught = {}

        def hook(name):
            return lambda router, inputs, routing: caught.update({name: routing.dense(E)})

        found = routers(module.model)
        handles = [router.register_forward_hook(hook(name)) for name, router in found.items()]
        with torch.no_grad():
            module.model.norm.eval()
            module.task.logits(batch)
            module.model.norm.train()
        for handle in handles:
            handle.remove()
        self.batches.append((batch, caught))

    def load(self, layer, choose=lambda batch: batch["mask"]):
        """Load (E,) of the chosen tokens, and their number."""
        gates = torch.cat([caught[layer][choose(batch).bool()] for batch, caught in self.batches])
        return (gates > 0).double().mean(0).tolist(), len(gates)

    def gate(self):
        gates = torch.cat([caught[layer][batch["mask"]] for layer in LAYERS for batch, caught in self.batches])
        return (gates.sum(0) / (gates > 0).sum(0)).tolist()


def fit(directory, *callbacks, data=None, logger=None, **options):
    """Fit without warnings of the callback; an interval is an epoch, three steps."""
    trainer = token_trainer(directory, *callbacks, **{"log_every_n_steps": 3, **options})
    trainer.loggers = [logger] if logger else []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="RouterLoad")
        trainer.fit(token_module(), data or TokenData())
    return trainer


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(row, kind="load"):
    return [float(row[f"{kind}/expert_{expert}"]) for expert in range(E)]


def test_loads_are_those_of_the_real_tokens_counted_by_hand(tmp_path):
    counted = Loads()
    logged = fit(tmp_path, counted, RouterLoad(detailed=True)).callback_metrics
    loads = {layer: counted.load(layer)[0] for layer in LAYERS}
    for expert in range(E):
        mean = sum(loads[layer][expert] for layer in LAYERS) / 2
        assert float(logged[f"router/load/expert_{expert}"]) == pytest.approx(mean)
        assert float(logged[f"router/gate/expert_{expert}"]) == pytest.approx(counted.gate()[expert], rel=1e-5)
    for layer in LAYERS:
        assert float(logged[f"router_layers/{layer}/load_imbalance"]) == pytest.approx(max(loads[layer]) * E / K)
    for row in rows(tmp_path / "router_load.csv"):
        load, tokens = counted.load(row["layer"])
        assert int(row["tokens"]) == tokens == sum(int(token_batch(seed=seed)["mask"].sum()) for seed in range(3))
        assert numbers(row) == pytest.approx(load, rel=1e-5)
        assert float(row["load_imbalance"]) == pytest.approx(max(load) * E / K, rel=1e-5)
    assert [row["layer"] for row in rows(tmp_path / "router_load.csv")] == LAYERS


def test_balance_loss_is_the_one_in_the_loss(tmp_path):
    logged = fit(tmp_path, RouterLoad(every_n_steps=1), limit_train_batches=1, log_every_n_steps=1).callback_metrics
    assert float(logged["router/balance_loss"]) == pytest.approx(float(logged["train/balance_loss"]), rel=1e-5)
    assert float(logged["router/balance_loss"]) == pytest.approx(0.5 * 2 * float(logged["router/balance_loss_unscaled"]))


class BatchLosses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, *_):
        self.values.append((float(module.batch_losses.weight), float(module.batch_losses.balance)))


class UnevenData(TokenData):
    def train_dataloader(self):
        return DataLoader([token_batch(size, seed=size) for size in (8, 2, 6, 1)], batch_size=None)


def test_balance_loss_of_an_interval_is_the_mean_over_its_steps_of_what_their_loss_contained(tmp_path):
    """And not that of all tokens together, which are balanced more evenly than those of any batch."""
    losses = BatchLosses()
    logged = fit(tmp_path, losses, RouterLoad(), log_every_n_steps=3).callback_metrics
    assert len(losses.values) == 3
    assert float(logged["router/balance_loss"]) == pytest.approx(sum(balance for _, balance in losses.values) / 3, rel=1e-6)
    assert float(logged["router/balance_loss"]) > 0.5 * 2 * float(logged["router/balance_loss_unscaled"]) + 1e-3


def test_balance_loss_of_an_accumulated_step_is_the_mean_by_weight_of_its_batches(tmp_path):
    losses, options = BatchLosses(), {"accumulate_grad_batches": 2, "log_every_n_steps": 2}
    logged = fit(tmp_path, losses, RouterLoad(), data=UnevenData(), **options).callback_metrics
    (a, first), (b, second), (c, third), (d, fourth) = losses.values
    assert (a, b, c, d) == (8, 2, 6, 1)
    steps = [(a * first + b * second) / (a + b), (c * third + d * fourth) / (c + d)]
    assert float(logged["router/balance_loss"]) == pytest.approx(sum(steps) / 2, rel=1e-6)


def test_balance_loss_counts_the_weight_that_a_callback_gives_each_projection(tmp_path):
    class OnlyQuery(L.Callback):
        def on_train_start(self, trainer, module):
            adapters(module.model)["q_proj"].balance_weight = 2.0
            adapters(module.model)["v_proj"].balance_weight = 0.0

    options = {"limit_train_batches": 1, "log_every_n_steps": 1}
    logged = fit(tmp_path, OnlyQuery(), RouterLoad(every_n_steps=1), **options).callback_metrics
    assert float(logged["router/balance_loss"]) == pytest.approx(float(logged["train/balance_loss"]), rel=1e-5)
    assert float(logged["router/balance_loss"]) > 3  # K = 2 or more, times 2


class Another(L.Callback):
    """Reads the same routers in its own time."""

    def on_train_start(self, trainer, module):
        self.reader, self.tokens = StatisticsReader(module.model), []

    def on_train_batch_end(self, trainer, module, *_):
        self.tokens.append(int(self.reader.read()["q_proj"].tokens))


def test_another_reader_takes_nothing_away(tmp_path):
    fit(tmp_path / "alone", RouterLoad())
    another = Another()
    fit(tmp_path / "both", another, RouterLoad())
    assert another.tokens == [int(token_batch(seed=seed)["mask"].sum()) for seed in range(3)]
    assert (tmp_path / "alone/router_load.csv").read_text() == (tmp_path / "both/router_load.csv").read_text()


class Interrupt(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            raise ValueError("interrupted")


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_is_counted_after_training(tmp_path, interrupted):
    callbacks, module = [RouterLoad(), Interrupt()] if interrupted else [RouterLoad()], token_module()
    trainer = token_trainer(tmp_path, *callbacks)
    with pytest.raises(ValueError, match="interrupted") if interrupted else nullcontext():
        trainer.fit(module, TokenData())
    for router in routers(module.model).values():
        with pytest.raises(RuntimeError, match="counts no tokens"):
            router.statistics()


def test_intervals_count_optimizer_steps_and_each_its_own_tokens(tmp_path):
    counted, logger = Loads(), CSVLogger(tmp_path, name="", version="")
    options = {"accumulate_grad_batches": 2, "max_epochs": 2, "limit_train_batches": 2}
    fit(tmp_path, counted, RouterLoad(every_n_steps=1), logger=logger, log_every_n_steps=50, **options)
    logged = [row for row in rows(tmp_path / "metrics.csv") if row["router/load/expert_0"]]
    assert [int(row["step"]) for row in logged] == [0, 1]
    batches = counted.batches
    for index, row in enumerate(logged):  # two batches each
        counted.batches = batches[2 * index : 2 * index + 2]
        mean = [sum(pair) / 2 for pair in zip(*(counted.load(layer)[0] for layer in LAYERS), strict=True)]
        assert [float(row[f"router/load/expert_{e}"]) for e in range(E)] == pytest.approx(mean)
    assert not any(tag.startswith("router_layers") for tag in logged[0])
    counted.batches = batches[2:]  # the files have the last epoch
    assert numbers(rows(tmp_path / "router_load.csv")[0]) == pytest.approx(counted.load("q_proj")[0], rel=1e-5)


def test_interval_of_the_trainer_by_default(tmp_path):
    fit(tmp_path, RouterLoad(), logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=2, max_epochs=2)
    logged = rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in logged if row["router/load_entropy"]] == [1, 3, 5]


def test_load_by_task(tmp_path, capsys, caplog):
    counted = Loads()
    with caplog.at_level("INFO"):
        fit(tmp_path, counted, RouterLoad(), data=TaskData())
    table = {(row["task"], row["layer"]): row for row in rows(tmp_path / "task_load.csv")}
    assert list(table) == [(task, layer) for task in ("arc", "boolq", "piqa") for layer in ("all", *LAYERS)]
    for task in ("arc", "boolq", "piqa"):
        loads = []
        for layer in LAYERS:
            own = lambda batch: batch["mask"] & torch.tensor([name == task for name in batch["task"]])[:, None]  # noqa: B023, E731
            load, tokens = counted.load(layer, own)
            assert numbers(table[task, layer]) == pytest.approx(load, rel=1e-5)
            assert int(table[task, layer]["tokens"]) == tokens
            loads.append(load)
        mean = [sum(pair) / 2 for pair in zip(*loads, strict=True)]
        assert numbers(table[task, "all"]) == pytest.approx(mean, rel=1e-5)
    printed = capsys.readouterr().out + capsys.readouterr().err + caplog.text
    line = next(line for line in printed.splitlines() if line.startswith("| piqa"))
    tasks = ("arc", "boolq", "piqa")
    loads = {layer: torch.tensor([numbers(table[task, layer]) for task in tasks]) for layer in LAYERS}
    widest = max(LAYERS, key=lambda layer: float((loads[layer].amax(0) - loads[layer].amin(0)).amax()))
    own = [round(100 * value) for value in numbers(table["piqa", widest])]
    assert f"that each expert serves in {widest}, where tasks differ most" in printed
    assert line.replace("|", "").split() == ["piqa", table["piqa", widest]["tokens"], *map(str, own)]
    assert Image.open(tmp_path / "task_load.png").width > 300


def test_without_tasks_there_are_no_task_files(tmp_path):
    fit(tmp_path, RouterLoad())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["router_load.csv", "router_load.png"]


def test_tensorboard_gets_scalars_and_maps(tmp_path):
    callback = RouterLoad(every_n_steps=1, heat_map_every_n_steps=2)
    fit(tmp_path, callback, data=TaskData(), logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {f"router/load/expert_{e}" for e in range(E)} <= set(events.Tags()["scalars"])
    for tag in ("router/load_map", "router/task_load_map"):
        assert [event.step for event in events.Images(tag)] == [1, 2]  # the second: at the end
    assert [event.step for event in events.Scalars("router/load_imbalance")] == [0, 1, 2]


@pytest.mark.parametrize(("steps", "shown"), [(None, [9, 23]), (10, [9, 19, 23])])
def test_slow_maps_are_left_out_unless_asked_for(tmp_path, monkeypatch, steps, shown):
    monkeypatch.setattr("lightning_modules.callbacks.monitoring.router_load.time", Clock())
    callback = RouterLoad(every_n_steps=1, heat_map_every_n_steps=steps)
    for run in ("a", "b"):  # the second does not wait for the first
        fit(tmp_path / run, callback, logger=TensorBoardLogger(tmp_path / run, name="", version=""), max_epochs=8)
        events = EventAccumulator(str(tmp_path / run))
        events.Reload()
        assert [event.step for event in events.Images("router/load_map")] == shown  # the last: at the end


def force(module):
    """The q projection sends every token to experts 0 and 1."""
    router = routers(module.model)["q_proj"]
    with torch.no_grad():
        module.model.embedding.weight.abs_()
        router.weight[:2], router.weight[2:] = 5, -5


FROZEN = Optimization(ParameterGroup(1e-3), router=ParameterGroup(1e-6), head=ParameterGroup(1e-3), schedule="constant")


def warnings_of_forced(directory, callback):
    """What is warned of in two epochs with a forced router."""
    module = token_module(optimization=FROZEN)
    module.configure_model()
    force(module)
    trainer = token_trainer(directory, callback, max_epochs=2, log_every_n_steps=3)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer.fit(module, TokenData())
    assert float(trainer.callback_metrics["router/dead_experts"]) == (2 / 8 if callback.dead_below else 0)
    dead = [float(trainer.callback_metrics[f"router/dead_layers/expert_{e}"]) for e in range(E)]
    assert dead == ([0, 0, 1, 1] if callback.dead_below else [0] * E)
    return [str(warning.message) for warning in record if str(warning.message).startswith("RouterLoad")]


def test_collapse_is_warned_of_once_with_what_to_change(tmp_path):
    (message,) = warnings_of_forced(tmp_path, RouterLoad())
    assert "step 3: routing has collapsed" in message
    assert "the same 2 experts, in q_proj. " in message
    assert "Raise --model.adapter.balance_weight (now 0.5)" in message
    assert "lower --model.optimization.router.lr (now 1e-06)" in message
    assert "--model.adapter.num_experts, now 4" in message


def test_dead_experts_are_warned_of_once_each(tmp_path):
    (message,) = warnings_of_forced(tmp_path, RouterLoad(collapse_below=0))
    assert "less than 1 % of an even load" in message
    assert "q_proj expert 2, q_proj expert 3. Raise" in message


@pytest.mark.parametrize(("bias", "active", "dead"), [(-50.0, 4, 0), (50.0, 0, 1)])
def test_threshold_router_is_measured_and_warned_of_as_any_other(tmp_path, bias, active, dead):
    module = token_module(AdaMoLEConfig(targets=LAYERS, r=8, num_experts=4, max_threshold=1.0))
    module.configure_model()
    for router in routers(module.model).values():
        router.threshold_bias.data.fill_(bias)
    trainer = token_trainer(tmp_path, RouterLoad(), max_epochs=2, log_every_n_steps=3)
    with pytest.warns(UserWarning, match="experts died.* q_proj expert 0, ") if dead else nullcontext():
        trainer.fit(module, TokenData())
    metrics = trainer.callback_metrics
    assert float(metrics["router/active_experts"]) == active
    assert float(metrics["router/dead_experts"]) == dead
    assert float(metrics["router/load/expert_2"]) == active / 4


@pytest.mark.parametrize("below", [0.0, 0.01, 0.3])
def test_healthy_experts_rarely_look_dead_among_enough_examples(below):
    """Judged from the exact binomial distribution of the examples that an expert with an even load serves."""
    layers = RouterStatistics(torch.tensor([[1.0, 1.0, 1.0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0, 2.0]] * 6))  # K = 2 of E = 4
    least = next(count for count in range(1, 1000) if enough_examples(count, layers, below))
    looks_dead = scipy.stats.binom.cdf(math.ceil(below * least / 2) - 1, least, 0.5) if below else 0.5**least
    assert 6 * 4 * looks_dead <= 0.01
    assert not enough_examples(least - 1, layers, below)
    assert enough_examples(2 * least, layers, below)


def test_few_examples_raise_no_alarm_until_their_intervals_add_up(tmp_path):
    """Three examples an interval say nothing; four intervals do."""

    class Small(TokenData):
        def train_dataloader(self):
            return DataLoader([token_batch(3, seed=seed) for seed in range(10)], batch_size=None)

    module = token_module(optimization=FROZEN)
    module.configure_model()
    force(module)
    trainer = token_trainer(tmp_path, RouterLoad(collapse_below=0), max_epochs=1, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="step 4: experts died"):
        trainer.fit(module, Small())


def test_thresholds_of_0_never_warn(tmp_path):
    assert warnings_of_forced(tmp_path, RouterLoad(dead_below=0, collapse_below=0)) == []


def test_healthy_routing_has_no_dead_experts(tmp_path):
    assert float(fit(tmp_path, RouterLoad()).callback_metrics["router/dead_experts"]) == 0


def test_model_without_routers_is_left_in_peace(tmp_path):
    module = token_module(HeadOnly(), Optimization(head=ParameterGroup(0.01)))
    trainer = token_trainer(tmp_path, RouterLoad(every_n_steps=1))
    trainer.fit(module, TokenData())
    assert not any(tag.startswith("router") for tag in trainer.callback_metrics)
    assert list(tmp_path.iterdir()) == []


def test_fast_dev_run_writes_nothing(tmp_path):
    fit(tmp_path, RouterLoad(every_n_steps=1), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_logging_switched_off_still_writes_the_files(tmp_path):
    trainer = fit(tmp_path, RouterLoad(), log_every_n_steps=0)
    assert "router/load_entropy" not in trainer.callback_metrics
    assert len(rows(tmp_path / "router_load.csv")) == 2


def test_a_callback_serves_two_runs_and_starts_each_from_nothing(tmp_path):
    callback = RouterLoad()
    fit(tmp_path / "a", callback)
    fit(tmp_path / "b", callback)
    assert (tmp_path / "a/router_load.csv").read_text() == (tmp_path / "b/router_load.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be 1 or more, or null"),
        ({"heat_map_every_n_steps": -1}, "heat_map_every_n_steps=-1 must be 1 or more"),
        ({"dead_below": 1.5}, "dead_below=1.5 must be 0 or more and less than 1"),
        ({"collapse_below": -0.1}, "collapse_below=-0.1 must be"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        RouterLoad(**arguments)


@pytest.mark.parametrize(("num_rows", "top_k", "busiest"), [(1, 2, 0.3), (300, 1, 1.0), (3, 4, 1.0)])
def test_maps_of_any_size_are_drawn(num_rows, top_k, busiest):
    load = torch.full((num_rows, 4), top_k / 4)
    load[0, 0] = busiest
    image = pixels(load_map(load, [f"model.layers.{row}.q_proj" for row in range(num_rows)], top_k / 4, "load"))
    assert image.shape[-1] == 4
    assert image.shape[0] <= 3000
    assert image.std() > 10


def test_labels_of_a_map_leave_out_what_all_share():
    figure = load_map(torch.rand(2, 4), ["model.layers.0.q_proj", "model.layers.1.q_proj"], 0.5, "load")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0.q_proj", "1.q_proj"]
    assert figure.get_suptitle() == "load"


class DataOfProcess(TokenData):
    """Each process has a batch of its own, of a task that the other has not."""

    def train_dataloader(self):
        rank = torch.distributed.get_rank()
        return DataLoader([{**token_batch(seed=rank), "task": [f"task {rank}"] * 8}], batch_size=None)


def test_two_processes_are_counted_together(tmp_path):
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "log_every_n_steps": 1}
    trainer = token_trainer(tmp_path, RouterLoad(), **options)
    trainer.fit(token_module(), DataOfProcess())
    tokens = [int(token_batch(seed=rank)["mask"].sum()) for rank in range(2)]
    assert {int(row["tokens"]) for row in rows(tmp_path / "router_load.csv")} == {sum(tokens)}
    by_task = {row["task"]: int(row["tokens"]) for row in rows(tmp_path / "task_load.csv")}
    assert by_task == {"task 0": tokens[0], "task 1": tokens[1]}
    assert "router/load_entropy" in trainer.callback_metrics
