"""The commands of train.py, in this process, on the demo: what is trained and what is written."""

import copy

import pytest
import torch
import yaml
from PIL import Image
from support import REPOSITORY
from support.commands import DEMO, FULL, HEAD_ONLY, SMOKE, run_directory
from torch import nn

import lightning_modules.adaptation
from fourier_moe import FourierMoEConfig, HeadOnly, adapter_state_dict, adapters, describe_adapter
from fourier_moe.adapter import build_layer
from lightning_modules import AdaptationModule
from lightning_modules.cli import AdaptationCLI

EXPERTS_LR = "--model.optimization.experts.lr"


@pytest.fixture
def snapshots(monkeypatch):
    """State dicts of the modules that are built in this test, as configure_model left them."""
    states = []
    configure_model = AdaptationModule.configure_model

    def wrapped(self):
        first = self.task.model is None
        configure_model(self)
        if first:
            states.append({key: value.clone() for key, value in self.state_dict().items()})

    monkeypatch.setattr(AdaptationModule, "configure_model", wrapped)
    return states


@pytest.mark.parametrize(
    ("overlay", "kinds"),
    [
        ((), {"experts.coefficients", "router.weight", "head.weight", "head.bias"}),
        (("--trainer.precision", "bf16-mixed"), {"experts.coefficients", "router.weight", "head.weight", "head.bias"}),
        (HEAD_ONLY, {"head.weight", "head.bias"}),
    ],
    ids=["FourierMoE", "FourierMoE-bf16", "HeadOnly"],
)
def test_training_changes_what_the_method_trains_and_no_other_tensor_by_a_bit(run, snapshots, overlay, kinds):
    cli = run("fit", *DEMO, *overlay, "--trainer.max_steps", "3")
    before, after = snapshots[0], cli.model.state_dict()
    assert cli.trainer.global_step == 3
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.endswith(tuple(kinds))}
    assert changed == {name for name, parameter in cli.model.named_parameters() if parameter.requires_grad}
    assert all(after[key].dtype == torch.float32 for key in changed)
    assert sum(after[key].numel() for key in changed) == cli.model.report.total


def test_full_fine_tuning_changes_every_tensor(run, snapshots):
    cli = run("fit", *DEMO, *FULL, "--trainer.max_steps", "3")
    before, after = snapshots[0], cli.model.state_dict()
    assert {key for key in before if torch.equal(before[key], after[key])} == set()
    assert cli.model.report.frozen == 0


def test_zero_initialized_adapter_gives_the_outputs_of_the_model_before_injection(run, monkeypatch):
    originals = []
    inject = lightning_modules.adaptation.inject

    def remember(model, config):
        originals.append(copy.deepcopy(model))
        return inject(model, config)

    monkeypatch.setattr(lightning_modules.adaptation, "inject", remember)
    cli = AdaptationCLI([*DEMO], run=False)
    cli.datamodule.setup("fit")
    cli.model.configure_model()
    assert len(adapters(cli.model.model)) == 8
    (original,), adapted = originals, cli.model.model.eval()
    original.eval()
    for batch in cli.datamodule.val_dataloader():
        images = cli.datamodule.normalize(batch["image"])
        with torch.no_grad():
            torch.testing.assert_close(adapted(images), original(images), rtol=0, atol=1e-5)


def test_same_seed_gives_the_same_images_in_the_same_order_whatever_the_adapter(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        AdaptationModule, "on_train_batch_start", lambda self, batch, index: seen[-1].append((batch["id"], batch["image"]))
    )

    def images(*words):
        seen.append([])
        run("fit", *DEMO, "--trainer.max_steps", "3", *words)
        return [id_ for ids, _ in seen[-1] for id_ in ids], torch.cat([image for _, image in seen[-1]])

    own_ids, own_images = images()
    for overlay in (HEAD_ONLY, FULL):
        ids, pixels = images(*overlay)
        assert ids == own_ids
        assert torch.equal(pixels, own_images)
    other_ids, _ = images("--seed_everything", "1")
    assert len(other_ids) == len(own_ids) == 96
    assert other_ids != own_ids


def test_adapter_file_keeps_class_names_and_metrics(trained):
    description = describe_adapter(run_directory(trained) / "adapter")
    metrics = trained.trainer.callback_metrics
    assert description.class_names == [str(digit) for digit in range(10)]
    assert description.metrics["val/accuracy"] == float(metrics["val/accuracy"])
    assert {key.partition("/")[0] for key in description.metrics} == {"train", "val"}
    assert description.backbone == "digits_vit/digits_vit.safetensors"


