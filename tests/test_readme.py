"""README.md and docs/: the Python of README and docs/start/python.md runs, every command parses."""

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from support import REPOSITORY
from support.commands import ParsedError
from torch import nn

import lightning_modules.commands.compare
import lightning_modules.commands.sweep
import lightning_modules.experiments.grid
import lightning_modules.experiments.tuning
import lightning_modules.tasks
import train
from fourier_moe import FourierMoEConfig, adapters, inject, save_adapter
from lightning_modules.cli import AdaptationCLI
from lightning_modules.commands.front_door import FrontDoor
from lightning_modules.experiments.results import Result

COMMAND = re.compile(r"^(?:python|    )? ?train\.py (.+)$", re.MULTILINE)  # in a code block
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FIRST_RUN, PYTHON = ((REPOSITORY / "docs/start" / name).read_text(encoding="utf-8") for name in ("first_run.md", "python.md"))
GUIDES = [path for path in sorted((REPOSITORY / "docs").rglob("*.md")) if path.parent.name != "extend"]
PAGES = [README, *(path.read_text(encoding="utf-8") for path in GUIDES)]
SNIPPETS = re.findall(r"```python\n(.*?)```", README + PYTHON, re.DOTALL)
COMMANDS = sorted({" ".join(words.split()) for page in PAGES for words in COMMAND.findall(page.replace("\\\n", ""))})
PARTS = re.findall(r"`\s*(--[\w.]+\.help\s[\w.]+|--data\.help\s[\w.]+)`", FIRST_RUN)
RUN = "runs/clip_cars/version_0"
ANY_RUN = re.compile(r"runs/\w+/version_0")
DIRECTORY = re.compile(r"DIR|[A-Z]+_DIRECTORY")
DATA = {
    "glue": "datamodules.GlueDataModule",
    "commonsense": "datamodules.CommonsenseDataModule",
    "math": "datamodules.MathReasoningDataModule",
    "demo_math": "datamodules.instructions.arithmetic.ArithmeticDataModule",
    "glue_mixture": "datamodules.GlueMixtureDataModule",
    "image_mixture": "datamodules.ImageMixtureDataModule",
    "custom_instructions": "datamodules.InstructionDataModule",
    "word_problems": "datamodules.InstructionDataModule",  # examples/choosing
}
MIXTURE = """
data:
  init_args:
    tasks:
      cola: {weight: 1.0}
      rte: {weight: 1.0}
      boolq: {dataset: own, directory: boolq, weight: 1.0}
    max_length: 128
"""


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 64, batch_first=True), 1)
            self.classifier = nn.Linear(256, 3)

    def forward(self, x):
        return self.classifier(self.encoder(x))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_python_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = lightning_modules.tasks.ImageClassification

    def tiny(*arguments):
        return task(*arguments, tiny=True)

    monkeypatch.setattr(lightning_modules.tasks, "ImageClassification", tiny)
    names = [f"car {number}" for number in range(196)]
    model = tiny("ViT-B-32-quickgelu", "openai").build(num_classes=196)
    inject(model, FourierMoEConfig(targets=["q_proj", "v_proj"], head=["head"], num_coefficients=3008))
    nn.init.normal_(model.head.weight)
    save_adapter(model, f"{RUN}/adapter", class_names=names)

    assert len(SNIPPETS) == 5
    screen, adapt, loop, use, serve = SNIPPETS
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    space = {"images": images}
    exec(use, space)
    assert space["names"] == names
    assert torch.equal(space["probabilities"], model.eval()(images).softmax(-1))

    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    exec(screen, {"model": Encoder(), "fresh_model": Encoder()})
    space = {"model": Encoder(), "fresh_model": Encoder()}
    exec(adapt, space)
    assert space["layer"].experts.delta_weight(0).shape == (256, 256)
    assert len(adapters(space["fresh_model"])) == 2
    assert torch.equal(space["fresh_model"].eval()(x), space["model"].eval()(x))

    space |= {"plain_model": Encoder(), "x": x}
    exec(serve, space)
    torch.testing.assert_close(space["y"][0], space["model"].eval()(x)[0])
    torch.testing.assert_close(space["y"][1], Encoder().eval()(x)[1])

    mask = torch.ones(2, 5, dtype=torch.bool)
    space |= {"token_mask": mask, "batch": x, "compute_loss": lambda model, batch: model.train()(batch).square().mean()}
    exec(loop, space)
    space["loss"].backward()
    assert all(adapter.router.weight.grad.abs().sum() > 0 for adapter in adapters(space["model"]).values())


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """What the README's first command leaves behind, in smoke size."""
    directory = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", ["train.py"])
        words = ["fit", "--config", "configs/clip_cars.yaml", "--config", "configs/smoke.yaml"]
        words += ["--trainer.logger.init_args.save_dir", str(directory), "--trainer.enable_progress_bar", "false"]
        train.main([*words, "--trainer.limit_train_batches", "1"])
    return directory / "smoke/version_0"


