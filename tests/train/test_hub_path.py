"""The shipped configs, in few steps and small batches, against a hub on this machine whose network has faults."""

import json
from pathlib import Path

import pytest
from support import hub_repositories

from fourier_moe import describe_adapter
from lightning_modules.cli import user_error

CLIP, CARS, ROBERTA, GLUE = (
    "timm/vit_base_patch32_clip_224.openai",
    "tanganke/stanford_cars",
    "FacebookAI/roberta-large",
    "nyu-mll/glue",
)
ONE_STEP = ("--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1")
SMALL = ("--data.batch_size", "64", "--data.num_workers", "0", "--trainer.limit_train_batches", "1")
COMMANDS = {
    "cars": ("fit", "--config", "configs/clip_cars.yaml", *SMALL),
    "cola": ("fit", "--config", "configs/glue_cola.yaml"),
}


@pytest.fixture
def served(hub, monkeypatch, tmp_path):
    """The four repositories that the two configs name; `ViT-B-32-quickgelu` is the tiny model that is served."""
    hub.models |= {CLIP: hub_repositories.clip(), ROBERTA: hub_repositories.roberta()}
    hub.datasets |= {CARS: hub_repositories.cars(), GLUE: hub_repositories.glue()}
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setitem(__import__("open_clip").factory._MODEL_CONFIGS, "ViT-B-32-quickgelu", hub_repositories.TINY_CLIP)
    yield hub
    for repository in (*hub.models.values(), *hub.datasets.values()):
        repository.gated = False


def adapter(cli):
    return describe_adapter(Path(cli.trainer.log_dir) / "adapter_last")


@pytest.mark.slow
def test_cars_get_over_faults_fetch_what_they_need_and_run_again_without_a_network(served, run, monkeypatch):
    served.fail("GET /api/", 500)
    served.fail("GET /timm/", 500)
    served.fail("GET /timm/", "drop")
    served.fail("test-00000", 503)
    served.fail("GET /datasets/", "drop")
    served.fail("train-00001", "cut")
    cli = run(*COMMANDS["cars"], *ONE_STEP)
    first = adapter(cli)
    assert all(fault.times == 0 for fault in served.faults)
    fetched = dict.fromkeys(served.fetched())
    assert next(iter(fetched)) == "open_clip_model.safetensors"  # the model before the data
    assert set(fetched) == {
        "open_clip_model.safetensors",
        *(f"data/train-0000{part}-of-00002.parquet" for part in range(2)),
        "data/test-00000-of-00001.parquet",
    }
    assert served.looked_up().count(CARS) == 1
    assert first.task["data_revision"] == served.datasets[CARS].commit
    assert first.backbone == "ViT-B-32-quickgelu/openai"

    served.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = run("validate", *COMMANDS["cars"][1:], "--model.adapter_path", str(Path(cli.trainer.log_dir) / "adapter_last"))
    assert served.requests == []
    assert again.datamodule.data_revision == first.task["data_revision"]
    assert float(again.trainer.callback_metrics["val/accuracy"]) == pytest.approx(first.metrics["val/accuracy"])


@pytest.mark.slow
def test_cola_gets_over_faults_fetches_what_it_needs_and_runs_again_on_a_dead_network(served, run, monkeypatch):
    served.fail("GET /api/models", 500)
    served.fail("GET /api/datasets", 500)
    served.fail("GET /FacebookAI/roberta-large/resolve", 500)
    served.fail("model.safetensors", "drop")
    served.fail("GET /datasets/", "drop")
    cli = run(*COMMANDS["cola"], *ONE_STEP)
    first = adapter(cli)
    fetched = served.fetched()
    assert {path for path in fetched if path.endswith(".parquet")} == {
        f"cola/{split}-00000-of-00001.parquet" for split in ("train", "validation")
    }
    assert not {"pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"} & set(fetched)
    assert fetched.index("model.safetensors") < min(fetched.index(path) for path in fetched if path.endswith(".parquet"))
    assert (served.looked_up().count(ROBERTA), served.looked_up().count(GLUE)) == (2, 2)  # one of each was the 500
    assert first.backbone_revision == served.models[ROBERTA].commit
    assert first.task["data_revision"] == served.datasets[GLUE].commit

    served.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}")
    run("test", *COMMANDS["cola"][1:], "--model.adapter_path", str(Path(cli.trainer.log_dir) / "adapter_last"))
    assert served.requests == []
    (results,) = Path(cli.trainer.log_dir).rglob("*/results.json")
    assert "10 of the complete set's 1,043 examples" in json.dumps(json.loads(results.read_text()))


@pytest.mark.parametrize(
    ("command", "name", "fault", "expected"),
    [
        ("cars", CLIP, "gated", r"restricted \(401\); accept its terms at .*then log in with `hf auth login`"),
        ("cars", CLIP, "missing", r"no model '.*', or it is private \(404\); check the name"),
        ("cars", CLIP, 403, r"refuses access to .* \(403\); use a token that may read it"),
        ("cola", ROBERTA, "gated", r"restricted \(401\); accept its terms at .*then log in with `hf auth login`"),
        ("cola", ROBERTA, "missing", r"no model '.*', or it is private \(404\); check the name"),
        ("cola", ROBERTA, 401, r"does not accept the token .* \(401\); log in"),
        ("cars", CARS, "missing", r"no data set '.*', or it is private \(404\); check the name"),
        ("cola", GLUE, "gated", r"restricted \(401\); accept its terms at .*/datasets/nyu-mll/glue, then log in"),
        ("cola", GLUE, 500, r"cannot be loaded .*500 Internal Server Error.*hf download nyu-mll/glue --repo-type dataset"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_what_to_do(served, run, no_training, command, name, fault, expected):
    kinds = served.models if name in served.models else served.datasets
    if fault == "gated":
        kinds[name].gated = True
    elif fault == "missing":
        del kinds[name]
    else:
        served.fail(f"{name}", fault, times=99)
    with pytest.raises((ValueError, RuntimeError), match=expected) as error:
        run(*COMMANDS[command], *ONE_STEP)
    assert user_error(error.value) is error.value
    assert "\n" not in str(error.value)
    assert not any(path.endswith(".parquet") for path in served.fetched())
