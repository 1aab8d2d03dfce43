"""docs/guides/serving.md: its commands and its Python run as they stand, one after the other."""

import re
import shlex
import sys

import pytest
import torch
from support import REPOSITORY

import train

PAGE = (REPOSITORY / "docs/guides/serving.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python train\.py (.+)$", PAGE, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.partition("## torch.export and ONNX")[0], re.DOTALL)  # see test_export.py
SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "6")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A copy of the repository's root in which the page's commands have run, the training cut short."""
    directory = tmp_path_factory.mktemp("root")
    for name in ("configs", "examples"):
        (directory / name).symlink_to(REPOSITORY / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["train.py"])
        for command in COMMANDS:
            words = shlex.split(command)
            train.main([*words, *(SHORT if words[0] == "fit" else ()), "--trainer.enable_progress_bar", "false"])
    return directory


def test_commands_write_every_format(directory):
    assert sorted(path.name for path in (directory / "runs/export/demo").iterdir()) == ["adapter", "lora", "merged"]


def test_python_runs(directory, monkeypatch):
    monkeypatch.chdir(directory)
    space = {}
    for snippet in SNIPPETS:
        exec(snippet, space)
    assert len(SNIPPETS) == 3
    assert space["expert_3"](torch.rand(2, 3, 8, 8)).shape == space["logits"].shape == (2, 10)
    mixed, plain, best = (space[name] for name in ("mixed", "plain", "probabilities"))
    torch.testing.assert_close(mixed[[0, 3]], best[[0, 3]])
    torch.testing.assert_close(mixed[2], plain[2])
    assert not torch.allclose(best, plain, atol=1e-3)
    assert space["bank"].names == ("best",)
