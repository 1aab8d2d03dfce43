"""Every shipped YAML: its first line is its command, every key is explained, and it runs end to end without a network."""

import csv
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support import REPOSITORY
from support.commands import SMOKE

import train
from fourier_moe import FourierMoEConfig, describe_adapter
from lightning_modules.cli import AdaptationCLI

DEFAULTS = Path("configs/defaults.yaml")
ALL = sorted({path.relative_to(REPOSITORY) for path in (REPOSITORY / "configs").rglob("*.yaml")} - {DEFAULTS})
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ADAPTERS = [path for path in ALL if path.parent.name == "adapters"]
MIXTURES = ("molora", "adamole", "hydralora", "goat", "fft_moe")
VARIANTS = ("one_expert", "spectral_router")  # of FourierMoE itself
RECIPES = [path for path in ALL if path.parent.name == "recipes"]
STRATEGIES = [path for path in ALL if path.parent.name == "strategies"]  # test_strategies.py runs them on two processes
RUNS = [path for path in ALL if path.parent.name == "configs" and path.stem != "smoke"]
LANGUAGE = [path for path in RUNS if path.stem.startswith(("commonsense_", "math_", "demo_math"))]
TWINS = {"commonsense_gemma_7b": "commonsense_llama2_7b", "math_qwen2_5_14b": "math_llama3_8b"}
CLASSIFIERS = [path for path in RUNS if path not in LANGUAGE]
USED = [
    path
    for path in CLASSIFIERS
    if path.stem in ("clip_cars", "demo", "glue_cola", "glue_mixture", "glue_mnli", "glue_mrpc", "glue_rte", "image_mixture")
]
FITTED_ALONE = [path for path in CLASSIFIERS if path not in USED]
COMMENTED = [DEFAULTS, *RUNS, *RECIPES, *STRATEGIES, Path("configs/smoke.yaml")]

# The paper's Table 14.
TABLE_14 = {
    #            expert lr, router lr, head lr, batch, warm-up, epochs, alpha
    "cars": (8e-5, 5e-5, 3e-4, 512, 0.03, 280, 192),
    "dtd": (1e-2, 1e-4, 1e-3, 128, 0.03, 100, 32),
    "eurosat": (5e-2, 2e-4, 1e-3, 512, 0.05, 30, 32),
    "gtsrb": (2e-1, 2e-4, 1e-3, 512, 0.05, 50, 256),
    "resisc45": (5e-2, 2e-4, 5e-3, 512, 0.03, 45, 32),
    "sun397": (5e-2, 2e-4, 1e-3, 512, 0.05, 20, 32),
    "svhn": (1.5e-1, 2e-4, 1e-3, 512, 0.05, 20, 192),
}


def ids(paths):
    return [str(path.relative_to("configs").with_suffix("")) for path in paths]


def config_of(path):
    return yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))


def command(path):
    first_line = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith("# python train.py ")
    return shlex.split(first_line)[3:]


@pytest.mark.parametrize("path", ALL, ids=ids(ALL))
def test_first_line_is_a_command_that_names_the_file_itself_and_only_files_that_exist(path):
    subcommand, *words = command(path)
    assert subcommand in ("fit", "compare")
    configs = [following for word, following in pairwise(words) if word == "--config"]
    assert str(path) == configs[-1]
    assert all((REPOSITORY / config).is_file() for config in configs)


def lines_with_values(path):
    lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if re.match(r"\s*(- )?[\w+]+: *[^#\s]", line)]


@pytest.mark.parametrize("path", ALL, ids=ids(ALL))
def test_no_config_repeats_a_line_of_the_defaults(path):
    defaults, lines = ({line.partition(" #")[0] for line in lines_with_values(file)} for file in (DEFAULTS, path))
    another = "    - class_path: lightning.pytorch.callbacks.ModelCheckpoint"  # `newest`, beside that of the defaults
    assert defaults & lines - {another} == set()


@pytest.mark.parametrize("path", COMMENTED, ids=ids(COMMENTED))
def test_every_value_has_a_comment(path):
    values = [line for line in lines_with_values(path) if "class_path:" not in line]
    assert values
    assert [line for line in values if not re.search(r" # \S", line)] == []