@pytest.fixture
def words_of(run_directory, tmp_path):
    """The words of a command, with files that are there in place of its examples."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            (tmp_path / "images" / split / label / "1.jpg").touch()
    (tmp_path / "mixture.yaml").write_text(MIXTURE, encoding="utf-8")
    placeholders = {"STUDY": "coefficients", "mixture.yaml": str(tmp_path / "mixture.yaml")}

    def words_of(command):
        words = [placeholders.get(word, word) for word in shlex.split(command, comments=True)]
        words = [str(tmp_path / "images") if DIRECTORY.fullmatch(word) else word for word in words]
        return [ANY_RUN.sub(str(run_directory), word) for word in words]

    return words_of


@pytest.fixture
def parse(main, monkeypatch):
    """The configs of the run that a command would make first, up to where data and model are built; exit codes otherwise."""
    parsed = []

    def instantiate_classes(self):
        parsed.append(self.config[self.subcommand] if self.subcommand else self.config)
        raise ParsedError

    def one_run(overlay, seed, args, output, measure):
        if seed == 0 and not parsed:
            with pytest.raises(ParsedError):
                AdaptationCLI([*args, "--seed_everything", str(seed)], run=False)
        metrics = {"test/accuracy": 0.5, "test/matthews": 0.5, "test/loss": 0.5}
        return Result("Method", overlay, seed, "test/accuracy", metrics, {"head": 1}, 1.0)

    monkeypatch.setattr(AdaptationCLI, "instantiate_classes", instantiate_classes)
    monkeypatch.setattr(lightning_modules.experiments.grid, "run_one", one_run)
    # What compare does before the first run needs the models themselves.
    monkeypatch.setattr(lightning_modules.commands.compare, "parse_grid", lambda grid, metric: grid)
    monkeypatch.setattr(lightning_modules.commands.compare, "unfair_differences", lambda cells: [])
    monkeypatch.setattr(
        lightning_modules.commands.compare, "_sizes", lambda cells, budget: ({name: [] for name in cells}, "", [])
    )
    monkeypatch.setattr(lightning_modules.commands.compare, "own_rates", lambda cells: {name: {} for name in cells})
    monkeypatch.setattr(lightning_modules.experiments.tuning, "run_one", one_run)
    monkeypatch.setattr(lightning_modules.commands.sweep, "parse_grid", lambda grid, metric: {})

    def parse(*words):
        try:
            train.main(list(words))
        except (ParsedError, SystemExit) as stop:
            parsed.extend([stop.code] if isinstance(stop, SystemExit) else [])
        return parsed

    return parse


def test_there_are_commands_for_all_that_train_py_does():
    subcommands = {command.split()[0] for command in COMMANDS}
    assert subcommands == {"fit", "test", "predict", "compare", "analyze", "sweep", "export", "generate", "chat", "evaluate"}
    assert len(COMMANDS) >= 30
    assert len(PARTS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(parse, words_of, tmp_path, monkeypatch, command):
    words = words_of(command)
    if words[-1] == "--help":
        assert parse(*words) == [0]
        return
    if words[0] in ("generate", "chat", "evaluate"):
        monkeypatch.setattr(FrontDoor, "_run_subcommand", Mock(side_effect=ParsedError))
        with pytest.raises(ParsedError):
            train.main(words)
        return
    if words[0] == "compare":  # its overlays are parsed in test_configs.py: two of them with one seed are enough here
        place = words.index("--adapters") + 1
        names = words[place].split(",")
        for name in names:
            overlays = [REPOSITORY / name, *(REPOSITORY / "configs" / folder / f"{name}.yaml" for folder in ("adapters", ""))]
            assert name in ("config", "fourier_moe") or any(overlay.is_file() for overlay in overlays), name
        words[place] = ",".join(dict.fromkeys([names[0], names[-1]]))
        words += ["--seeds", "1"]
    output = ["--output", str(tmp_path / "output")] if words[0] in ("compare", "sweep", "analyze", "export") else []
    (config,) = parse(*words, *output)
    stem, *_, last = [Path(following).stem for word, following in pairwise([*words, ""]) if word == "--config"] * 2
    expected = DATA.get(last) or DATA.get(stem) or DATA.get(stem.partition("_")[0], "datamodules.ImageDataModule")
    assert config.data.class_path == (words[words.index("--data") + 1] if "--data" in words else expected)


@pytest.mark.parametrize("part", PARTS)
def test_help_of_a_part_names_its_arguments(parse, capsys, part):
    assert parse("fit", *part.split()) == [0]
    expected = {"model.adapter": "--model.adapter.bandwidth", "model.task": "--model.task.templates", "data": "--data.seed"}
    shown = capsys.readouterr().out.replace("init_args.", "")
    assert expected[part.split()[0].removeprefix("--").removesuffix(".help")] in shown


def test_misspelt_command_does_not_parse(parse):
    assert parse("fit", "--config", "configs/clip_cars.yaml", "--data.directry", "x") == [2]


def test_resume_command_goes_on_in_the_same_directory(main, run_directory, words_of):
    (command,) = [command for command in COMMANDS if f"--ckpt_path {RUN}" in command]
    words = words_of(command)
    resumed = main(*words, "--trainer.max_epochs", "2")
    assert Path(resumed.trainer.log_dir) == run_directory
    assert (resumed.trainer.current_epoch, resumed.trainer.global_step) == (2, 2)
