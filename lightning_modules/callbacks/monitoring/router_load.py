"""RouterLoad: which experts the tokens go to during training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from fourier_moe import RouterStatistics, StatisticsReader
from fourier_moe.errors import UserError, shorten
from fourier_moe.inject import adapter_config
from lightning_modules.adaptation import AdaptationModule
from lightning_modules.callbacks.any_module import adapted_model, num_examples
from lightning_modules.callbacks.monitoring.load_report import load_map, task_map, task_table, write_layers, write_tasks
from lightning_modules.callbacks.monitoring.load_sums import LoadSums
from lightning_modules.callbacks.monitoring.logged import (
    log_now,
    rendered,
    show_images,
    takes_images,
    write_images,
)
from lightning_modules.run_directory import run_directory

MAPS = {"router/load_map": "router_load", "router/task_load_map": "task_load"}  # TensorBoard's tag and the file's name


class RouterLoad(L.Callback):
    """Log how routers distribute the tokens of training, over all processes and without padding; warn when they collapse.

    Every interval, means over the routers of the model (`fourier_moe.RouterStatistics` has the formulas):

    - `router/active_experts`, experts that serve a token: K, or those above a threshold;
    - `router/load_imbalance` (1 is even), `router/load_entropy` (1 is even), `router/dead_experts` (share of all experts);
    - `router/load/expert_{e}`, share of the tokens that expert e serves, `router/gate/expert_{e}`, its mean gate there, and
      `router/dead_layers/expert_{e}`, the number of layers in which it is dead;
    - `router/balance_loss_unscaled`, K when even: the loss's formula over all tokens of the interval;
    - `router/balance_loss`, the balance term of the loss: mean over the interval's optimizer steps, in each over its batches
      and processes by their weight in the step. A batch's term is the formula over its own tokens, summed over the routers,
      each times its projection's `balance_weight`. Few tokens are less balanced than many, so it exceeds the unscaled loss.
      Only for AdaptationModule; another LightningModule logs its own terms.

    TensorBoard also shows a map of the load per layer and expert (`router/load_map`, dead experts are crossed out) and, where
    batches name their `task`, the load per task and expert in the layers where tasks differ most (`router/task_load_map`; a
    mean over the layers would hide it). At the end of training the maps of the last epoch are in the
    run directory: router_load.png, router_load.csv, task_load.png, task_load.csv (every layer). Models without routers are
    ignored.

    Args:
        every_n_steps: optimizer steps in an interval; null for the trainer's log_every_n_steps.
        detailed: also log `router_layers/{layer}/...` for every layer.
        heat_map_every_n_steps: optimizer steps between two maps in TensorBoard; null for ten intervals, or more if drawing
            would take more than a hundredth of the time.
        dead_below: an expert is dead if its load in an interval is less than this share of an even load. No warning comes
            before so many examples that an expert with an even load would hardly ever look dead (`enough_examples`).
        collapse_below: a layer has collapsed if its `RouterStatistics.balance` (1 even, 0 collapsed) is less.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        detailed: bool = False,
        heat_map_every_n_steps: int | None = None,
        dead_below: float = 0.01,
        collapse_below: float = 0.2,
    ) -> None:
        for name, steps in (("every_n_steps", every_n_steps), ("heat_map_every_n_steps", heat_map_every_n_steps)):
            if steps is not None and steps < 1:
                raise UserError(f"{name}={steps} must be 1 or more, or null")
        for name, share in (("dead_below", dead_below), ("collapse_below", collapse_below)):
            if not 0 <= share < 1:
                raise UserError(f"{name}={share} must be 0 or more and less than 1; 0 never warns")
        self.every_n_steps = every_n_steps
        self.detailed = detailed
        self.heat_map_every_n_steps = heat_map_every_n_steps
        self.dead_below = dead_below
        self.collapse_below = collapse_below
        self._reader: StatisticsReader | None = None  # during training
        self._layers: list[str] = []
        self._interval: LoadSums | None = None
        self._map: LoadSums | None = None  # since the last map
        self._epoch: LoadSums | None = None
        self._unjudged: LoadSums | None = None  # since the last check for dead experts
        self._examples = 0  # in it
        self._in_step: list[torch.Tensor] = []  # weight, and weight times balance loss (2,), of each batch in a step
        self._in_interval: list[torch.Tensor] = []  # their sums (2,) over each step, on this process
        self._last_step = 0
        self._no_map_before = 0.0  # time.monotonic()
        self._warned: set[tuple[str, int | None]] = set()  # layer and expert, or None for the layer

    # ---------------------------------------------------------------- when

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        adapted_model(pl_module, self)  # or an error before training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reader = StatisticsReader(adapted_model(pl_module, self))
        self._layers = list(self._reader.routers)
        self._interval = self._map = self._epoch = self._unjudged = None
        self._examples = 0
        self._in_step, self._in_interval = [], []
        self._last_step, self._no_map_before, self._warned = trainer.global_step, 0.0, set()
        if not self._layers:
            rank_zero_info("RouterLoad: this model has no routers, so there is nothing to log")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epoch = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        interval = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self._layers or not interval:  # log_every_n_steps: 0 logs nothing
            return
        self._require_counted(pl_module)
        if isinstance(pl_module, AdaptationModule):
            assert pl_module.batch_losses is not None
            weight, balance = pl_module.batch_losses.weight, pl_module.batch_losses.balance
            self._in_step.append(torch.stack([weight, weight * balance]))
        self._examples += num_examples(batch) * trainer.world_size
        if step == self._last_step:  # gradients are being accumulated
            return
        self._last_step = step
        if self._in_step:
            self._in_interval.append(torch.stack(self._in_step).sum(0))
            self._in_step = []
        log, draw = step % interval == 0, step % (self.heat_map_every_n_steps or 10 * interval) == 0
        if log or draw:
            self._collect(trainer)
        if log:
            self._log(trainer, pl_module)
        if draw and (self.heat_map_every_n_steps or time.monotonic() >= self._no_map_before):
            started = time.monotonic()
            self._show_maps(trainer, self._map, f"steps up to {step}")
            self._map = None
            self._no_map_before = started + 100 * (time.monotonic() - started)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._layers:
            self._collect(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        if not self._layers or self._epoch is None:
            return
        if len(self._epoch.tasks) > 1:
            rank_zero_info(f"\n{task_table(self._epoch, self._layers)}\n")
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = run_directory(trainer)  # asks all processes
        if trainer.is_global_zero:
            directory.mkdir(parents=True, exist_ok=True)
            write_layers(directory / "router_load.csv", self._layers, self._epoch)
            if self._epoch.tasks:
                write_tasks(directory / "task_load.csv", self._layers, self._epoch)
            images = rendered(self._draw(self._epoch, "last epoch"))
            show_images(trainer, images)
            write_images(directory, {MAPS[tag]: image for tag, image in images.items()})
            rank_zero_info(f"Router load written: {directory / 'router_load.csv'}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    # ---------------------------------------------------------------- what

    def _require_counted(self, pl_module: L.LightningModule) -> None:
        assert self._reader is not None
        if not self._reader.has_counted:
            raise UserError(
                "RouterLoad: the routers recorded no tokens in the first batch; run the forward pass of "
                f"{type(pl_module).__name__}.training_step inside `with recording(model): ...`, or call add_balance_loss(model)"
            )

    def _collect(self, trainer: L.Trainer) -> None:
        assert self._reader is not None
        new = LoadSums.collect(trainer, self._reader)
        self._interval = new if self._interval is None else self._interval + new
        self._map = new if self._map is None else self._map + new
        self._epoch = new if self._epoch is None else self._epoch + new

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._interval is not None
        interval, self._interval = self._interval, None
        layers = interval.layers
        self._unjudged = interval if self._unjudged is None else self._unjudged + interval
        metrics = {f"router/{name}": float(value.mean()) for name, value in self._measures(layers).items()}
        if self._in_interval:
            metrics["router/balance_loss"] = self._balance_loss(trainer)
        for expert, (load, gate) in enumerate(zip(layers.load.mean(0), layers.over(0).gate, strict=True)):
            metrics |= {f"router/load/expert_{expert}": float(load), f"router/gate/expert_{expert}": float(gate)}
        for expert, count in enumerate(layers.dead(self.dead_below).sum(0).tolist()):
            metrics[f"router/dead_layers/expert_{expert}"] = float(count)
        if self.detailed:
            for name, value in self._measures(layers).items():
                metrics |= {f"router_layers/{layer}/{name}": float(v) for layer, v in zip(self._layers, value, strict=True)}
        log_now(trainer, metrics)
        if enough_examples(self._examples, self._unjudged.layers, self.dead_below):
            self._warn(self._unjudged.layers, pl_module, trainer.global_step)
            self._unjudged, self._examples = None, 0

    def _balance_loss(self, trainer: L.Trainer) -> float:
        """Return the mean over the steps of the interval; all processes have the same number of steps."""
        sums = trainer.strategy.reduce(torch.stack(self._in_interval), reduce_op="sum")
        assert isinstance(sums, torch.Tensor)
        self._in_interval = []
        weights, weighted = sums.double().cpu().unbind(-1)
        return float(torch.where(weights > 0, weighted / weights, 0.0).mean())

    def _measures(self, layers: RouterStatistics) -> dict[str, torch.Tensor]:
        """Return measures (layers,) by name."""
        return {
            "active_experts": layers.active,
            "load_imbalance": layers.load_imbalance,
            "load_entropy": layers.load_entropy,
            "dead_experts": layers.dead(self.dead_below).double().mean(-1),
            "balance_loss_unscaled": layers.balance_loss,
        }

    def _draw(self, sums: LoadSums, title: str) -> Mapping[str, Any]:
        """Draw figures by tag."""
        layers = sums.layers
        dead = layers.dead(self.dead_below)
        names = ", ".join(f"{expert} ({count} layers)" for expert, count in enumerate(dead.sum(0).tolist()) if count)
        subtitle = f"dead experts, crossed out: {names}" if names else "no dead expert"
        even = float(layers.even_load.mean())
        figures = {"router/load_map": load_map(layers.load, self._layers, even, f"router load, {title}\n{subtitle}", dead)}
        if sums.tasks:
            figures["router/task_load_map"] = task_map(sums, self._layers, even, title)
        return figures

    def _show_maps(self, trainer: L.Trainer, sums: LoadSums | None, title: str) -> None:
        if sums is not None and takes_images(trainer):
            show_images(trainer, rendered(self._draw(sums, title)))

    # ---------------------------------------------------------------- warnings

    def _warn(self, layers: RouterStatistics, module: L.LightningModule, step: int) -> None:
        """Warn once for a layer that collapses, once for an expert that dies."""
        names = self._layers
        balances, dead = layers.balance.tolist(), layers.dead(self.dead_below).tolist()
        collapsed = [(name, None) for name, value in zip(names, balances, strict=True) if value < self.collapse_below]
        new_layers = [layer for layer in collapsed if layer not in self._warned]
        self._warned.update(new_layers)
        all_dead = [(name, e) for name, row in zip(names, dead, strict=True) for e, is_dead in enumerate(row) if is_dead]
        new_dead = [pair for pair in all_dead if pair not in self._warned and (pair[0], None) not in self._warned]
        self._warned.update(new_dead)
        advice = self._advice(module, layers.num_experts)
        if new_layers:
            rank_zero_warn(
                f"RouterLoad, step {step}: routing has collapsed, nearly all tokens go to the same "
                f"{float(layers.active.mean()):.3g} experts, in {shorten((name for name, _ in new_layers), 4)}. {advice}"
            )
        if new_dead:
            rank_zero_warn(
                f"RouterLoad, step {step}: experts died, they serve less than {100 * self.dead_below:g} % of an even load and "
                f"learn next to nothing: {shorten((f'{name} expert {expert}' for name, expert in new_dead), 4)}. {advice}"
            )

    def _advice(self, module: L.LightningModule, num_experts: int) -> str:
        weight = getattr(adapter_config(adapted_model(module, self)), "balance_weight", 0.0)
        if not isinstance(module, AdaptationModule) or module.optimization is None:
            return (
                f"Raise balance_weight (now {weight:g}), lower the router's learning rate, or use fewer experts "
                f"(num_experts, now {num_experts})"
            )
        group = module.optimization.router or module.optimization.experts
        return (
            f"Raise --model.adapter.balance_weight (now {weight:g}), lower --model.optimization.router.lr (now "
            f"{group.lr if group else 0.0:g}), or use fewer experts (--model.adapter.num_experts, now {num_experts})"
        )


def enough_examples(count: int, layers: RouterStatistics, below: float, chance: float = 0.01) -> bool:
    """Return whether `count` examples suffice to call an expert dead whose load is less than `below` times an even load q.

    The tokens of an example are alike, so it counts as one draw, whatever its length. An expert with an even load then serves
    a Binomial(count, q) number of examples, and looks dead with a probability of at most exp(-count KL(below q, q)) (Chernoff;
    for below = 0 this is (1 - q)^count). That any of the experts of all layers does has at most the probability `chance`.
    With 8 experts, 2 of them active, in 24 layers this takes 35 examples.

    Args:
        count: number of examples.
        layers: their statistics (layers,).
        below: see RouterLoad's `dead_below`.
        chance: largest probability of a false alarm.
    """
    even = float(layers.even_load.mean())
    if even >= 1:
        return count > 0
    low = below * even
    divergence = (1 - low) * math.log((1 - low) / (1 - even)) + (low * math.log(below) if low > 0 else 0)
    return layers.counts.numel() * math.exp(-count * divergence) <= chance