@pytest.mark.parametrize("name", TABLE_14)
def test_clip_config_has_the_values_of_table_14(name):
    config = config_of(Path(f"configs/clip_{name}.yaml"))
    optimization, data, adapter = config["model"]["optimization"], config["data"]["init_args"], config["model"]["adapter"]
    values = (
        optimization["experts"]["lr"],
        optimization["router"]["lr"],
        optimization["head"]["lr"],
        data["batch_size"],
        optimization["warmup_ratio"],
        config["trainer"]["max_epochs"],
        adapter["init_args"]["scaling"],
    )
    assert values == TABLE_14[name]
    assert optimization["schedule"] == "cosine"
    assert data["dataset"] == name
    assert config["trainer"]["logger"]["init_args"]["name"] == f"clip_{name}"
    assert adapter["class_path"] == "fourier_moe.FourierMoEConfig"
    common = {
        "targets": ["q_proj", "v_proj"],
        "num_coefficients": 3008,
        "num_experts": 8,
        "top_k": 2,
        "dropout": 0,
        "balance_weight": 1e-3,
    }
    assert {key: adapter["init_args"][key] for key in common} == common


def test_table_14_has_a_config_for_every_benchmark_and_no_other():
    assert {f"clip_{name}" for name in TABLE_14} == {path.stem for path in RUNS if path.stem.startswith("clip_")}


def fitted(run, path, *words):
    """The words of a fit in smoke size, and the directory of its run with all that the config writes."""
    words = ("--config", str(path), *SMOKE, *words)
    cli = run("fit", *words)
    directory = Path(cli.trainer.log_dir)
    assert cli.trainer.global_step == 4
    assert list(directory.glob("events.out.tfevents.*"))
    assert (directory / "checkpoints/last.ckpt").is_file()
    for name in ("adapter", "adapter_last"):
        assert {"adapter.json", "adapter.safetensors", "README.md"} <= {file.name for file in (directory / name).iterdir()}
    return words, directory


@pytest.mark.slow
@pytest.mark.parametrize("path", FITTED_ALONE, ids=ids(FITTED_ALONE))
def test_smoke_overlay_fits(run, path):
    """Configs that differ from one of the next test's in numbers and in the name of the data alone."""
    name = "clip_cars" if path.stem.startswith("clip_") else "glue_mrpc" if path.stem == "glue_qqp" else "glue_rte"
    twin = config_of(Path(f"configs/{name}.yaml"))
    model, other = config_of(path)["model"], twin["model"]
    assert model["task"] == other["task"]
    assert model["adapter"].keys() == other["adapter"].keys()
    fitted(run, path)


@pytest.mark.slow
@pytest.mark.parametrize("path", USED, ids=ids(USED))
def test_smoke_overlay_fits_and_the_adapter_file_alone_tests_and_predicts(run, path):
    labels = ("--data.init_args.predict_split", "validation") if path.stem.startswith("glue_") else ()  # test has none
    words, directory = fitted(run, path, *labels)
    use = (*words, "--model.adapter_path", str(directory / "adapter"))
    accuracy = run("test", *use).trainer.callback_metrics["test/accuracy"]
    predicted = run("predict", *use)
    with open(Path(predicted.trainer.log_dir) / "predictions_partial.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = json.loads((directory / "adapter/adapter.json").read_text(encoding="utf-8"))["class_names"]
    text = ["text"] if path.stem.startswith("glue_") else []
    assert list(rows[0]) == ["id", *text, "label", "prediction", "probability", *(f"p({name})" for name in names)]
    sets = {"glue_mnli": 2, "glue_mixture": 3, "image_mixture": 4}.get(path.stem, 1)
    assert len({row["id"] for row in rows}) == len(rows) == 8 * sets
    for row in rows:
        assert all(row[name] for name in text)
        probabilities = {name: float(row[f"p({name})"]) for name in names}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] in names
        assert row["prediction"] == max(names, key=probabilities.__getitem__)
        assert float(row["probability"]) == probabilities[row["prediction"]]
    assert sum(row["prediction"] == row["label"] for row in rows) / len(rows) == pytest.approx(float(accuracy))


