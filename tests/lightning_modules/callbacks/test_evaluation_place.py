"""Results replace those of the same evaluation and of no other."""

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.cli import SaveConfigCallback
from support.language_models import SETS, SumsData, language_module, language_trainer
from support.token_task import TokenData, token_batch, token_module, token_trainer
from torch.utils.data import DataLoader

from fourier_moe import save_adapter
from lightning_modules.callbacks import EvaluationReport, PredictionsWriter
from lightning_modules.callbacks.results.evaluation_place import data_of, place, place_unfinished
from lightning_modules.evaluation_sets import limit_of
from lightning_modules.tasks import causal_language_model


class OtherData(TokenData):
    """Test batches of these seeds."""

    def __init__(self, *seeds):
        super().__init__()
        self.seeds = seeds

    def test_dataloader(self):
        return self._loader(*self.seeds)


class Relabeled(TokenData):
    """The examples of TokenData with one other label."""

    def test_dataloader(self):
        batch = token_batch(seed=4)
        batch["label"][0] = 1 - batch["label"][0]
        return DataLoader([batch], batch_size=None)


@pytest.fixture
def adapter(tmp_path):
    module = token_module()
    module.configure_model()
    return save_adapter(module.model, tmp_path / "run/adapter")


@pytest.fixture
def evaluate(tmp_path, adapter):
    def run(data, command="test", weights=adapter, report=None, **options):
        trainer = token_trainer(tmp_path, EvaluationReport(report), **options)
        getattr(trainer, command)(token_module(adapter_path=str(weights)), data, verbose=False)

    return run


def record(directory):
    return json.loads((directory / "results.json").read_text())


def results_in(directory):
    return {path.parent.name for path in directory.glob("*/results.json")}


def test_other_data_have_a_directory_of_their_own_and_the_same_data_replace_their_results(evaluate, tmp_path, caplog):
    run = tmp_path / "run"
    evaluate(TokenData())
    first = (run / "adapter_test/results.json").read_bytes()
    evaluate(OtherData(4, 5))
    assert f"Written to {run}/adapter_test_2; {run}/adapter_test holds the results of another evaluation" in caplog.text
    assert (run / "adapter_test/results.json").read_bytes() == first
    assert record(run / "adapter_test_2")["sets"]["test"]["count"] == 16
    evaluate(Relabeled())
    evaluate(TokenData(), "validate")
    assert results_in(run) == {"adapter_test", "adapter_test_2", "adapter_test_3", "adapter_validate"}
    (run / "adapter_test/results.md").write_text("to be replaced")
    for data in (TokenData(), OtherData(4, 5), Relabeled()):
        evaluate(data)
    assert results_in(run) == {"adapter_test", "adapter_test_2", "adapter_test_3", "adapter_validate"}
    assert (run / "adapter_test/results.json").read_bytes() == first
    assert "to be replaced" not in (run / "adapter_test/results.md").read_text()


def test_part_of_the_data_says_so_and_replaces_nothing(evaluate, tmp_path):
    run = tmp_path / "run"
    evaluate(OtherData(4, 5), limit_test_batches=1)
    assert results_in(run) == {"adapter_test_partial"}
    assert record(run / "adapter_test_partial")["partial"] == "limit_test_batches=1"
    assert "; on a part of the data (limit_test_batches=1)" in (run / "adapter_test_partial/results.md").read_text()
    evaluate(OtherData(4, 5), limit_test_batches=9)  # all there are
    whole = (run / "adapter_test/results.json").read_bytes()
    assert record(run / "adapter_test")["partial"] is None
    evaluate(OtherData(4, 5), limit_test_batches=1)
    evaluate(OtherData(4, 5), fast_dev_run=True)
    assert results_in(run) == {"adapter_test_partial", "adapter_test"}
    assert (run / "adapter_test/results.json").read_bytes() == whole


def test_named_directory_is_of_one_adapter_and_of_one_precision(evaluate, adapter, tmp_path):
    other = tmp_path / "run/other"
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    report = str(tmp_path / "report")
    evaluate(TokenData(), report=report)
    evaluate(TokenData(), report=report, weights=other)
    evaluate(TokenData(), report=report, precision="bf16-mixed")
    evaluate(TokenData(), report=report)
    assert results_in(tmp_path) == {"report", "report_2", "report_3"}
    assert [record(tmp_path / name)["weights"] for name in ("report", "report_2")] == [str(adapter), str(other)]


