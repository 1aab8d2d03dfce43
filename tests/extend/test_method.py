"""docs/extend/method.md: exactly its code trains, is saved and loaded, in Python and in the trainer."""

import json
import re
import sys

import pytest
import torch
from support import REPOSITORY

from fourier_moe import adapters

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (REPOSITORY / "docs/extend/method.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's blocks in order, with its module and its overlay in files."""
    languages, blocks = zip(*BLOCKS, strict=True)
    assert languages == ("python", "python", "yaml", "bash")
    (tmp_path / "random_directions.py").write_text(blocks[0], encoding="utf-8")
    (tmp_path / "random_directions.yaml").write_text(blocks[2], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield blocks
    sys.modules.pop("random_directions", None)


def test_a_method_takes_forty_lines(page):
    assert len(page[0].splitlines()) <= 40


def test_method_is_injected_trained_saved_and_loaded(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(page[1], space)
    assert space["losses"][-1] < 0.9 * space["losses"][0]
    assert "trained parameters: 107 (adapter 8, head 99)" in capsys.readouterr().out
    assert torch.equal(space["loaded"](space["x"]), space["model"](space["x"]))
    assert not torch.equal(adapters(space["model"])["0"].s, torch.zeros(8))
    with pytest.raises(ValueError, match=r"^RandomDirectionsConfig: r=0 must be at least 1"):
        space["RandomDirectionsConfig"](targets=["0"], r=0)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on tiny runs
def test_method_trains_from_the_command_line(page, run, tmp_path):
    words = page[3].replace("random_directions.yaml", str(tmp_path / "random_directions.yaml")).split()
    assert words[:2] == ["python", "train.py"]
    cli = run(*words[2:], "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1")
    assert {type(adapter).__name__ for adapter in adapters(cli.model.model).values()} == {"RandomDirectionsLinear"}
    (stored,) = tmp_path.glob("demo/version_0/adapter/adapter.json")
    assert json.loads(stored.read_text())["config"] | {"r": 16, "seed": 0} == json.loads(stored.read_text())["config"]
