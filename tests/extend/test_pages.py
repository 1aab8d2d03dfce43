"""docs/extend: the code of each page runs exactly as printed, and does what the page says."""

import csv
import json
import re
import sys
from collections import OrderedDict

import pytest
from support.pages import blocks, commands, write_files
from torch import nn

from fourier_moe import FourierMoEConfig, inject
from fourier_moe.errors import UserError

SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1")
ONE_TEST_BATCH = ("--trainer.limit_test_batches", "1")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on tiny runs


@pytest.fixture
def page(request, tmp_path, monkeypatch):
    """The name of a page whose files are importable, as they are beside train.py."""
    write_files(request.param, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield request.param
    for module in tmp_path.glob("*.py"):
        if module.stem not in known:
            sys.modules.pop(module.stem, None)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["data"], indirect=True)
def test_data(page, run, tmp_path):
    fit, test = commands(page, tmp_path)
    cli = run(*fit, *SHORT)
    assert cli.model.class_names == ["horizontal", "vertical"]
    stored = json.loads((tmp_path / "demo/version_0/adapter/adapter.json").read_text(encoding="utf-8"))
    assert stored["task"]["data"] == "StripesDataModule"
    assert stored["class_names"] == ["horizontal", "vertical"]
    assert "test/accuracy" in run(*test, *ONE_TEST_BATCH).trainer.callback_metrics


@pytest.mark.slow
@pytest.mark.parametrize("page", ["task"], indirect=True)
def test_task(page, run, tmp_path, monkeypatch):
    fit, test, predict = commands(page, tmp_path)
    cli = run(*fit, *SHORT)
    assert type(cli.model.task).__name__ == "DigitValue"
    assert {"val/mae", "val/loss"} <= cli.trainer.callback_metrics.keys()
    assert "test/mae" in run(*test, *ONE_TEST_BATCH).trainer.callback_metrics
    run(*predict)
    (path,) = tmp_path.rglob("predictions.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "value"]
    assert len(rows) == 899
    path.unlink()
    monkeypatch.setattr(type(cli.model.task), "prediction_columns", None)  # all entries
    run(*predict)
    assert next(tmp_path.rglob("predictions.csv")).read_text(encoding="utf-8").startswith("id,value\n")
    monkeypatch.setattr(type(cli.model.task), "prediction_columns", ("id", "score"))
    with pytest.raises(UserError, match=r"DigitValue\.prediction_columns names score, but its predictions have id, value"):
        run(*predict)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["callback"], indirect=True)
def test_callback(page, run, tmp_path, capsys):
    (fit,) = commands(page, tmp_path)
    run(*fit, *SHORT)
    assert len(re.findall(r"^backbone\S+ \d$", capsys.readouterr().out, re.MULTILINE)) == 8


def test_callback_reads_what_the_page_lists():
    model = nn.Sequential(OrderedDict(projection=nn.Linear(16, 16)))
    inject(model, FourierMoEConfig(targets=["projection"], num_coefficients=8, num_experts=2))
    listing = next(code for _, code in blocks("callback") if "delta_weight" in code)
    exec(listing, {"model": model, "name": "projection", "e": 0})