def test_damaged_and_older_results_are_not_replaced(evaluate, tmp_path):
    for content in ("{", json.dumps({"command": "test"})):
        (tmp_path / "run/adapter_test").mkdir(exist_ok=True)
        (tmp_path / "run/adapter_test/results.json").write_text(content)
        evaluate(TokenData())
        assert (tmp_path / "run/adapter_test/results.json").read_text() == content
    assert results_in(tmp_path / "run") == {"adapter_test", "adapter_test_2"}


def test_unfinished_rows_of_other_data_outlive_an_evaluation(tmp_path, monkeypatch):
    data = {"large": {"class": "SumsData", "dataset": "large"}, "small": {"class": "SumsData", "dataset": "small"}}
    current, asked = [], []

    def generate(model, tokenizer, prompt_ids, *_, **__):
        if current == ["large"] and len(asked) == 1:
            raise RuntimeError("interrupted")
        asked.append(len(prompt_ids))
        return ["it is 7"] * len(prompt_ids)

    def run(name):
        current[:], asked[:] = [name], []
        for module in ("evaluation_report", "unfinished_evaluation"):
            monkeypatch.setattr(f"lightning_modules.callbacks.results.{module}.data_of", lambda _: data[name])
        trainer = language_trainer(tmp_path, EvaluationReport(str(tmp_path / "report")))
        trainer.test(language_module(), SumsData({name: SETS[name]}), verbose=False)

    monkeypatch.setattr(causal_language_model, "generate", generate)
    with pytest.raises(RuntimeError, match="interrupted"):
        run("large")
    rows = {path: path.read_bytes() for path in (tmp_path / "report/unfinished_evaluation").rglob("*") if path.is_file()}
    run("small")
    assert results_in(tmp_path) == {"report"} or results_in(tmp_path) == {"report_2"}
    assert all(path.read_bytes() == content for path, content in rows.items())


def test_data_are_known_by_where_they_are_and_not_by_how_they_are_loaded():
    class Config(SaveConfigCallback):
        def __init__(self, **settings):
            self.config = SimpleNamespace(as_dict=lambda: {"data": {"class_path": "X", "init_args": settings}})

    def known(**settings):
        return data_of(SimpleNamespace(datamodule=TokenData(), callbacks=[Config(**settings)]))

    assert known(directory="a", batch_size=4, tokenizer="t") == {"class": "TokenData", "directory": "a"}
    assert known(directory="b") != known(directory="a")
    assert known(synthetic=True) != known(synthetic=False)
    assert data_of(SimpleNamespace(datamodule=None, callbacks=[])) == {"class": "NoneType"}


def test_places_are_numbered(tmp_path):
    own = dict.fromkeys(("command", "backbone", "precision", "settings", "data", "examples", "partial", "weights"), "own")
    for number, name in enumerate(("x", "x_2")):
        assert place(tmp_path / "x", own, named=True) == tmp_path / name
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(own | {"data": str(number)}))
    assert place(tmp_path / "x", own, named=True) == tmp_path / "x_3"
    assert place(tmp_path / "x", own | {"data": "1"}, named=True) == tmp_path / "x_2"
    assert place(tmp_path / "x", own | {"data": "1", "weights": "other"}, named=True) == tmp_path / "x_3"
    assert place(tmp_path / "x", own | {"data": "1", "weights": "other"}, named=False) == tmp_path / "x_2"
    assert place_unfinished(tmp_path / "x", "results.json", "0") == tmp_path / "x"


def test_loader_without_length_is_partial_if_a_limit_is_set():
    def limit(value):
        return limit_of(SimpleNamespace(num_test_batches=[3], limit_test_batches=value), "test", [iter(())])

    assert (limit(1.0), limit(1), limit(0.5)) == (None, "limit_test_batches=1", "limit_test_batches=0.5")


def test_part_of_the_predictions_does_not_replace_them_all(tmp_path, adapter):
    class TwoBatches(TokenData):
        def predict_dataloader(self):
            return self._loader(4, 5)

    for limit in (1.0, 1):
        trainer = token_trainer(tmp_path, PredictionsWriter(str(tmp_path / "p.csv")), limit_predict_batches=limit)
        trainer.predict(token_module(adapter_path=str(adapter)), TwoBatches())
    lengths = {name: len((tmp_path / name).read_text().splitlines()) for name in ("p.csv", "p_partial.csv")}
    assert lengths == {"p.csv": 1 + 16, "p_partial.csv": 1 + 8}


def test_predictions_of_fast_dev_run_are_not_written(tmp_path, monkeypatch, adapter):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for path in (None, str(tmp_path / "cwd/p.csv")):
        trainer = token_trainer(None, PredictionsWriter(path), fast_dev_run=True)
        trainer.predict(token_module(adapter_path=str(adapter)), TokenData())
    assert list((tmp_path / "cwd").iterdir()) == []
