"""train.py export: every format is read back by the library that it is for, and what a merge changes is measured."""

import json
import math
import sys
from pathlib import Path

import lightning as L
import open_clip
import peft
import pytest
import torch
from safetensors.torch import load_file
from support import REPOSITORY
from support.language_models import SumsData, language_module, language_trainer, move_experts
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lightning_modules.commands.export
import train
from fourier_moe import StatisticsReader, adapters, load_adapter, recording, save_adapter
from fourier_moe.models.attention import split_attention
from lightning_modules.cli import AdaptationCLI, user_error
from lightning_modules.commands.static_merge import _record, _squares, merge
from lightning_modules.tasks.backbones.open_clip import load_open_clip

DEMO = ("--config", "configs/demo.yaml")
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


def routed_model(run, words=DEMO):
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
    model, _ = routed_model(demo)
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


def test_merged_tower_loads_with_open_clip_alone_and_its_difference_is_what_was_said(demo, export, capsys):
    written = export("merged", *DEMO, *adapter_of(demo), "--force")
    out = capsys.readouterr().out
    facts = json.loads((written / "export.json").read_text())
    model, batches = routed_model(demo)
    clip = open_clip.create_model(f"local-dir:{written}").eval()
    clip.visual.proj = None
    head = load_file(written / "head.safetensors")
    images = torch.cat([batch["image"] for batch in batches])
    labels = torch.cat([batch["label"] for batch in batches])
    with torch.no_grad():
        merged, routed = F.linear(clip.visual(images), **head), model.model.eval()(images)
    logits = {"merged": merged, "routed": routed}
    accuracy = {name: float((values.argmax(-1) == labels).float().mean()) for name, values in logits.items()}
    assert accuracy == pytest.approx({name: facts[name]["accuracy"] for name in accuracy})
    merged, routed = (logits - logits.mean(-1, keepdim=True) for logits in (merged, routed))
    assert float((merged - routed).norm() / routed.norm()) == pytest.approx(facts["logit_difference"], rel=1e-3)
    assert facts["logit_difference"] > 0.01
    assert facts["drop"] == pytest.approx(100 * (accuracy["routed"] - accuracy["merged"]), abs=1e-4)
    assert f"| {facts['logit_difference']:.2e} |" in out
    assert json.loads((written / "head.json").read_text())["class_names"] == [str(digit) for digit in range(10)]
    # By name and file, too: the same weights whichever way; the text tower is the pretrained one.
    again = load_open_clip("examples/digits_tower/digits_vit.json", str(written / "open_clip_model.safetensors"))
    assert all(torch.equal(again.state_dict()[key], value) for key, value in clip.state_dict().items())
    before = load_open_clip(
        "examples/digits_tower/digits_vit.json", "examples/digits_tower/digits_vit.safetensors"
    ).state_dict()
    changed = {key for key, value in again.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"visual.transformer.resblocks.{block}.attn.in_proj_weight" for block in range(4)}


def test_gates_are_the_mean_over_the_validation_set(demo, export):
    facts = json.loads((export("merged", *DEMO, *adapter_of(demo), "--force") / "export.json").read_text())
    model, batches = routed_model(demo)
    name, layer = list(adapters(model.model).items())[3]
    gates = []
    layer.router.register_forward_hook(
        lambda router, _, routing: gates.append(routing.dense(router.num_experts).flatten(0, -2))
    )
    with torch.no_grad(), recording(model.model):
        for batch in batches:
            model.model.eval()(batch["image"])
    assert facts["gates"][name] == pytest.approx(torch.cat(gates).mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (("--max_difference", "0.001", "--max_drop", "100"), r"logits by \d+\.\d% \(--max_difference 0\.1%\); --force"),
        (("--max_difference", "10", "--max_drop", "-100"), r"too much: accuracy by -?\d+\.\d\d points \(--max_drop -100\.0\)"),
    ],
)
def test_merge_beyond_a_limit_is_refused_after_the_table_and_nothing_is_written(
    demo, export, tmp_path, capsys, limits, message
):
    with pytest.raises(ValueError, match=message) as error:
        export("merged", *DEMO, *adapter_of(demo), *limits)
    assert user_error(error.value) is error.value
    assert "relative rms difference of the logits" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_difference_of_logits_leaves_out_what_is_masked_and_never_hides_nan():
    routed = torch.tensor([[1.0, 3.0, -torch.inf], [0.0, 2.0, 4.0]])
    merged = torch.tensor([[2.0, 3.0, -torch.inf], [5.0, 7.0, 9.0]])  # the second row is only shifted
    assert _squares(routed, merged).tolist() == pytest.approx([0.5, 2 + 8])
    for broken in (torch.nan, torch.inf):
        assert _squares(routed, merged.index_fill(1, torch.tensor(1), broken))[0].isnan()


def test_merge_whose_logits_are_nan_is_refused(demo, export, monkeypatch):
    broken = torch.full((), torch.nan)
    monkeypatch.setattr("fourier_moe.spectral.experts.SpectralExperts.mixture", lambda self, _: broken * self.delta_weight(0))
    with pytest.raises(ValueError, match="differs too much: logits by nan%"):
        export("merged", *DEMO, *adapter_of(demo), "--max_drop", "100")


def test_merge_on_test_writes_nothing_else(demo, export, tmp_path):
    words = ("--trainer.logger.init_args.save_dir", str(tmp_path / "runs"))
    words += ("--split", "test", "--trainer.limit_test_batches", "2", "--max_difference", "10", "--max_drop", "100")
    facts = json.loads((export("merged", *DEMO, *adapter_of(demo), *words) / "export.json").read_text())
    assert facts["split"] == "test"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert set(facts["merged"]) >= {"accuracy", "loss"}


