"""examples/notebooks: every notebook runs as it is, keeps no outputs, and learns something."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO

import matplotlib.pyplot as plt
import pytest
import torch
from support import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "examples/notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)#:]+)\)")


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["adapt_your_model", "what_experts_learn"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_without_stored_outputs(path, monkeypatch):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    links = [link for cell in cells if cell["cell_type"] == "markdown" for link in LINK.findall("".join(cell["source"]))]
    assert not [link for link in links if not (path.parent / link).exists()]
    monkeypatch.chdir(path.parent)
    plt.switch_backend("Agg")
    space: dict = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]), redirect_stdout(StringIO()) as printed:
        for cell in code:
            exec(compile("".join(cell["source"]), path.name, "exec"), space)
    plt.close("all")
    accuracy = float(re.findall(r"accuracy (0\.\d+)", printed.getvalue())[-1])
    assert accuracy > 0.5  # chance is 0.1
