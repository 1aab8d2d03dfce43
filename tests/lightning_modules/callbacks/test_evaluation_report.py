"""EvaluationReport: table, rows, and going on after an interruption."""

import json
import os
import random

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from support.language_models import SETS, SumsData, TinyLanguageModel, language_module, language_trainer
from support.token_task import TokenData, token_module, token_trainer

from fourier_moe import save_adapter
from lightning_modules.callbacks import EvaluationReport
from lightning_modules.callbacks.results import sealed_rows
from lightning_modules.callbacks.results.evaluation_report import _gather
from lightning_modules.callbacks.results.evaluation_table import format_results
from lightning_modules.callbacks.results.sealed_rows import SealedRows, user_key
from lightning_modules.callbacks.results.unfinished_evaluation import UnfinishedEvaluation
from lightning_modules.tasks import GenerationSettings, causal_language_model

IDS = {name: [f"{left}+{right}" for left, right in pairs] for name, pairs in SETS.items()}


class Writer:
    """Stands in for generation: right or wrong answers as told, the prompts counted, and interrupted after some calls."""

    def __init__(self, wrong=(), interrupt_at=None):
        self.wrong, self.interrupt_at = wrong, interrupt_at
        self.asked = []

    def __call__(self, model, tokenizer, prompt_ids, prompt_mask, settings, **_):
        if self.interrupt_at == len(self.asked):
            raise RuntimeError("interrupted")
        prompts = tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
        sums = [prompt.strip().removeprefix("What is ").removesuffix("?").replace(" ", "") for prompt in prompts]
        self.asked.append(sums)
        return ["no idea" if s in self.wrong else f"it is {sum(map(int, s.split('+')))}" for s in sums]


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    """`user("name")`: from now on everything is run by that user."""

    def be(name):
        monkeypatch.setattr(sealed_rows, "default_cache_directory", lambda: tmp_path / "home" / name)

    be("first")
    return be


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """`evaluate(writer, command="test", ...)` of the tiny model with a report; returns what the trainer returns."""

    def run(writer=None, command="test", data=None, module=None, directory=tmp_path / "report", ckpt_path=None, **options):
        monkeypatch.setattr(causal_language_model, "generate", writer or Writer())
        trainer = language_trainer(tmp_path, EvaluationReport(directory and str(directory)), **options)
        return getattr(trainer, command)(module or language_module(), data or SumsData(), ckpt_path=ckpt_path)

    return run


def rows_of(directory, name):
    return [json.loads(line) for line in (directory / "predictions" / f"{name}.jsonl").read_text().splitlines()]


