"""Every run has a directory of its own, whatever its logger, and callbacks that cannot work here are refused."""

import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from unittest.mock import Mock

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from support.token_task import TokenData, token_module, token_trainer

from fourier_moe.errors import UserError
from lightning_modules.callbacks import AdapterCheckpoint
from lightning_modules.cli import _read_version_numbers
from lightning_modules.interruption.locks import take_lock
from lightning_modules.run_directory import attach_run_directory, run_directory

DEMO = ("--config", "configs/demo.yaml", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2")
ADAPTER = ("adapter/adapter.json", "adapter_last/adapter.json", "config.yaml")
LIGHTNING = "lightning.pytorch.callbacks"


class ServiceLogger(Logger):
    """A logger of a service, such as W&B or MLflow: it has no log_dir, perhaps no save_dir, and names its run itself."""

    def __init__(self, save_dir=None, version="run7"):
        super().__init__()
        self._save_dir, self._named = save_dir, version
        self.hyperparameters, self.started = {}, False

    @property
    def save_dir(self):
        return self._save_dir

    @property
    def name(self):
        return "project"

    @property
    def version(self):
        return self._named if self.started else None

    @property
    def experiment(self):
        self.started = True
        return self

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        self.hyperparameters |= params


def claimed(*loggers, directory="unused"):
    trainer = token_trainer(directory, logger=list(loggers))
    return attach_run_directory(trainer).claim(trainer)


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_runs_that_start_at_the_same_moment_have_a_directory_each(tmp_path, kind):
    barrier = Barrier(8)

    def start(_):
        logger = kind(tmp_path, name="demo")
        barrier.wait()
        return claimed(logger), Path(logger.log_dir)

    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(start, range(8)))
    assert {path for path, _ in paths} == {tmp_path / f"demo/version_{number}" for number in range(8)}
    assert all(path == of_logger and path.is_dir() for path, of_logger in paths)


def test_number_is_taken_even_if_it_was_free_when_looked_for(tmp_path, monkeypatch):
    (tmp_path / "demo/version_3").mkdir(parents=True)
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))  # as another run sees it that has just looked
    (tmp_path / "demo/version_0").mkdir()
    assert claimed(TensorBoardLogger(tmp_path, name="demo")) == tmp_path / "demo/version_1"


def test_loggers_of_one_directory_share_its_number(tmp_path):
    board, table, other = TensorBoardLogger(tmp_path), CSVLogger(tmp_path), CSVLogger(tmp_path / "other")
    assert claimed(board, table, other) == tmp_path / "lightning_logs/version_0"
    assert (board.log_dir, other.log_dir) == (table.log_dir, str(tmp_path / "other/lightning_logs/version_0"))


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger", "WandbLogger"])
@pytest.mark.parametrize(
    ("text", "version"), [("7", 7), (7, 7), ("mine", "mine"), (None, None), ("007", "007"), ("20260101", "20260101"), (8, "8")]
)
def test_version_of_digits_is_a_number_whatever_jsonargparse_took_it_for(tmp_path, text, version, logger):
    for there in ("20260101", "8"):
        (tmp_path / "demo" / there).mkdir(parents=True)
    arguments = Namespace(save_dir=tmp_path, name="demo", version=text)
    logger = Namespace(class_path=f"lightning.pytorch.loggers.{logger}", init_args=arguments)
    for loggers in (logger, [True, logger], False):
        _read_version_numbers(loggers)
    assert arguments.version == (text if logger.class_path.endswith("WandbLogger") else version)


def test_claim_is_made_once(tmp_path):
    trainer = token_trainer(tmp_path, logger=[TensorBoardLogger(tmp_path)])
    paths = {attach_run_directory(trainer).claim(trainer) for _ in range(2)}
    assert paths == {run_directory(trainer)} == {tmp_path / "lightning_logs/version_0"}


def test_a_run_that_claims_nothing_has_the_directory_of_its_logger(tmp_path):
    started = ServiceLogger(str(tmp_path)).experiment
    for logger, path in (
        (started, "project/run7"),
        (ServiceLogger(str(tmp_path)), ""),
        (CSVLogger(tmp_path, "a"), "a/version_0"),
    ):
        assert run_directory(token_trainer(tmp_path, logger=[logger])) == tmp_path / path


def test_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/demo cannot be written to .*--trainer.logger.init_args.save_dir DIR"):
        claimed(TensorBoardLogger(tmp_path / "file", name="demo"))


@pytest.mark.parametrize("logger", [True, False])
@pytest.mark.parametrize("save_dir", ["logs", None])
def test_logger_of_a_service_has_a_directory_for_every_run(tmp_path, save_dir, logger):
    save_dir = save_dir and str(tmp_path / save_dir)
    directory = Path(save_dir or tmp_path) / "project"
    for number in range(2):
        loggers = [ServiceLogger(save_dir, f"run{number}" if logger else None)]
        trainer = token_trainer(tmp_path, AdapterCheckpoint(), logger=loggers, enable_checkpointing=True)
        trainer.fit(token_module(), TokenData())
        run = directory / (f"run{number}" if logger else f"version_{number}")
        assert run_directory(trainer) == run
        assert (run / "adapter_last/adapter.json").is_file()
        assert len(list((run / "checkpoints").glob("*.ckpt"))) == 1
    assert len(list(directory.iterdir())) == 2


