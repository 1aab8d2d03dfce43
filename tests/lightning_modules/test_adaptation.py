"""AdaptationModule: losses, masks, metrics, modes, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import REPOSITORY
from support.limits import HANGS_AFTER
from support.processes import run_in_two
from support.token_task import ADAPTER, RATES, TokenData, TokenTask, token_batch, token_module, token_trainer
from torch.utils.data import DataLoader

from datamodules import ImageDataModule
from fourier_moe import FullFineTuning, HeadOnly, LoRAConfig, adapter_state_dict, adapters, describe_adapter, save_adapter
from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup

HEAD_RATE = Optimization(head=ParameterGroup(0.01))


def built(**options):
    module = token_module(**options)
    module.configure_model()
    return module.train()


def balance_by_definition(router, x_TN):
    """Switch-style loss of one router (paper Eq. 13-14) over tokens, from scratch."""
    probabilities_TE = (x_TN @ router.weight.T).softmax(-1)
    num_experts = len(router.weight)
    chosen = [sorted(range(num_experts), key=row.__getitem__)[-router.top_k :] for row in probabilities_TE.tolist()]
    shares = [sum(expert in row for row in chosen) / len(chosen) for expert in range(num_experts)]
    return num_experts * sum(share * float(p) for share, p in zip(shares, probabilities_TE.mean(0), strict=True))


# ---------------------------------------------------------------- the training loss


@torch.no_grad()
def test_training_loss_is_the_tasks_plus_the_weighted_balance_loss_over_real_tokens():
    module, batch = built(), token_batch()
    inputs = {}
    for name, adapter in adapters(module.model).items():
        adapter.router.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    loss = module.training_step(batch, 0)
    task_loss = module.task.loss(batch)

    assert set(inputs) == {"q_proj", "v_proj"}
    assert not batch["mask"].all()
    balance = sum(balance_by_definition(adapters(module.model)[name].router, x[batch["mask"]]) for name, x in inputs.items())
    assert float(loss - task_loss) == pytest.approx(ADAPTER.balance_weight * balance, rel=1e-5)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_change_the_balance_loss():
    module, batch = built(), token_batch()
    other = {**batch, "tokens": torch.where(batch["mask"], batch["tokens"], 7)}
    unmasked = {**batch, "mask": torch.ones_like(batch["mask"])}
    assert not torch.equal(batch["tokens"], other["tokens"])

    def balance(batch):
        return float(module.training_step(batch, 0) - module.task.loss(batch))

    assert balance(batch) == pytest.approx(balance(other), rel=1e-6)
    assert balance(batch) != pytest.approx(balance(unmasked), rel=1e-3)


def test_balance_loss_reaches_the_routers_and_nothing_is_recorded_after_the_step():
    module = built()
    module.training_step(token_batch(), 0).backward()  # coefficients are zero: nothing else reaches a router yet
    for adapter in adapters(module.model).values():
        assert adapter.router.weight.grad.abs().sum() > 0
        with pytest.raises(RuntimeError, match="saw no tokens"):
            adapter.balance_loss()


def test_method_without_routing_trains_on_the_tasks_loss_alone():
    module, batch = built(adapter=HeadOnly(), optimization=HEAD_RATE), token_batch()
    assert torch.equal(module.training_step(batch, 0), module.task.loss(batch))


# ---------------------------------------------------------------- fit


def fit(directory, *callbacks, max_epochs=2, **options):
    module = token_module(**options)
    trainer = token_trainer(directory, *callbacks, max_epochs=max_epochs)
    trainer.fit(module, TokenData())
    return module, trainer


@pytest.mark.parametrize(
    ("adapter", "optimization", "changes"),
    [
        (ADAPTER, RATES, False),
        (HeadOnly(), HEAD_RATE, False),
        (FullFineTuning(), Optimization(head=ParameterGroup(0.01), backbone=ParameterGroup(0.01)), True),
    ],
    ids=["FourierMoE", "HeadOnly", "FullFineTuning"],
)
def test_batch_norm_of_a_frozen_backbone_keeps_its_statistics(tmp_path, adapter, optimization, changes):
    module, _ = fit(tmp_path, adapter=adapter, optimization=optimization)
    norm = module.model.norm
    assert (norm.num_batches_tracked.item() > 0) == changes
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean)) != changes
    assert torch.equal(norm.running_var, torch.ones_like(norm.running_var)) != changes


def test_losses_and_metrics_are_logged_under_their_split(tmp_path):
    module, trainer = fit(tmp_path)
    train_and_val = {"loss", "train/loss", "train/balance_loss", "train/total_loss", "val/loss", "val/accuracy"}
    assert set(trainer.callback_metrics) == train_and_val
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["train/total_loss"] == pytest.approx(metrics["train/loss"] + metrics["train/balance_loss"], rel=1e-6)
    assert metrics["train/balance_loss"] >= ADAPTER.balance_weight * 2  # two routers, each K = 2 / E * E at the least
    assert set(trainer.test(module, TokenData(), verbose=False)[0]) == {"test/loss", "test/accuracy"}


def test_validation_accuracy_is_that_of_the_last_epoch_alone(tmp_path):
    module, trainer = fit(tmp_path, max_epochs=3)
    module.eval()
    batch = token_batch(seed=3)
    with torch.no_grad():
        right = (module.task.logits(batch).argmax(-1) == batch["label"]).float().mean()
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(float(right))


LORA = LoRAConfig(targets=["q_proj"], r=2)
LORA_RATES = Optimization(adapter=ParameterGroup(0.01), head=ParameterGroup(0.01))


@pytest.mark.parametrize(("adapter", "optimization"), [(HeadOnly(), HEAD_RATE), (LORA, LORA_RATES)], ids=["HeadOnly", "LoRA"])
def test_method_without_routing_logs_no_balance_loss(tmp_path, adapter, optimization):
    _, trainer = fit(tmp_path, adapter=adapter, optimization=optimization)
    assert set(trainer.callback_metrics) == {"loss", "train/loss", "val/loss", "val/accuracy"}


def test_endless_data_without_max_steps_is_an_error_that_names_the_setting(tmp_path):
    trainer = token_trainer(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        trainer.fit(token_module(), TokenData())


class UnevenData(TokenData):
    """Batches of 8, 8 and 3 examples."""

    def test_dataloader(self):
        return DataLoader([token_batch(size, seed) for size, seed in ((8, 4), (8, 5), (3, 6))], batch_size=None)

    val_dataloader = test_dataloader


@pytest.mark.parametrize("split", ["test", "val"])
def test_mean_loss_counts_every_example_once_with_an_uneven_last_batch(tmp_path, split):
    module, trainer = fit(tmp_path)
    metrics = (trainer.test if split == "test" else trainer.validate)(module, UnevenData(), verbose=False)[0]
    module.eval()
    losses, right = [], []
    with torch.no_grad():
        for batch in UnevenData().test_dataloader():
            logits = module.task.logits(batch)
            losses.append(torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none"))
            right.append((logits.argmax(-1) == batch["label"]).float())
    assert metrics[f"{split}/loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-6)
    assert metrics[f"{split}/loss"] != pytest.approx(float(torch.stack([loss.mean() for loss in losses]).mean()), rel=1e-3)
    assert metrics[f"{split}/accuracy"] == pytest.approx(float(torch.cat(right).mean()))


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_head_that_nobody_trained_is_refused_and_a_trained_one_is_not(tmp_path, command):
    module, trainer = token_module(), token_trainer(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{command} needs a trained adapter: give --model.adapter_path DIR .* or --ckpt_path"
    ):
        getattr(trainer, command)(module, TokenData())
    trainer.fit(module, TokenData())  # the very same module
    getattr(token_trainer(tmp_path), command)(module, TokenData())

    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    getattr(token_trainer(tmp_path), command)(token_module(), TokenData(), ckpt_path=tmp_path / "trained.ckpt")
    save_adapter(module.model, tmp_path / "adapter")
    getattr(token_trainer(tmp_path), command)(token_module(adapter_path=str(tmp_path / "adapter")), TokenData())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c, key: c["state_dict"][f"{key}.experts.frequencies"].fill_(10**6), r"\|u\| = 1000000, and at most"),
        (lambda c, key: c["state_dict"][f"{key}.experts.coefficients"].fill_(torch.nan), "holds NaN or infinity"),
        (
            lambda c, key: c["state_dict"].update({f"{key}.router.weight": torch.zeros(1, dtype=torch.complex64)}),
            "router.weight is torch.complex64",
        ),
        (lambda c, key: c["adaptation"]["adapter"].update(num_experts=10**400), "num_experts=1.* is no int"),
        (lambda c, key: c["adaptation"]["adapter"].update(targets=["x{99999999999}"]), "no valid regular expression"),
        (lambda c, key: c["adaptation"].update(adapter=3), "3 where dict was expected"),
        (lambda c, key: c["adaptation"].update(class_names=[1]), "1 where str was expected"),
        (lambda c, key: c["adaptation"].update(backbone_fingerprint={"a": "b"}), "'b' where float or int was expected"),
        (lambda c, key: c["adaptation"].pop("backbone"), "'backbone' is missing"),
        (lambda c, key: c.update(adaptation=[]), "was not written by AdaptationModule"),
    ],
)
def test_checkpoint_that_somebody_spoiled_is_refused_in_one_line(spoil, message):
    module = built()
    checkpoint = {"state_dict": {key: value.clone() for key, value in module.state_dict().items()}}
    module.trainer = token_trainer(".")
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    spoil(checkpoint, f"task.model.{next(iter(adapters(module.model)))}")
    with pytest.raises(ValueError, match=message) as error:
        module.on_load_checkpoint(checkpoint)
    assert len(str(error.value)) < 500


def test_head_of_the_adapter_is_the_tasks_to_say(tmp_path):
    with pytest.raises(ValueError, match=r"adapter.head=\['norm'\] is set by the task"):
        fit(tmp_path, adapter=HeadOnly(head=["norm"]), optimization=HEAD_RATE)


def test_task_without_a_main_metric_is_refused_and_an_unknown_one_is_named(monkeypatch):
    monkeypatch.setattr(TokenTask, "main_metric", "f1")
    with pytest.warns(UserWarning, match=r"TokenTask\.main_metric='f1' is none of the task's metrics: accuracy, loss"):
        token_module().configure_model()
    monkeypatch.delattr(TokenTask, "main_metric")
    with pytest.raises(ValueError, match=r"TokenTask\.main_metric is missing; set it to one of .*: accuracy, loss"):
        token_module().configure_model()


def test_model_is_built_once_per_module(tmp_path):
    module, _ = fit(tmp_path)
    model = module.model
    token_trainer(tmp_path).test(module, TokenData(), verbose=False)
    assert module.model is model


def test_validate_without_a_validation_set_is_an_error_and_not_silence(run):
    config = ["--config", "configs/commonsense_llama2_7b.yaml", "--config", "configs/smoke.yaml"]
    with pytest.raises(ValueError, match="nothing was validated: the data has no validation set"):
        run("validate", *config, "--data.validation_size", "0")


# ---------------------------------------------------------------- several processes

TWO_DEVICES = ("--trainer.devices", "2", "--trainer.strategy", "ddp")

# The 90 validation images as one batch, without augmentation: two processes with half of them each see what one process sees,
# in whatever order.
SCRIPT = """
import torch
from torch.utils.data import DataLoader
import train
from datamodules import ImageDataModule
from lightning_modules.callbacks import RouterLoad, SpectralOccupancy