def files_below(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


REPORT = ["predictions/large.jsonl", "predictions/small.jsonl", "results.json", "results.md"]


def test_table_and_rows(evaluate, tmp_path, caplog):
    evaluate(Writer(wrong=["1+2", "9+10"]))
    table = (tmp_path / "report/results.md").read_text()
    assert table in caplog.text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert cells[0] == ["set", "count", "accuracy", "strict accuracy", "loss", "note"]
    assert [[*row[:4], row[5]] for row in cells[2:]] == [
        ["small", "3", "66.7%", "66.7%", ""],
        ["large", "5", "80.0%", "80.0%", "leaked"],
        ["average", "8", "73.3%", "73.3%", ""],
    ]
    assert files_below(tmp_path / "report") == REPORT
    rows = rows_of(tmp_path / "report", "small")
    assert [(row["id"], row["set"], row["output"], row["correct"]) for row in rows] == [
        ("1+2", "small", "no idea", False),
        ("3+4", "small", "it is 7", True),
        ("5+60", "small", "it is 65", True),
    ]
    assert [row["id"] for row in rows_of(tmp_path / "report", "large")] == IDS["large"]


def test_numbers_are_those_that_the_module_logs(evaluate, tmp_path):
    (logged, _) = evaluate(Writer(wrong=["1+2", "9+10"]))
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert results["command"] == "test"
    assert results["settings"]["evaluation"] == {"max_new_tokens": 32, "num_beams": 1}
    assert results["sets"]["large"] == {
        "count": 5,
        "accuracy": 0.8,
        "strict_accuracy": 0.8,
        "loss": pytest.approx(logged["test/large/loss"]),
        "note": "leaked",
    }
    for name, value in results["average"].items():
        assert value == pytest.approx(logged[f"test/{name}"])


def test_single_set_without_a_name(evaluate, tmp_path):
    evaluate(data=SumsData({"small": SETS["small"]}, named=False))
    assert files_below(tmp_path / "report") == ["predictions/test.jsonl", *REPORT[2:]]
    assert "average" not in (tmp_path / "report/results.md").read_text()


def test_predict_writes_rows_and_table(evaluate, tmp_path):
    evaluate(Writer(wrong=["1+2"]), command="predict")
    assert [row["correct"] for row in rows_of(tmp_path / "report", "small")] == [False, True, True]
    assert "| small   | 3     | 66.7% " in (tmp_path / "report/results.md").read_text()


def test_validate_reports_what_is_logged_where_nothing_is_written(evaluate, tmp_path):
    (logged, _) = evaluate(command="validate")
    assert files_below(tmp_path / "report") == ["results.json", "results.md"]
    assert "scoring" not in (tmp_path / "report/results.md").read_text()
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert results["sets"]["small"] == {
        "count": 3,
        "token_accuracy": logged["val/small/token_accuracy"],
        "loss": logged["val/small/loss"],
        "note": "",
    }


def test_classifier_has_a_table_of_logged_metrics_and_no_rows(tmp_path):
    module = token_module()
    token_trainer(tmp_path).fit(module, TokenData())
    trainer = token_trainer(tmp_path, EvaluationReport(str(tmp_path / "report")))
    (logged,) = trainer.test(module, TokenData(), verbose=False)
    assert files_below(tmp_path / "report") == ["results.json", "results.md"]
    result = json.loads((tmp_path / "report/results.json").read_text())["sets"]["test"]
    assert (result["accuracy"], result["loss"]) == (logged["test/accuracy"], logged["test/loss"])


def test_count_of_a_classifiers_table_is_what_was_scored_and_a_set_s_name_is_kept(tmp_path):
    class Named(TokenData):
        def test_dataloader(self):
            return {"only": self._loader(4, 5, 6)}

    module = token_module()
    token_trainer(tmp_path).fit(module, Named())
    trainer = token_trainer(tmp_path, EvaluationReport(str(tmp_path / "report")), limit_test_batches=2)
    (logged,) = trainer.test(module, Named(), verbose=False)
    result = json.loads((tmp_path / "report_partial/results.json").read_text())["sets"]["only"]
    assert (result["count"], result["accuracy"]) == (16, logged["test/only/accuracy"])


def test_classifiers_predictions_are_left_to_the_predictions_writer(tmp_path):
    module = token_module()
    token_trainer(tmp_path).fit(module, TokenData())
    token_trainer(tmp_path, EvaluationReport(str(tmp_path / "report"))).predict(module, TokenData())
    assert not (tmp_path / "report").exists()


def test_fast_dev_run_and_validation_during_fit_write_nothing(evaluate, tmp_path):
    evaluate(fast_dev_run=True)
    token_trainer(tmp_path, EvaluationReport(str(tmp_path / "report"))).fit(token_module(), TokenData())
    assert not (tmp_path / "report").exists()


# ---------------------------------------------------------------- where


def test_default_directory_is_beside_the_adapter_or_checkpoint_or_in_the_run(evaluate, tmp_path):
    module = language_module()
    evaluate(module=module, directory=None)
    assert files_below(tmp_path / "test") == REPORT
    save_adapter(module.model, tmp_path / "run/adapter")
    module = language_module()
    module.adapter_path = str(tmp_path / "run/adapter")
    evaluate(module=module, directory=None)
    assert files_below(tmp_path / "run/adapter_test") == REPORT
    assert (
        f"with {tmp_path}/run/adapter; scoring generate, num_beams 1, at most 32 tokens\n"
        in (tmp_path / "run/adapter_test/results.md").read_text()
    )
    trainer = language_trainer(tmp_path)
    trainer.test(module, SumsData(), verbose=False)
    trainer.save_checkpoint(tmp_path / "run/step=1.5.ckpt")
    evaluate(module=module, directory=None, ckpt_path=tmp_path / "run/step=1.5.ckpt", command="predict")
    assert files_below(tmp_path / "run/step=1.5_predict") == REPORT


def test_checkpoint_at_an_address_leaves_its_report_in_the_run(tmp_path):
    class Trainer:
        ckpt_path, strategy, log_dir = "s3://bucket/last.ckpt", language_trainer(tmp_path).strategy, str(tmp_path)
        state, callbacks, logger = language_trainer(tmp_path).state, (), None

    Trainer.state.fn = TrainerFn.TESTING
    assert EvaluationReport()._directory(Trainer(), language_module()) == tmp_path / "test"


def test_directory_that_cannot_be_made_is_an_error_before_anything_is_written(evaluate, tmp_path):
    (tmp_path / "report").write_text("a file")
    writer = Writer()
    with pytest.raises(ValueError, match=r"directory='.*report' cannot be written .*set another one in EvaluationReport"):
        evaluate(writer)
    assert writer.asked == []


# ---------------------------------------------------------------- going on


def interrupted(evaluate, batches, **options):
    with pytest.raises(RuntimeError, match="interrupted"):
        evaluate(Writer(interrupt_at=batches), **options)


def test_interrupted_evaluation_goes_on_where_it_stopped(evaluate, tmp_path, caplog):
    interrupted(evaluate, 3)  # both batches of the small set, the first of the large one
    assert files_below(tmp_path / "report") == [
        f"unfinished_evaluation/{name}" for name in ("about.json", "large/0.jsonl", "small/0.jsonl")
    ]
    writer = Writer(wrong=["15+16"])
    (logged, _) = evaluate(writer)
    assert "resuming small: 3 of 3 done" in caplog.text
    assert "resuming large: 2 of 5 done" in caplog.text
    assert writer.asked == [["11+1200", "13+14"], ["15+16"]]
    assert files_below(tmp_path / "report") == REPORT
    assert {name: [row["id"] for row in rows_of(tmp_path / "report", name)] for name in IDS} == IDS
    assert logged["test/large/accuracy"] == pytest.approx(0.8)
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert [result["count"] for result in results["sets"].values()] == [3, 5]


def test_interrupted_twice(evaluate, tmp_path):
    interrupted(evaluate, 1)
    interrupted(evaluate, 1)
    assert (tmp_path / "report/unfinished_evaluation/small/0.jsonl").read_text().count("\n") == 3
    writer = Writer()
    evaluate(writer)
    assert writer.asked == [IDS["large"][:2], IDS["large"][2:4], IDS["large"][4:]]


def test_finished_evaluation_is_not_resumed(evaluate):
    evaluate()
    writer = Writer()
    evaluate(writer)
    assert len(writer.asked) == 5


def test_rows_are_kept_until_the_results_are_written(evaluate, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/results.md").mkdir()  # cannot be written
    with pytest.raises(ValueError, match="cannot be written"):
        evaluate()
    (tmp_path / "report/results.md").rmdir()
    writer = Writer()
    evaluate(writer)
    assert writer.asked == []
    assert files_below(tmp_path / "report") == REPORT


def test_torn_last_line_is_answered_again(evaluate, tmp_path):
    interrupted(evaluate, 2)
    path = tmp_path / "report/unfinished_evaluation/small/0.jsonl"
    os.truncate(path, path.stat().st_size - 30)
    interrupted(evaluate, 1)  # its row follows the torn one
    writer = Writer()
    evaluate(writer)
    assert writer.asked == [IDS["large"][:2], IDS["large"][2:4], IDS["large"][4:]]
    assert [row["id"] for row in rows_of(tmp_path / "report", "small")] == IDS["small"]


def test_batch_that_is_finished_in_part_asks_for_the_rest_only(evaluate, tmp_path):
    interrupted(evaluate, 1)
    path = tmp_path / "report/unfinished_evaluation/small/0.jsonl"
    path.write_text("\n" + path.read_text().split("\n")[2])
    writer = Writer()
    evaluate(writer)
    assert writer.asked[:2] == [["1+2"], ["5+60"]]


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"evaluation": GenerationSettings(16)}, "evaluation"),
        ({"scoring": "likelihood"}, "scoring"),
        ({"weights": 1}, "weights"),
    ],
)
def test_another_evaluation_starts_over_and_says_so(evaluate, caplog, options, differs):
    interrupted(evaluate, 3)
    weights = options.pop("weights", None)
    module = language_module(**options)
    if weights:
        module.configure_model()
        with torch.no_grad():
            next(p for p in module.model.parameters() if p.requires_grad).add_(weights)
    writer = Writer()
    evaluate(writer, module=module, data=SumsData(choices=True))
    assert f"differs in {differs}; starting over" in caplog.text
    assert len(writer.asked) == (0 if differs == "scoring" else 5)