def test_fit_goes_on_from_an_adapter_file(run, trained, snapshots):
    cli = run("fit", *DEMO, "--model.adapter_path", str(run_directory(trained) / "adapter_last"), "--trainer.max_steps", "1")
    expected = adapter_state_dict(trained.model.model)
    assert all(torch.equal(snapshots[0][f"task.model.{key}"], value) for key, value in expected.items())
    assert cli.trainer.global_step == 1


def test_data_with_other_class_names_than_the_adapters_is_refused(run, trained):
    words = ("--data.init_args.synthetic", "true", "--model.adapter_path", str(run_directory(trained) / "adapter"))
    with pytest.raises(
        ValueError, match=r"trained on 10 classes \(0, 1, 2 and 7 more\), the data has 4 \(blue, green, red and 1 more\)"
    ):
        run("test", *DEMO, *words)


def test_predict_names_the_adapters_classes_where_the_source_is_known_for_more(run, tmp_path):
    """An adapter of 4 classes predicts a directory of images for a row of the table of sources that has 196."""
    words = ("--config", "configs/clip_cars.yaml", *SMOKE)
    fitted = run("fit", *words, "--trainer.limit_train_batches", "1")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), (40, 70, 200)).save(tmp_path / "images/car.png")
    data = ("--data.init_args.synthetic", "false", "--data.init_args.predict_directory", str(tmp_path / "images"))
    predicted = run("predict", *words, *data, "--model.adapter_path", str(run_directory(fitted) / "adapter"))
    header, row = (run_directory(predicted) / "predictions.csv").read_text().splitlines()
    assert header == "id,label,prediction,probability,p(blue),p(green),p(red),p(yellow)"
    assert predicted.trainer.predict_loop.predictions == [], "rows are on disk, not in memory"
    assert row.startswith("car.png,,")


def test_saved_config_holds_command_line_values_and_runs_again(run, tmp_path):
    fitted = run("fit", *DEMO, *SMOKE, EXPERTS_LR, "0.123", "--seed_everything", "5")
    path = run_directory(fitted) / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    assert saved["model"]["optimization"]["experts"]["lr"] == 0.123
    assert saved["seed_everything"] == 5
    assert saved["trainer"]["limit_train_batches"] == 4
    again = run("fit", "--config", str(path))
    assert again.trainer.log_dir != fitted.trainer.log_dir
    ours, theirs = adapter_state_dict(again.model.model), adapter_state_dict(fitted.model.model)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


ADAPTER_SEED = "--model.adapter.init_args.seed"


@pytest.mark.parametrize(
    ("words", "seed"),
    [
        ((), 0),
        (("--seed_everything", "5"), 5),
        (("--seed_everything", "5", ADAPTER_SEED, "3"), 3),
        ((ADAPTER_SEED, "0", "--seed_everything", "5"), 0),
        (("--seed_everything", "false"), None),
        (("--seed_everything", "false", ADAPTER_SEED, "3"), 3),
    ],
    ids=str,
)
def test_seed_of_the_run_is_the_seed_of_the_adapter_unless_it_has_its_own(main, words, seed):
    cli = AdaptationCLI([*DEMO, *words], run=False)
    assert cli.model.adapter.seed == seed
    cli.model.configure_model()
    layer = adapters(cli.model.model)["backbone.transformer.resblocks.0.attn.q_proj"]
    expected = draw(seed or 0)
    assert torch.equal(layer.experts.frequencies, expected)
    assert not torch.equal(layer.experts.frequencies, draw(seed=77))


def draw(seed):
    settings = FourierMoEConfig(targets=["q_proj"], num_coefficients=512, seed=seed)
    return build_layer(nn.Linear(64, 64), settings, "backbone.transformer.resblocks.0.attn.q_proj").experts.frequencies


def test_seed_everything_true_seeds_the_adapter_with_the_seed_that_lightning_chose(main, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    cli = AdaptationCLI([*DEMO, "--seed_everything", "true"], run=False)
    assert type(cli.model.adapter.seed) is int
    assert cli.model.adapter.seed == cli.config.seed_everything == torch.initial_seed()


def test_methods_without_a_seed_need_none(main):
    cli = AdaptationCLI([*DEMO, *HEAD_ONLY, "--seed_everything", "5"], run=False)
    assert cli.model.adapter == HeadOnly()


def test_head_in_the_config_is_refused(run, no_training):
    with pytest.raises(ValueError, match=r"adapter\.head=\['backbone\.ln_post'\] is set by the task; remove it"):
        run("fit", *DEMO, "--model.adapter.init_args.head", "[backbone.ln_post]")


def test_fast_dev_run_writes_no_adapter(run, tmp_path, monkeypatch):
    run("fit", *DEMO, "--trainer.fast_dev_run", "true", "--trainer.default_root_dir", str(tmp_path / "root"))
    assert list(tmp_path.rglob("adapter*")) == []
    assert not (REPOSITORY / "adapter_last").exists()