torch.set_num_threads(1)
RouterLoad._draw = SpectralOccupancy._figures = lambda *_: {}
ImageDataModule.train_dataloader = lambda self: DataLoader(self.val_dataloader().dataset, batch_size=45)
train.main()
"""


def start_two(directory, *words):
    """Run SCRIPT, whose second process Lightning starts; the other tests fork theirs."""
    (directory / "script.py").write_text(SCRIPT)
    words = [
        *words,
        *TWO_DEVICES,
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.logger.init_args.save_dir",
        str(directory),
    ]
    done = subprocess.run(
        [sys.executable, str(directory / "script.py"), *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in done.stderr


@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_process_trains_and_write_it_once(run, tmp_path, monkeypatch):
    # The balance loss is off: that of a batch is not the mean of its halves'.
    words = ["fit", "--config", "configs/demo.yaml", "--trainer.max_epochs", "4", "--model.optimization.warmup_ratio", "0"]
    words += ["--model.adapter.init_args.balance_weight", "0", "--trainer.logger.init_args.name"]
    start_two(tmp_path, *words, "two")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["version_0"]

    def one_batch(self):
        return DataLoader(self.val_dataloader().dataset, batch_size=90)

    monkeypatch.setattr(ImageDataModule, "train_dataloader", one_batch)
    start = {}

    def remember(module):
        start.update({key: value.clone() for key, value in module.model.state_dict().items()})

    monkeypatch.setattr(AdaptationModule, "on_train_start", remember)
    one = run(*words, "one")
    expected = adapter_state_dict(one.model.model)
    ours = load_file(tmp_path / "two/version_0/adapter_last/adapter.safetensors")
    assert ours.keys() == expected.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], expected[key], rtol=0.01, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
        if "frequencies" not in key:
            assert (ours[key] - start[key]).abs().max() > 1e-3
    metrics = describe_adapter(tmp_path / "two/version_0/adapter_last").metrics
    for name in ("val/accuracy", "val/loss"):
        assert metrics[name] == pytest.approx(float(one.trainer.callback_metrics[name]), rel=1e-3)


def scores_of_test_and_predict(run, *words):
    metrics = run("test", *words).trainer.callback_metrics
    run("predict", *words)
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
def test_two_processes_test_and_predict_nine_examples_like_one(run, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in {"train": 4, "val": 1, "test": 3}.items():  # three classes: nine test images
        for label in ("a", "b", "c"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(tmp_path / f"images/{split}/{label}/{number}.png")
    words = ["--config", "configs/demo.yaml", "--data.dataset", "folder", "--data.directory", str(tmp_path / "images")]
    words += ["--data.init_args.batch_size", "4"]  # 5 examples in 2 batches for one process, 4 in 1 for the other
    fitted = run("fit", *words, "--trainer.max_epochs", "1")
    words += ["--model.adapter_path", str(Path(fitted.trainer.log_dir) / "adapter_last")]
    words += ["--trainer.logger.init_args.name"]
    expected = run("test", *words, "one").trainer.callback_metrics
    one = Path(run("predict", *words, "one").trainer.log_dir) / "predictions.csv"

    metrics, _ = run_in_two(scores_of_test_and_predict, run, *words, "two", *TWO_DEVICES)
    assert metrics.keys() == expected.keys() == {"test/loss", "test/accuracy", "test/balanced_accuracy"}
    for name, value in metrics.items():
        assert value == pytest.approx(float(expected[name]), rel=1e-6), name
    (two,) = (tmp_path / "two").rglob("*.csv")
    header, *rows = [line.split(",") for line in two.read_text().splitlines()]
    own_header, *own_rows = [line.split(",") for line in one.read_text().splitlines()]
    assert header == own_header == ["id", "label", "prediction", "probability", "p(a)", "p(b)", "p(c)"]
    assert [row[0] for row in rows] == [f"test/{label}/{number}.png" for label in "abc" for number in range(3)]
    assert [row[:3] for row in rows] == [row[:3] for row in own_rows]
    for row, own in zip(rows, own_rows, strict=True):
        assert [float(p) for p in row[3:]] == pytest.approx([float(p) for p in own[3:]], rel=1e-4)


def evaluate(run, *words):
    run("test", *words)


@pytest.mark.slow
def test_two_processes_answer_nine_questions_and_five_more_like_one(run, tmp_path):
    for name, count in {"sums": 9, "more": 5}.items():
        numbers = range(1, count + 1)
        records = [{"instruction": f"{n} + 2?", "input": "", "output": f"It is {n + 2}", "answer": str(n + 2)} for n in numbers]
        (tmp_path / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    words = ["--config", "configs/demo_math.yaml", "--data.test", f"[{tmp_path}/sums.json, {tmp_path}/more.json]"]
    words += ["--data.init_args.eval_batch_size", "4", "--trainer.logger.init_args.name"]
    one = Path(run("test", *words, "one").trainer.log_dir) / "test"
    run_in_two(evaluate, run, *words, "two", *TWO_DEVICES)
    (two,) = (tmp_path / "two").rglob("test")
    expected, results = (json.loads((path / "results.json").read_text(encoding="utf-8"))["sets"] for path in (one, two))
    assert {name: result["count"] for name, result in results.items()} == {"sums": 9, "more": 5}
    for name in expected:
        own, other = (
            [json.loads(row) for row in (path / f"predictions/{name}.jsonl").read_text(encoding="utf-8").splitlines()]
            for path in (one, two)
        )
        assert [row["id"] for row in other] == [row["id"] for row in own]
        assert [row["output"] for row in other] == [row["output"] for row in own]
        assert results[name]["accuracy"] == expected[name]["accuracy"]
        assert results[name]["loss"] == pytest.approx(expected[name]["loss"], rel=1e-4)