@pytest.mark.parametrize("method", ["dora", "head_only"])
def test_methods_without_routing_merge_exactly(tmp_path, export, method):
    words = (*DEMO, "--config", f"configs/adapters/{method}.yaml")
    run = fit(tmp_path / "run", *words, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3")
    facts = json.loads((export("merged", *words, *adapter_of(run), "--max_difference", "1e-4") / "export.json").read_text())
    assert facts["logit_difference"] < 1e-5
    assert facts["gates"] == {}


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("glue"), *GLUE, "--model.optimization.experts.lr", "3.0")


def test_merged_classifier_loads_with_transformers_alone(glue, export):
    written = export("merged", *GLUE, *adapter_of(glue), "--force")
    facts = json.loads((written / "export.json").read_text())
    loaded = AutoModelForSequenceClassification.from_pretrained(written).eval()
    assert loaded.config.id2label == {0: "entailment", 1: "not_entailment"}
    model, batches = routed_model(glue, GLUE)
    squares = torch.zeros(2)
    for batch in batches:
        with torch.no_grad():
            routed = model.task.logits(batch)
            merged = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        routed, merged = (logits - logits.mean(-1, keepdim=True) for logits in (routed, merged))
        squares += torch.stack([(routed - merged).square().sum(), routed.square().sum()])
    assert math.sqrt(squares[0] / squares[1]) == pytest.approx(facts["logit_difference"], rel=1e-3)
    assert facts["logit_difference"] > 1e-3


class TaskSums(SumsData):
    """Small sums are one task, large ones another."""

    def __init__(self):
        super().__init__()
        for name, loader in self.loaders.items():
            for example in loader.dataset:
                example["task"] = name


def merged_sums(directory, task_name):
    module = language_module()
    module.configure_model()
    move_experts(module.model)
    adapter = save_adapter(module.model, directory / "adapter")
    trainer = language_trainer(directory, inference_mode=False)
    report = merge(trainer, module, TaskSums(), split="val", task_name=task_name, ckpt_path=None)
    return module, report, adapter


def test_gates_of_one_task_and_the_metric_of_its_set(tmp_path):
    reports = {name: merged_sums(tmp_path, name)[1] for name in ("small", "large", None)}
    assert [report.main_metric for report in reports.values()] == [
        "small/token_accuracy",
        "large/token_accuracy",
        "token_accuracy",
    ]
    name = "model.layers.0.self_attn.q_proj"
    small, large, both = (torch.tensor(report.gates[name]) for report in reports.values())
    assert not torch.allclose(small, large, atol=1e-4)
    share = (both - large).norm() / (small - large).norm()
    assert 0.05 < share < 0.95
    torch.testing.assert_close(both, share * small + (1 - share) * large, rtol=0, atol=1e-4)


def test_padding_has_no_share_in_the_gates():
    module = language_module()
    module.configure_model()
    ids, gates = torch.randint(3, 300, (1, 6)), []
    for padding in (0, 30):
        masked = {"attention_mask": F.pad(torch.ones_like(ids), (0, padding)), "labels": F.pad(ids, (0, padding), value=-100)}
        with StatisticsReader(module.model.eval()) as reader:
            _record(module.task, {"id": ["a"], "input_ids": F.pad(ids, (0, padding)), **masked})
            gates.append(torch.stack([statistics.mean_gate for statistics in reader.read().values()]))
    torch.testing.assert_close(*gates)


def test_merged_language_model_loads_with_transformers_alone_with_a_weight_that_was_tied(tmp_path):
    module, report, adapter = merged_sums(tmp_path, None)
    module.model.config.tie_word_embeddings = True  # as if an update of the output layer had parted it from the embeddings
    assert 0 < report.logit_difference < 2
    module.task.save_model(tmp_path / "merged", None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not loaded.config.tie_word_embeddings
    ids = torch.randint(3, 300, (2, 9))
    torch.testing.assert_close(loaded(ids).logits, module.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    routed = language_module()
    routed.configure_model()
    load_adapter(routed.model, adapter)
    assert not torch.allclose(loaded(ids).logits, routed.model.eval()(ids).logits, atol=1e-2)


def test_task_that_no_batch_names_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"--task 'tiny' is in no batch; tasks of the data: small, large"):
        merged_sums(tmp_path, "tiny")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"export needs a trained adapter: give --model\.adapter_path DIR"),
        (("--model.adapter_path", "nowhere"), "no adapter in nowhere"),
        (("--ckpt_path", "nowhere/last.ckpt"), r"ckpt_path='nowhere/last\.ckpt' does not exist; checkpoints beside it: none"),
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


@pytest.mark.parametrize(
    ("format_", "words", "message"),
    [
        ("lora", ("--push", "a/b"), "--push takes --format adapter, not lora"),
        ("lora", ("--force",), "--force takes --format merged, not lora"),
        ("adapter", ("--split", "test"), "--split takes --format merged, not adapter"),
        ("adapter", ("--max_drop", "3"), "--max_drop takes --format merged, not adapter"),
    ],
)
def test_option_of_another_format_is_refused(export, capsys, format_, words, message):
    with pytest.raises(SystemExit):
        export(format_, *DEMO, "--model.adapter_path", "nowhere", *words)
    assert message in capsys.readouterr().err


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


def test_quantised_base_is_refused_before_anything_is_measured(tmp_path):
    module = language_module()
    module.configure_model()
    base = next(iter(adapters(module.model).values())).base
    base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn).view(torch.uint8), requires_grad=False)
    module.task.evaluate = lambda batch: pytest.fail("it was measured")
    module._untrained = False
    with pytest.raises(ValueError, match=r"q_proj: .*torch\.uint8.*quantised"):
        merge(language_trainer(tmp_path), module, TaskSums(), split="val", task_name=None, ckpt_path=None)
