"""train.py export: every format is read back by the library that it is for, and a merged model computes the same."""

import json
import sys
from pathlib import Path

import lightning as L
import open_clip
import peft
import pytest
import torch
from safetensors.torch import load_file
from support import REPOSITORY
from support.commands import DEMO
from support.language_models import TinyLanguageModel
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lightning_modules.commands.export
import train
from fourier_moe import LoRAConfig, adapters
from fourier_moe.models.attention import split_attention
from fourier_moe.serving.merge import merge_adapters
from lightning_modules import AdaptationModule
from lightning_modules.cli import AdaptationCLI, user_error
from lightning_modules.tasks.backbones.open_clip import load_open_clip

QUICK = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "12")
GLUE = ("--config", "configs/glue_rte.yaml", "--config", "configs/smoke.yaml")


def fit(directory, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", ["train.py"])
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.logger.init_args.save_dir", str(directory)]
        return Path(train.main(["fit", *words, *quiet]).trainer.log_dir)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The run directory of a short demo."""
    return fit(tmp_path_factory.mktemp("demo"), *DEMO, *QUICK)


@pytest.fixture
def export(main, tmp_path):
    def export(format_, *words):
        return main("export", "--format", format_, "--output", str(tmp_path / format_), *words)

    return export


def adapter_of(run):
    return ("--model.adapter_path", str(run / "adapter"))


def trained_model(run, words=DEMO):
    """The trained model, its task and its validation batches."""
    cli = AdaptationCLI([*words, "--model.adapter_path", str(run / "adapter")], run=False)
    batches = []
    collect = L.pytorch.callbacks.LambdaCallback(on_validation_batch_start=lambda _, __, batch, *___: batches.append(batch))
    cli.trainer.callbacks, cli.trainer.loggers = [collect], []
    cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    return cli.model.eval(), batches


# ---------------------------------------------------------------- adapter


def test_adapter_directory_of_a_checkpoint_is_what_the_run_would_have_written(demo, export, capsys):
    (best,) = [path for path in (demo / "checkpoints").glob("*.ckpt") if path.name != "last.ckpt"]
    written = export("adapter", *DEMO, "--ckpt_path", str(best))
    ours, theirs = (load_file(path / "adapter.safetensors") for path in (written, demo / "adapter"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((path / "adapter.json").read_text()) for path in (written, demo / "adapter"))
    assert ours["class_names"] == theirs["class_names"] == [str(digit) for digit in range(10)]
    assert ours["task"] == theirs["task"]
    assert "MiB" in capsys.readouterr().out


def test_adapter_directory_is_copied_with_its_metrics_and_nothing_else_is_touched(demo, export, tmp_path):
    (tmp_path / "adapter.part").mkdir()
    (tmp_path / "adapter.part" / "notes").write_text("mine")
    written = export("adapter", *DEMO, *adapter_of(demo))
    assert (tmp_path / "adapter.part" / "notes").read_text() == "mine"
    assert json.loads((written / "adapter.json").read_text()) == json.loads((demo / "adapter/adapter.json").read_text())
    assert sorted(path.name for path in written.iterdir()) == ["README.md", "adapter.json", "adapter.safetensors"]


def test_push_sends_what_was_written(demo, export, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(
        lightning_modules.commands.export, "push_adapter", lambda *arguments: pushed.append(arguments) or "hf://a/b@c"
    )
    written = export("adapter", *DEMO, *adapter_of(demo), "--push", "a/b")
    assert pushed == [(written, "a/b")]
    assert "On the hub: hf://a/b@c" in capsys.readouterr().out


def test_a_push_that_failed_is_repeated_by_the_same_command(demo, export, hub):
    hub.fail("POST /api/repos/create", 403)
    words = (*DEMO, *adapter_of(demo), "--push", "owner/name")
    with pytest.raises(ValueError, match=r"may not write to owner \(403\); use a token with write permission"):
        export("adapter", *words)
    written = export("adapter", *words)
    assert hub.models["owner/name"].files["adapter.safetensors"] == (written / "adapter.safetensors").read_bytes()
    (written / "adapter.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="holds another adapter"):
        export("adapter", *words)


# ---------------------------------------------------------------- lora


def test_loras_of_an_open_clip_tower_load_with_peft_after_the_split(demo, export, capsys):
    written = export("lora", *DEMO, *adapter_of(demo))
    out = capsys.readouterr().out
    assert "| q_proj     | 4     | 64 x 64  | 8 " in out
    facts = json.loads((written / "export.json").read_text())
    assert len(facts["projections"]) == 8
    assert max(max(projection["differences"]) for projection in facts["projections"]) < 1e-6
    model, _ = trained_model(demo)
    task = AdaptationCLI([*DEMO], run=False).model.task
    base = task.build(10)
    for name in json.loads((written / "router.json").read_text())["split_attention"]:
        base.set_submodule(name, split_attention(base.get_submodule(name)))
    loaded = peft.PeftModel.from_pretrained(base, str(written / "expert_5")).base_model.model
    torch.testing.assert_close(loaded.head(torch.ones(1, 64)), model.model.head(torch.ones(1, 64)))
    for name, layer in adapters(model.model).items():
        x = torch.randn(3, 64)
        expected = layer.base(x) + x @ layer.experts.delta_weight(5).T
        torch.testing.assert_close(loaded.get_submodule(name)(x), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- merged


def test_merged_tower_loads_with_open_clip_alone_and_computes_the_same(tmp_path, export):
    words = (*DEMO, "--config", "configs/adapters/lora.yaml")
    run = fit(tmp_path / "run", *words, *QUICK)
    written = export("merged", *words, *adapter_of(run))
    model, batches = trained_model(run, words)
    clip = open_clip.create_model(f"local-dir:{written}").eval()
    clip.visual.proj = None
    head = load_file(written / "head.safetensors")
    images = torch.cat([batch["image"] for batch in batches])
    with torch.no_grad():
        torch.testing.assert_close(F.linear(clip.visual(images), **head), model.model(images), rtol=1e-4, atol=1e-4)
    assert json.loads((written / "head.json").read_text())["class_names"] == [str(digit) for digit in range(10)]
    # By name and file, too: the same weights whichever way; the text tower is the pretrained one.
    again = load_open_clip("examples/digits_tower/digits_vit.json", str(written / "open_clip_model.safetensors"))
    assert all(torch.equal(again.state_dict()[key], value) for key, value in clip.state_dict().items())
    before = load_open_clip(
        "examples/digits_tower/digits_vit.json", "examples/digits_tower/digits_vit.safetensors"
    ).state_dict()
    changed = {key for key, value in again.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"visual.transformer.resblocks.{block}.attn.in_proj_weight" for block in range(4)}


def test_a_method_that_routes_is_refused_and_leaves_nothing(demo, export, tmp_path):
    with pytest.raises(ValueError, match=r"q_proj: FourierMoELinear cannot be merged into one weight") as error:
        export("merged", *DEMO, *adapter_of(demo))
    assert user_error(error.value) is error.value
    assert list(tmp_path.iterdir()) == []


def test_merged_classifier_loads_with_transformers_alone(tmp_path, export):
    words = (*GLUE, "--config", "configs/adapters/dora.yaml", "--model.optimization.adapter.lr", "0.1")
    run = fit(tmp_path / "run", *words)
    loaded = AutoModelForSequenceClassification.from_pretrained(export("merged", *words, *adapter_of(run))).eval()
    assert loaded.config.id2label == {0: "entailment", 1: "not_entailment"}
    model, batches = trained_model(run, words)
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, model.task(batch), rtol=1e-4, atol=1e-4)


def test_merged_language_model_loads_with_transformers_alone_with_a_weight_that_was_tied(tmp_path):
    module = AdaptationModule(TinyLanguageModel(), LoRAConfig(targets=["q_proj"], r=4))
    module.configure_model()
    for adapter in adapters(module.model).values():
        nn.init.normal_(adapter.parameter_groups()["adapter"][1], std=0.5)
    ids = torch.randint(3, 300, (2, 9))
    expected = module.model.eval()(ids).logits
    merge_adapters(module.model)
    module.model.config.tie_word_embeddings = True  # as if an update of the output layer had parted it from the embeddings
    module.task.save_model(tmp_path / "merged", None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not loaded.config.tie_word_embeddings
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"export needs a trained adapter: give --model\.adapter_path DIR"),
        (("--model.adapter_path", "nowhere"), "no adapter in nowhere"),
        (
            ("--ckpt_path", "nowhere/last.ckpt"),
            r"ckpt_path='nowhere/last\.ckpt' does not exist; checkpoints in its directory: none",
        ),
    ],
)
def test_missing_source_is_one_line(export, words, message):
    with pytest.raises(Exception, match=message) as error:
        export("adapter", *DEMO, *words)
    assert "\n" not in str(user_error(error.value))


def test_two_sources_are_refused(demo, export):
    with pytest.raises(ValueError, match="give one of them"):
        export("adapter", *DEMO, *adapter_of(demo), "--ckpt_path", str(demo / "checkpoints/last.ckpt"))


def test_unknown_format_lists_the_known_ones(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main("export", *DEMO, "--format", "onnx")
    assert stop.value.code == 2
    assert "adapter, lora, merged" in capsys.readouterr().err.replace("'", "")


def test_options_of_one_format(export):
    with pytest.raises(ValueError, match="--push takes --format adapter, not lora"):
        export("lora", *DEMO, "--model.adapter_path", "nowhere", "--push", "a/b")
    with pytest.raises(ValueError, match="--rank takes --format lora, not merged"):
        export("merged", *DEMO, "--model.adapter_path", "nowhere", "--rank", "8")


def test_loras_of_a_limited_rank_tell_their_error(demo, export, capsys):
    written = export("lora", *DEMO, *adapter_of(demo), "--rank", "2")
    assert json.loads((written / "expert_0/adapter_config.json").read_text())["r"] == 2
    projections = json.loads((written / "export.json").read_text())["projections"]
    errors = [error for projection in projections for error in projection["differences"]]
    assert 0.01 < max(errors) < 1
    assert f"{max(errors):.1e}" in capsys.readouterr().out


def test_name_on_the_hub_and_output_are_checked_before_anything_is_loaded(export, main, tmp_path):
    with pytest.raises(ValueError, match="repo_id='bad' must be owner/name"):
        export("adapter", *DEMO, "--model.adapter_path", "nowhere", "--push", "bad")
    (tmp_path / "file").touch()
    output = str(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match=r"file/x cannot be written to .*choose another directory with --output") as error:
        main("export", "--format", "lora", "--output", output, *DEMO, "--model.adapter_path", "nowhere")
    assert user_error(error.value) is error.value


def test_existing_output_is_kept(demo, export, tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match="exists; give a new directory"):
        export("adapter", *DEMO, *adapter_of(demo))


def test_lora_of_another_method_is_refused_by_name_and_leaves_nothing(tmp_path, export):
    words = (*DEMO, "--config", "configs/adapters/lora.yaml")
    run = fit(tmp_path / "run", *words, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1")
    with pytest.raises(ValueError, match="LoRAConfig has no spectral experts"):
        export("lora", *words, *adapter_of(run))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("lora")]


def test_checkpoint_of_another_adapter_is_refused(demo, export):
    with pytest.raises(ValueError, match="num_coefficients"):
        export("adapter", *DEMO, "--ckpt_path", str(demo / "checkpoints/last.ckpt"), "--model.adapter.num_coefficients", "256")