def test_example_whose_prompt_or_answer_has_changed_is_answered_again(evaluate, tmp_path):
    interrupted(evaluate, 2)
    path = tmp_path / "report/unfinished_evaluation/small/0.jsonl"
    path.write_text(path.read_text().replace("What is 3 + 4?", "What's 3 + 4?").replace('"answer": "65"', '"answer": "66"'))
    writer = Writer()
    evaluate(writer)
    assert writer.asked[:2] == [["3+4"], ["5+60"]]


def test_finished_rows_do_not_stay_with_the_task(evaluate, tmp_path):
    interrupted(evaluate, 2)
    module = language_module()
    path = tmp_path / "report/unfinished_evaluation/small/0.jsonl"
    path.write_text("\n" + path.read_text().split("\n")[2])
    interrupted(evaluate, 0, module=module)  # in a batch that is finished in part
    assert module.task.finished == {}
    evaluate(module=module, data=SumsData({"large": SETS["large"], "small": SETS["small"][1:2]}))  # the last batch is finished
    assert module.task.finished == {}


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "\xff", "[" * 100_000])
def test_description_that_cannot_be_read_starts_over(evaluate, tmp_path, caplog, content):
    interrupted(evaluate, 2)
    (tmp_path / "report/unfinished_evaluation/about.json").write_text(content, encoding="latin-1")
    writer = Writer()
    evaluate(writer)
    assert "has no readable about.json; starting over" in caplog.text
    assert len(writer.asked) == 5