@pytest.mark.slow
@pytest.mark.parametrize("path", LANGUAGE, ids=ids(LANGUAGE))
def test_smoke_overlay_fits_a_language_model_and_the_adapter_file_alone_answers_every_set(run, caplog, path):
    sets = config_of(path)["data"]["init_args"]["test"]
    words = ["--model.task.init_args.evaluation.max_new_tokens", "2", "--trainer.limit_val_batches", "1"]
    words += ["--model.task.init_args.dtype", "float32"]  # bfloat16 is slow on a CPU
    if path.stem != "demo_math":
        words += ["--model.adapter.init_args.num_coefficients", "512"]
    if path.stem in TWINS:  # whose sets its twin answers
        assert config_of(path)["data"] == config_of(Path(f"configs/{TWINS[path.stem]}.yaml"))["data"]
        sets = sets[:1]
        words += ["--data.init_args.test", f"[{sets[0]}]"]
    if path.stem != "commonsense_gemma_7b":  # one config searches with the beams that it names
        words += ["--model.task.init_args.evaluation.num_beams", "1"]
    words = ["--config", str(path), *SMOKE, *words]
    with caplog.at_level("INFO"):
        cli = run("fit", *words)
    directory = Path(cli.trainer.log_dir)
    assert f"chat --adapter {directory}\n" in caplog.text
    assert describe_adapter(directory / "adapter").task["prompt"] == config_of(path)["data"]["init_args"]["prompt"]
    assert len(train.main(["generate", "--adapter", str(directory), "--prompt", "a", "--max_new_tokens", "1"])) == 1
    assert cli.trainer.global_step == (4 if path.stem == "demo_math" else 1)  # the others accumulate 16 batches
    assert (directory / "checkpoints/last.ckpt").is_file()
    tested = run("test", *words, "--model.adapter_path", str(directory / "adapter"))
    results = json.loads((directory / "adapter_test/results.json").read_text(encoding="utf-8"))
    assert list(results["sets"]) == sets
    for name in sets:
        rows = (directory / f"adapter_test/predictions/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len({json.loads(row)["id"] for row in rows}) == len(rows) == (80 if path.stem == "demo_math" else 8)
        assert f"test/{name}/accuracy" in tested.trainer.callback_metrics


def test_language_configs_are_the_four_of_tables_12_and_13():
    names = ["commonsense_gemma_7b", "commonsense_llama2_7b", "math_llama3_8b", "math_qwen2_5_14b"]
    assert [path.stem for path in LANGUAGE if path.stem != "demo_math"] == names
    tables = {
        #                        lr,    alpha, balance, warm-up, batch, length, top-k, epochs
        "commonsense_llama2_7b": (8e-2, 96, 2e-3, 0.03, 16, 256, 4, 1),
        "commonsense_gemma_7b": (1.5e-1, 128, 1e-3, 0.05, 16, 256, 4, 1),
        "math_llama3_8b": (2e-4, 128, 1e-3, 0.05, 8, 1024, 2, 1),
        "math_qwen2_5_14b": (1e-4, 2, 2e-3, 0.05, 8, 1024, 2, 1),
    }
    for name, values in tables.items():
        config = config_of(Path(f"configs/{name}.yaml"))
        optimization, data = config["model"]["optimization"], config["data"]["init_args"]
        adapter = config["model"]["adapter"]["init_args"]
        assert optimization["experts"] == optimization["router"]
        assert values == (
            optimization["experts"]["lr"],
            adapter["scaling"],
            adapter["balance_weight"],
            optimization["warmup_ratio"],
            data["batch_size"],
            data["max_length"],
            adapter["top_k"],
            config["trainer"]["max_epochs"],
        )
        assert config["trainer"]["accumulate_grad_batches"] == 16
        assert optimization["schedule"] == "linear"
        assert (adapter["num_coefficients"], adapter["num_experts"], adapter["dropout"]) == (8192, 8, 0.05)
        placement = {f"{part}_proj" for part in ("q", "k", "v", "up", "down", "gate")}
        assert set(adapter["targets"]) == placement | ({"o_proj"} if name.startswith("math_") else set())


@pytest.mark.parametrize("path", ADAPTERS, ids=ids(ADAPTERS))
def test_adapter_overlay_command_trains_what_it_says_wherever_the_smoke_overlay_stands(run, monkeypatch, path):
    *words, option, last = command(path)
    assert (option, last) == ("--config", str(path))
    cli = run(*words, *SMOKE, option, last)
    assert cli.trainer.global_step == 4
    assert (type(cli.model.adapter) is FourierMoEConfig) == path.stem.startswith(VARIANTS)
    trained = cli.model.report.trained
    assert (trained["experts"] > 0) == path.stem.startswith((*MIXTURES, *VARIANTS))
    assert (trained["router"] > 0) == path.stem.startswith((*MIXTURES, "spectral_router"))
    assert (trained["backbone"] > 0) == path.stem.startswith(("full_fine_tuning", "fft_moe"))
    assert {group["name"] for group in cli.trainer.optimizers[0].param_groups} == {kind for kind in trained if trained[kind]}

    monkeypatch.setattr(AdaptationCLI, "instantiate_classes", lambda self: None)
    orders = ((*SMOKE, option, last), (option, last, *SMOKE))
    one, other = (AdaptationCLI([*words[1:], *order], run=False).config.as_dict() for order in orders)
    assert one.pop("config") != other.pop("config")  # the files in their order
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("image_tower", 4), ("small_encoder", 4), ("causal_model", 1)])
def test_recipe_of_one_expert_trains_no_router(run, name, steps):
    words = [word for word in command(Path(f"configs/recipes/{name}.yaml")) if word not in ("--model.task.model", MINILM)]
    cli = run(*words, *SMOKE)  # without the model: its name does not say the architecture
    assert cli.trainer.global_step == steps
    assert cli.model.report.trained["experts"] > 0
    assert cli.model.report.trained["router"] == 0