def hold(directory, ready, end):
    take_lock(directory)
    ready.set()
    end.wait()


def test_second_run_of_the_same_name_is_refused_while_the_first_trains_and_not_after_it_was_killed(tmp_path):
    def fit():
        trainer = token_trainer(tmp_path, logger=TensorBoardLogger(tmp_path, version="job"))
        trainer.fit(token_module(), TokenData())

    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "lightning_logs/job", ready, end))
    (tmp_path / "lightning_logs").mkdir()
    other.start()
    try:
        assert ready.wait(600)
        with pytest.raises(ValueError, match=r"lightning_logs/job is in use by another run that has not ended"):
            fit()
    finally:
        other.kill()
        other.join()
    fit()
    assert sorted(os.listdir(tmp_path / "lightning_logs")) == ["job"]


def test_new_run_is_not_written_over_another(run, tmp_path, no_training):
    (tmp_path / "demo/mine/adapter").mkdir(parents=True)
    name = ("--trainer.logger.init_args.version", "mine")
    for words in (name, (*name, "--ckpt_path", "last")):
        with pytest.raises(ValueError, match=r"demo/mine holds another run \(adapter\); resume it with --ckpt_path"):
            run("fit", *DEMO, *words)
    assert os.listdir(tmp_path / "demo/mine") == ["adapter"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((f"--trainer.callbacks+={LIGHTNING}.StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.1"), "Stochastic"),
        (("--model.task.init_args.model", "missing.json"), r"missing\.json"),
        (("--data.init_args.image_size", "16"), "images are 16 x 16"),  # found by the first batch, with the loggers' files open
    ],
)
def test_refused_run_leaves_no_directory(run, tmp_path, no_training, words, message):
    with pytest.raises(ValueError, match=message):
        run("fit", *DEMO, *words)
    assert os.listdir(tmp_path) == []
    (tmp_path / "demo/mine").mkdir(parents=True)  # what was there before stays
    with pytest.raises(ValueError, match=message):
        run("fit", *DEMO, *words, "--trainer.logger.init_args.version", "mine")
    assert os.listdir(tmp_path / "demo") == ["mine"]


@pytest.mark.parametrize("other", ["a batch", "another run", "a bug"])
def test_directory_of_a_run_that_has_begun_stays(run, tmp_path, monkeypatch, other):
    def step(module, *_):
        if other == "a batch":
            callback = attach_run_directory(module.trainer)
            callback.on_train_batch_end(module.trainer, module)
        elif other == "another run":
            monkeypatch.setattr("lightning_modules.run_directory.take_lock", Mock(side_effect=BlockingIOError))
        raise (RuntimeError if other == "a bug" else UserError)("refused")

    monkeypatch.setattr("lightning_modules.AdaptationModule.training_step", step)
    with pytest.raises((RuntimeError, UserError), match="refused"):
        run("fit", *DEMO)
    assert (tmp_path / "demo/version_0/config.yaml").is_file()


OWN = ("config.yaml", "hparams.yaml", f"events.out.tfevents.1.host.{os.getpid()}.0")


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize(
    "other", [None, "adapter", "checkpoints/last.ckpt", "events.out.tfevents.1.host.1.0", "sub/version_0/x"]
)
def test_only_a_refused_run_s_own_files_are_removed(tmp_path, monkeypatch, other, locks):
    trainer = token_trainer(tmp_path, logger=[TensorBoardLogger(tmp_path / "runs", "a", "mine")])
    callback = attach_run_directory(trainer)
    directory = callback.claim(trainer)
    names = {*OWN, other} - {None}
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    callback.discard(files=True)  # did not write config.yaml, as far as it knows
    assert directory.exists()
    callback.written.add(directory / "config.yaml")
    if not locks:
        monkeypatch.setattr("lightning_modules.run_directory.take_lock", Mock(return_value=None))
    callback.discard(files=True)
    assert {name for name in names if (directory / name).exists()} == (names if other or not locks else set())
    assert os.listdir(tmp_path) == (["runs"] if other or not locks else [])


@pytest.mark.parametrize("message", ["refused", "demo/mine holds another run"])
def test_run_that_finished_while_another_of_its_name_fetched_its_model_keeps_its_files(
    run, tmp_path, monkeypatch, no_training, message
):
    path = tmp_path / "demo/mine/adapter/adapter.json"

    def fetch(*_):
        path.parent.mkdir()
        path.touch()
        if message == "refused":
            raise UserError("refused")

    monkeypatch.setattr("lightning_modules.tasks.ImageClassification.fetch", fetch)
    with pytest.raises(UserError, match=message):
        run("fit", *DEMO, "--trainer.logger.init_args.version", "mine")
    assert path.exists()