def test_grades_are_not_read_from_the_file(evaluate, tmp_path):
    interrupted_writer = Writer(wrong=["1+2", "3+4"], interrupt_at=2)
    with pytest.raises(RuntimeError, match="interrupted"):
        evaluate(interrupted_writer)
    path = tmp_path / "report/unfinished_evaluation/small/0.jsonl"
    assert "correct" not in path.read_text()
    evaluate(Writer())
    assert [row["correct"] for row in rows_of(tmp_path / "report", "small")] == [False, False, True]


def test_rows_of_another_user_are_answered_again(evaluate, tmp_path, caplog, user):
    """Somebody else's run directory cannot bring outputs of its own."""
    user("somebody else")
    interrupted(evaluate, 2)
    user("first")
    writer = Writer()
    evaluate(writer)
    assert len(writer.asked) == 5
    assert "3 line(s) in" in caplog.text
    assert "are damaged, or were not written by you on this machine; their examples are answered again" in caplog.text


def test_key_is_kept_and_only_the_user_can_read_it(tmp_path, user):
    assert user_key() == user_key()
    path = tmp_path / "home/first/evaluation_key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["evaluation_key"]
    key = user_key()
    path.write_bytes(key[:5])  # damaged
    assert user_key() == user_key() != key
    user("second")
    assert user_key() != key


def test_without_a_place_for_the_key_nothing_is_trusted(tmp_path, user):
    (tmp_path / "home").write_text("a file")
    assert user_key() != user_key()


