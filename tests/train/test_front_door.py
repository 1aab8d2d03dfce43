"""Every command is a subcommand of one LightningCLI: listed, typed, read from YAML; old command lines parse as before."""

from pathlib import Path

import pytest
import torch
import yaml
from support.commands import DEMO

import train
from fourier_moe.errors import UserError
from lightning_modules.cli import AdaptationCLI
from lightning_modules.cli.config_files import find_config, update
from lightning_modules.commands.command_line import CommandLine, split_command_line
from lightning_modules.commands.front_door import COMMANDS, FrontDoor
from lightning_modules.commands.sweep import sweep
from lightning_modules.experiments.studies.paper import STUDIES

ALL = ("fit", "validate", "test", "predict", *COMMANDS)
REPOSITORY = Path(__file__).parents[2]
FIT = CommandLine(["configs/demo.yaml"], [*DEMO], [])


@pytest.fixture
def calls(monkeypatch):
    """What the functions of the four commands would have been called with."""
    found = []

    def note(self, name):
        found.append((self._line, {key: self.config[name][key] for key in self._subcommand_method_arguments[name]}))

    monkeypatch.setattr(FrontDoor, "_run_subcommand", note)
    return found


@pytest.mark.parametrize("words", [("--help",), ("nope",), ()], ids=str)
def test_all_commands_are_offered(main, capsys, words):
    with pytest.raises(SystemExit) as stop:
        FrontDoor([*words])
    assert stop.value.code == (0 if words == ("--help",) else 2)
    shown = "".join(capsys.readouterr())
    assert all(command in shown for command in ALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_own_options_with_their_docstrings_and_those_of_fit(main, capsys, command):
    with pytest.raises(SystemExit) as stop:
        main(command, "--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    from_adapter = command in ("generate", "chat", "evaluate")
    assert ("--trainer.max_epochs" in text) != from_adapter
    assert ("--model.adapter" in text) != from_adapter
    assert {
        "compare": "number of seeds: 0, 1, ... (type: PositiveInt, default: 3)",
        "sweep": "or any argument of fit",
        "analyze": "number of batches of training data. (type: PositiveInt, default: 16)",
        "export": "a training checkpoint, instead of `--model.adapter_path`.",
        "generate": "prompts answered at once. (type: PositiveInt, default: 8)",
        "chat": "system message of the chat template.",
        "evaluate": "solved examples before each question; by default the task's own number.",
    }[command] in text


def test_old_command_lines(main, calls):
    main("compare", "--adapters=lora,config", "--trainer.max_epochs", "5", *DEMO, "--seeds", "2", "--match-parameters", "0.42%")
    main("sweep", "experts", *DEMO, "--values", "2,4", "--model.adapter.init_args.num_coefficients", "256")
    main("analyze", *DEMO, "--memory", "2", "--data.init_args.seed", "1")
    main("export", "--format", "lora", *DEMO, "--model.adapter_path", "adapter")
    quiet = ["--trainer.enable_progress_bar", "false"]
    compare = {"adapters": "lora,config", "seeds": 2, "match_parameters": "0.42%", "tune": None, "metric": None, "output": None}
    assert calls == [
        (CommandLine(FIT.files, FIT.configs, ["--trainer.max_epochs", "5", *quiet]), compare),
        (
            CommandLine(FIT.files, FIT.configs, ["--model.adapter.init_args.num_coefficients", "256", *quiet]),
            {"study": "experts", "values": "2,4", "seeds": 3, "metric": None, "output": None},
        ),
        (
            CommandLine(FIT.files, FIT.configs, ["--data.init_args.seed", "1", *quiet]),
            {"batches": 16, "permutations": 20, "memory": 2.0, "weights": None, "output": None},
        ),
        (
            CommandLine(FIT.files, FIT.configs, ["--model.adapter_path", "adapter", *quiet]),
            {"format": "lora", "ckpt_path": None, "output": None, "rank": None, "push": None},
        ),
    ]


def test_own_options_in_a_config_are_taken_from_it_and_the_command_line_wins(main, calls, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("adapters: [lora, config]\nseeds: 5\nmatch_parameters: 1000\ntrainer: {max_epochs: 2}\n")
    main("compare", *DEMO, "--config", str(path), "--seeds", "1")
    ((line, options),) = calls
    assert (options["adapters"], options["seeds"], options["match_parameters"]) == (["lora", "config"], 1, 1000)
    assert line.files == ["configs/demo.yaml", str(path)]
    assert yaml.safe_load(line.configs[3]) == {"trainer": {"max_epochs": 2}}


def test_a_command_that_starts_from_an_adapter_reads_its_options_from_a_config_too(calls, tmp_path, capsys):
    path = tmp_path / "answers.yaml"
    path.write_text("adapter: runs/x\nmax_new_tokens: 5\n")
    train.main(["generate", "--config", str(path), "--prompt", "-1 or 1?"])
    ((_, options),) = calls
    assert (options["adapter"], options["max_new_tokens"], options["prompt"]) == ("runs/x", 5, "-1 or 1?")
    with pytest.raises(SystemExit):
        train.main(["generate", *DEMO, "--adapter", "runs/x", "--prompt", "a"])
    assert "configs/demo.yaml is not for generate, which reads that of --adapter RUN" in capsys.readouterr().err


def test_the_saved_config_of_a_run_is_taken_by_every_command(main, calls, trained):
    saved = Path(trained.trainer.log_dir) / "config.yaml"
    assert yaml.safe_load(saved.read_text()).keys() >= {"ckpt_path", "weights_only"}
    for command in (("compare", "--adapters", "config"), ("sweep", "experts"), ("analyze",), ("export", "--format", "adapter")):
        main(*command, "--config", str(saved))
        line, _ = calls.pop()
        config = AdaptationCLI([*line.words, "--seed_everything", "1"], run=False).config
        assert config.data.init_args.dataset == "digits"


def test_config_of_an_older_run(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model:\n  adapter:\n    class_path: fourier_moe.FourierMoEConfig\n    init_args:\n      targets:\n      - q_proj\n"
        "      num_coefficients: 512\n      init_std: 0.0\n      top_k: 3\n"
        "trainer:\n  strategy:\n    class_path: lightning_modules.sharding.ShardedBaseStrategy\n"
        "data:\n  class_path: datamodules.arithmetic.ArithmeticDataModule\n"
    )
    config = AdaptationCLI(["--config", "configs/demo_math.yaml", "--config", str(path)], run=False).config
    assert config.model.adapter.init_args.top_k == 3
    assert config.trainer.strategy.class_path == "lightning_modules.strategies.sharding.ShardedBaseStrategy"
    assert config.data.class_path == "datamodules.instructions.arithmetic.ArithmeticDataModule"
    path.write_text(path.read_text().replace("init_std: 0.0", "init_std: 0.5"))
    with pytest.raises(SystemExit):
        AdaptationCLI(["--config", "configs/demo_math.yaml", "--config", str(path)], run=False)


@pytest.mark.parametrize(
    "text", ["class_path: my.FourierMoEConfig\ninit_args:\n  init_std: 0.0\n", "a: my.examples/x\n", "examples/\n"]
)
def test_other_configs_are_not_changed(text, tmp_path):
    assert update(text, tmp_path) == text


def test_names_of_configs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"demo": "demo", "configs/demo.yaml": "demo", "adapters/lora": "adapters/lora"}
    assert {name: find_config(name) for name in names} == {k: str(REPOSITORY / f"configs/{v}.yaml") for k, v in names.items()}
    for name in ("", "examples", "README.md", "nothing", "a: 1\nb: 2", "{" + "x" * 5000):
        assert find_config(name) == name
    (tmp_path / "demo").write_text("")
    assert find_config("demo") == "demo"


def test_printed_config_runs(main, calls, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main("compare", *DEMO, "--adapters", "lora", "--trainer.max_epochs", "7", "--print_config")
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    main("compare", "--config", str(printed))
    ((line, options),) = calls
    assert options["adapters"] == "lora"
    content = yaml.safe_load(line.configs[1])
    assert content["trainer"]["max_epochs"] == 7
    assert content.keys() == {"seed_everything", "trainer", "model", "data"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compare", *DEMO), "--adapters is missing"),
        (("compare", "--adapters", "lora"), "--config is missing"),
        (("sweep", *DEMO), "study"),
        (("analyze", *DEMO, "--batches", "many"), "batches=many must be a whole number"),
        (("export", *DEMO, "--format"), "--format: expected one argument"),
    ],
    ids=str,
)
def test_wrong_command_line(capsys, main, words, message):
    with pytest.raises(SystemExit) as stop:
        FrontDoor([*words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_config_that_does_not_read_is_left_for_fit_to_refuse(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("a: [")
    line, own = split_command_line(["--config", str(path), "-c=nowhere.yaml"], ["seeds"])
    assert (line.configs, own) == (["--config", str(path), "--config", "nowhere.yaml"], [])


def test_help_of_sweep_names_all_studies():
    assert f"({', '.join(STUDIES)})" in " ".join(sweep.__doc__.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.adapter.init_args.num_experts", "0"), "error: FourierMoEConfig: num_experts=0 must be at least 1"),
        (("--data.init_args.batch_size", "0"), "error: batch_size must be 1 or more, got 0"),
    ],
)
def test_mistake_found_while_a_class_is_built_is_one_line(main, words, message):
    with pytest.raises(SystemExit) as stop:
        train.run(["fit", *DEMO, *words])
    assert str(stop.value).strip().startswith(message)
    assert "\n" not in str(stop.value).strip()


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, AttributeError, torch.OutOfMemoryError])
def test_a_fault_of_ours_and_an_error_of_a_library_keep_their_traceback(main, monkeypatch, error):
    def fail(*_):
        raise error("a bug")

    monkeypatch.setattr(FrontDoor, "before_fit", fail)
    with pytest.raises(error, match="a bug"):
        train.run(["fit", *DEMO])


def test_user_error_of_a_command_is_raised_as_it_is(main):
    with pytest.raises(
        UserError, match=r"^--adapters lora,lora: the results of lora and lora would both go to lora/; leave one out$"
    ):
        main("compare", *DEMO, "--adapters", "lora,lora")


def test_lightning_s_advertisement_and_its_note_on_replaced_callbacks_are_not_shown(run, caplog):
    with caplog.at_level("INFO"):
        cli = run(
            "fit", *DEMO, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"
        )
        cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    assert "Adapter written" in caplog.text
    assert "Tip:" not in caplog.text
    assert "will override" not in caplog.text