def test_interrupted_fetch_leaves_no_directory(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.tasks.ImageClassification.fetch", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("fit", *DEMO)
    assert os.listdir(tmp_path) == []


def test_directories_that_another_run_created_stay(tmp_path, monkeypatch):
    (tmp_path / "other/runs/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    loggers = [TensorBoardLogger("runs", "a"), CSVLogger("more", "b"), CSVLogger("more", "c", "mine")]
    trainer = token_trainer(None, logger=loggers)
    attach_run_directory(trainer).claim(trainer)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_modules.run_directory.require_writable", lambda path, _: path.mkdir(parents=True))
        late = token_trainer(None, logger=[TensorBoardLogger("late", "a", "mine")])  # another run is a moment earlier
        attach_run_directory(late).claim(late)
    monkeypatch.chdir(tmp_path / "other")
    for each in (trainer, late):
        attach_run_directory(each).discard(files=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        *("late", "late/a", "late/a/mine"),
        *("other", "other/runs", "other/runs/a"),
    ]


def test_evaluation_in_other_processes_keeps_its_directory(run, trained, tmp_path):
    words = ("--model.adapter_path", str(run_directory(trained.trainer) / "adapter"), "--trainer.limit_val_batches", "1")
    run(
        "validate",
        *DEMO[:2],
        *words,
        "--trainer.strategy",
        "ddp_fork",
        "--trainer.devices",
        "1",
        "--trainer.accelerator",
        "cpu",
    )
    assert (tmp_path / "demo/version_0/config.yaml").is_file()


REFUSED = {
    "StochasticWeightAveraging": (["--trainer.callbacks.swa_lrs", "0.1"], "would average nothing; use .*EMAWeightAveraging"),
    "LearningRateFinder": ([], "experts, router and head have one each; find them with `compare --adapters config --tune 8`"),
    "BatchSizeFinder": ([], "after the steps of the schedule are counted; set data.init_args.batch_size"),
    "ModelPruning": (["--trainer.callbacks.pruning_fn", "l1_unstructured"], "before the model is built"),
    "BackboneFinetuning": ([], "model.adapter says what is trained"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_callback_that_cannot_work_is_refused_in_one_line(run, no_training, name):
    words, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"trainer.callbacks has {name}, which .*{reason}"):
        run("fit", *DEMO, f"--trainer.callbacks+={LIGHTNING}.{name}", *words)


def test_run_without_logger_or_checkpoints_has_a_directory_and_no_idle_callbacks(main, tmp_path, caplog):
    words = (*DEMO, "--trainer.default_root_dir", str(tmp_path))
    cli = main("fit", *words, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
    run = tmp_path / "lightning_logs/version_0"
    assert run_directory(cli.trainer) == run
    assert [name for name in ADAPTER if not (run / name).is_file()] == []
    assert not (run / "checkpoints").exists()
    trainer = token_trainer(tmp_path)
    assert attach_run_directory(trainer).claim(trainer, numbered=True) == tmp_path / "lightning_logs/version_1"
    assert os.listdir(tmp_path) == ["lightning_logs"]
    assert "left out, since the run has no logger or no checkpoints: ModelCheckpoint, LearningRateMonitor" in caplog.text
    names = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {"AdapterCheckpoint", "RouterLoad"} <= names
    assert not {"ModelCheckpoint", "LearningRateMonitor"} & names


def test_every_file_of_a_run_with_two_loggers_is_in_one_directory(main, tmp_path):
    loggers = [{"class_path": f"lightning.pytorch.loggers.{name}"} for name in ("CSVLogger", "TensorBoardLogger")]
    for logger in loggers:
        logger["init_args"] = {"save_dir": str(tmp_path), "name": "two"}
    (tmp_path / "loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    cli = main("fit", *DEMO, "--config", str(tmp_path / "loggers.yaml"))
    run = run_directory(cli.trainer)
    assert run == tmp_path / "two/version_0"
    assert [name for name in (*ADAPTER, "metrics.csv") if not (run / name).is_file()] == []
    assert list(run.glob("events.out.*"))
    assert list(run.glob("checkpoints/*.ckpt"))
    assert os.listdir(tmp_path / "two") == ["version_0"]


def test_test_in_a_run_s_directory_leaves_its_config_as_it_is(run, trained, tmp_path):
    source = run_directory(trained.trainer)
    shutil.copytree(source, tmp_path / "demo/version_0")
    before = (source / "config.yaml").read_bytes()
    words = ("--trainer.logger.init_args.version", "version_0", "--model.adapter_path", str(source / "adapter"))
    cli = run("test", *DEMO, *words)
    assert run_directory(cli.trainer) == tmp_path / "demo/version_0"
    assert (tmp_path / "demo/version_0/config.yaml").read_bytes() == before


def test_fast_dev_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = token_trainer(None, AdapterCheckpoint(), logger=True, fast_dev_run=True)
    trainer.fit(token_module(), TokenData())
    assert os.listdir(tmp_path) == []