def test_no_damage_gives_another_row(tmp_path):
    rows = [{"id": str(i), "prompt": "What?", "answer": "5", "output": f"it is {i}", "loss": i / 7} for i in range(4)]
    first = UnfinishedEvaluation(tmp_path / "unfinished", 0, {"a": 1}, b"key")
    first.open(["set"])
    first.append("set", rows)
    path = tmp_path / "unfinished/set/0.jsonl"
    whole, source = path.read_bytes(), random.Random(0)
    for number in range(400):
        damaged = bytearray(whole)
        start, end = sorted(source.sample(range(len(whole)), 2))
        if number % 4 == 0:
            damaged[start] ^= 1 << source.randrange(8)
        elif number % 4 == 1:
            del damaged[start:end]
        elif number % 4 == 2:
            damaged[start:end] = source.randbytes(end - start)
        else:
            damaged[start:start] = b"[" * 2000
        path.write_bytes(damaged)
        found, _ = first.open(["set"])
        assert all(row == rows[int(id_)] for id_, row in found["set"].items())


def test_rows_belong_to_their_evaluation_and_their_set():
    line = SealedRows(b"key", "about").line("set", {"id": "1"}).encode()
    assert SealedRows(b"key", "about").read("set", line) == {"id": "1"}
    for other in (SealedRows(b"other", "about"), SealedRows(b"key", "other")):
        assert other.read("set", line) is None
    assert SealedRows(b"key", "about").read("other", line) is None


def test_any_text_survives(tmp_path):
    blank = {"id": "", "prompt": "", "answer": "", "output": "", "loss": None}
    unfinished = UnfinishedEvaluation(tmp_path / "unfinished", 0, {"a": 1}, b"key")
    unfinished.open(["x/y"])
    rows = [
        blank | {"id": "1", "output": 'new\nline, "quotes", \u2028 \x85 \x0c \u00e9'},
        blank | {"id": "2", "loss": 0.1},
    ]
    for row in rows:
        unfinished.append("x/y", [row])
    other = UnfinishedEvaluation(tmp_path / "unfinished", 1, {"a": 1}, b"key")
    other.append("x/y", [blank | {"id": "3"}])
    finished, note = other.open(["x/y", "x"])
    assert note is None
    assert finished == {"x/y": {row["id"]: row for row in [*rows, blank | {"id": "3"}]}, "x": {}}


# ---------------------------------------------------------------- several processes


def test_rows_of_several_processes_are_in_the_order_of_the_data_and_count_once(monkeypatch):
    shares = [[{"id": "a"}, {"id": "c"}, {"id": "e"}], [{"id": "b"}, {"id": "d"}, {"id": "a"}]]

    def all_gather_object(gathered, own):
        gathered[:] = [{"set": share} for share in shares]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)

    class Trainer:
        world_size = 2

    assert [row["id"] for row in _gather(Trainer(), {"set": shares[0]})["set"]] == list("abcde")


def test_metric_that_only_some_sets_have_leaves_a_gap():
    table = format_results({"a": {"count": 1, "accuracy": 0.5, "note": ""}, "b": {"count": 1000, "loss": 1.0, "note": ""}})
    assert table.splitlines() == [
        "| set     | count | accuracy | loss   |",
        "| ------- | ----- | -------- | ------ |",
        "| a       | 1     | 50.0%    |        |",
        "| b       | 1,000 |          | 1.0000 |",
        "| average | 1,001 | 50.0%    | 1.0000 |",
    ]


def test_correlations_are_no_percentages():
    values = {"accuracy": 0.5, "matthews": -0.123, "mae": 2.5}
    table = format_results({"dev": {"count": 1, **values, "note": ""}}, ["loss", "mae"])
    assert table.splitlines()[-1] == "| dev | 1     | 50.0%    | -0.1230  | 2.5000 |"


@pytest.mark.parametrize("command", ["test", "predict"])
def test_likelihood_without_choices_stops_before_anything_is_answered(evaluate, monkeypatch, command):
    monkeypatch.setattr(TinyLanguageModel, "_answer", lambda *_: pytest.fail("answered"))
    data = SumsData(choices=True)
    data.loaders["large"] = SumsData().loaders["large"]  # the second set of the two
    with pytest.raises(ValueError, match="sums has none"):
        evaluate(module=language_module(scoring="likelihood"), data=data, command=command)