def write_custom(directory, kind):
    """Labeled files of train and test, as a user has them: images in folders, sentences as CSV, JSON lines named .json."""
    directory.mkdir()
    for split, count in (("train", 40), ("test", 8)):
        if kind == "images":
            for name in ("cat", "dog"):
                folder = directory / split / name
                folder.mkdir(parents=True)
                for index in range(count // 2):
                    Image.new("RGB", (20, 20), (index, 0, 200 * (name == "dog"))).save(folder / f"{index}.png")
        elif kind == "sentences":
            lines = [f'"Film {index}, a good one",good\nA dull film {index},bad' for index in range(count // 2)]
            (directory / f"{split}.csv").write_text("\n".join(["sentence,label", *lines]), encoding="utf-8")
        else:
            items = [{"instruction": f"Add 1 to {index}.", "output": f"It is {index + 1}"} for index in range(count)]
            (directory / f"{split}.json").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "sentences", "instructions"])
def test_recipe_for_custom_data_trains_tests_and_says_what_comes_next(run, tmp_path, capsys, caplog, kind):
    write_custom(tmp_path / "my data", kind)
    _, *words, placeholder = command(Path(f"configs/recipes/custom_{kind}.yaml"))
    assert placeholder == "DIR"
    words = [word for word in words if word != "--data.directory"]
    words += [*SMOKE, "--data.synthetic", "false", "--data.directory", str(tmp_path / "my data")]
    words += ["--trainer.logger.init_args.name", f"custom_{kind}"]
    if kind == "instructions":
        words += ["--data.validation_size", "8", "--model.task.evaluation.max_new_tokens", "2"]
    with caplog.at_level("INFO"):
        fitted = run("fit", *words)
    assert fitted.model.adapter.scaling == "relative"
    directory = tmp_path / f"custom_{kind}/version_0"
    (next_words,) = {line for line in caplog.text.splitlines() if line.startswith("  python train.py test")}
    test = shlex.split(next_words)[2:]
    assert test == ["test", "--config", str(directory / "config.yaml"), "--model.adapter_path", str(directory / "adapter")]
    assert "test/accuracy" in run(*test).trainer.callback_metrics
    if kind == "sentences":
        predicted = run("predict", *test[1:])
        with open(Path(predicted.trainer.log_dir) / "predictions.csv", newline="", encoding="utf-8") as file:
            assert next(csv.DictReader(file))["text"] == "Film 0, a good one"


def test_smoke_overlay_names_no_setting_of_one_adapter_alone():
    assert "adapter" not in config_of(Path("configs/smoke.yaml"))["model"]


@pytest.mark.slow
def test_demo_command_runs_in_smoke_size(main, tmp_path):
    results = main(*command(Path("configs/demo.yaml")), *SMOKE, "--output", str(tmp_path), "--seeds", "1")
    assert [result.variant for result in results] == ["head_only", "examples/digits_tower/full_fine_tuning.yaml", "config"]
    assert [result.method for result in results] == ["HeadOnly", "FullFineTuning", "FourierMoE"]
    assert {path.name for path in tmp_path.glob("*.*")} == {"results.md", "results.json", "results.csv", "plot.png"}
