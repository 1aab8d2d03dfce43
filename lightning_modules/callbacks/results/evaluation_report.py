"""EvaluationReport: the table of test, validate and predict, and the rows it was computed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from fourier_moe.errors import UserError
from fourier_moe.files.writing import replace_files
from fourier_moe.models.backbone import backbone_name
from lightning_modules.adaptation import AdaptationModule
from lightning_modules.callbacks.any_module import adaptation_module
from lightning_modules.callbacks.processes import of_all_processes
from lightning_modules.callbacks.results.evaluation_place import EvaluatedExamples, data_of, place, place_unfinished
from lightning_modules.callbacks.results.evaluation_table import average, format_results, score_rows
from lightning_modules.callbacks.results.sealed_rows import Row, user_key
from lightning_modules.callbacks.results.unfinished_evaluation import UnfinishedEvaluation, about, file_name
from lightning_modules.evaluation_sets import each_loader, limit_of, set_names
from lightning_modules.interruption.locks import locked
from lightning_modules.run_directory import run_directory
from lightning_modules.tasks import CausalLanguageModel
from lightning_modules.tasks.base import run_data
from lightning_modules.tasks.scores import not_shares

UNFINISHED = "unfinished_evaluation"


class EvaluationReport(L.Callback):
    """Print one table over all evaluated sets; write it as results.md and results.json, and rows as predictions/<set>.jsonl.

    An interrupted evaluation of a language model resumes when the same user repeats the command: outputs are written batch by
    batch, and loaded and graded again if weights, backbone, precision and task settings are the same. Damaged outputs, and
    those of another user, are ignored. Every example counts once, even if several processes saw it. With fast_dev_run nothing
    is written.

    Results replace only those of the same evaluation. Results of other data, settings or precision get another directory
    (`adapter_test_2`), and so do those of a part of the data (limit_test_batches): `adapter_test_partial`.

    Args:
        directory: null for a directory beside the evaluated weights: `RUN/adapter_test` for
            `test --model.adapter_path RUN/adapter`, `RUN/checkpoints/last_test` for `--ckpt_path RUN/checkpoints/last.ckpt`,
            otherwise `<run directory>/test`, which is new in every run, so nothing can be resumed from it.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self._partial: str | None = None  # the limit that left out a part of the data

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = adaptation_module(pl_module, self)
        self._sets: dict[str, list[Row]] = {name or _command(trainer): [] for name in set_names(_loaders(trainer))}
        self._finished: dict[str, dict[str, Row]] = {}
        self._output: Path | None = None
        self._writer: CausalLanguageModel | None = None
        self._examples = EvaluatedExamples()
        if _reports(trainer):
            self._partial = limit_of(trainer, _command(trainer), each_loader(_loaders(trainer)))
            self._output = self._directory(trainer, module)
            task = module.task
            if isinstance(task, CausalLanguageModel) and (_command(trainer) != "validate" or task.generate_in_validation):
                self._writer = task
                self._open(trainer, module, self._output, task)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Pass the finished rows of this batch to the task, if prompt and correct answer are still the same."""
        if self._writer is None:
            return
        finished = self._finished[list(self._sets)[dataloader_idx]]
        questions = zip(batch["id"], batch["prompt"], batch["answer"], strict=True)
        same = (id_ for id_, prompt, answer in questions if _asks(finished.get(id_), prompt, answer))
        self._writer.finished = {id_: finished[id_] for id_ in same}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        name = list(self._sets)[dataloader_idx]
        if self._output is not None:
            self._examples.add(name, outputs, batch)
        if self._writer is None:
            return
        rows = outputs if _command(trainer) == "predict" else outputs["rows"]
        self._sets[name] += rows
        self._unfinished.append(name, [row for row in rows if row["id"] not in self._writer.finished])
        self._writer.finished = {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Drop the rows: the module may get other weights."""
        if isinstance(pl_module, AdaptationModule) and isinstance(pl_module.task, CausalLanguageModel):
            pl_module.task.finished = {}

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._output is None:
            return
        rows, examples = _gather(trainer, self._sets), self._examples.digests(trainer)
        if trainer.is_global_zero:
            self._write(trainer, adaptation_module(pl_module, self), rows, examples)

    on_validation_start, on_predict_start = on_test_start, on_test_start
    on_validation_batch_start, on_predict_batch_start = on_test_batch_start, on_test_batch_start
    on_validation_batch_end, on_predict_batch_end = on_test_batch_end, on_test_batch_end
    on_validation_end, on_predict_end = on_test_end, on_test_end

    def _open(self, trainer: L.Trainer, module: AdaptationModule, output: Path, task: CausalLanguageModel) -> None:
        """Find the rows that an interrupted evaluation left in the directory; all processes get the same.

        Raises:
            UserError: if the directory cannot be written.
        """
        key = trainer.strategy.broadcast(user_key() if trainer.is_global_zero else b"")
        description = about(trainer, module, task.settings())
        self._unfinished = UnfinishedEvaluation(output / UNFINISHED, trainer.global_rank, description, key)
        opened, problem = None, None
        if trainer.is_global_zero:
            try:
                opened = self._unfinished.open(self._sets)
            except OSError as error:
                problem = _not_writable(output, error)
        opened, problem = trainer.strategy.broadcast((opened, problem))
        if problem:
            raise UserError(problem)
        assert opened is not None
        self._finished, note = opened
        if note:
            rank_zero_info(note)
        for (name, rows), loader in zip(self._finished.items(), each_loader(_loaders(trainer)), strict=True):
            if rows:
                rank_zero_info(f"resuming {name}: {len(rows):,} of {len(loader.dataset):,} done")

    def _directory(self, trainer: L.Trainer, module: AdaptationModule) -> Path:
        command = _command(trainer)
        beside = trainer.ckpt_path or module.adapter_path
        if self.directory:
            path = Path(self.directory)
        elif beside and "://" not in str(beside):
            path = Path(beside)
            path = path.with_name(f"{path.name.removesuffix('.ckpt')}_{command}")
        else:
            path = run_directory(trainer) / command
        if self._partial:
            path = path.with_name(f"{path.name}_partial")
        return Path(trainer.strategy.broadcast(str(place_unfinished(path, f"{UNFINISHED}/about.json", data_of(trainer)))))

    def _write(
        self, trainer: L.Trainer, module: AdaptationModule, rows: dict[str, list[Row]], examples: dict[str, str]
    ) -> None:
        """Print and write the table; unfinished rows are deleted last, so that nothing is lost if this fails.

        Raises:
            UserError: if the directory cannot be written.
        """
        assert self._output is not None
        results = self._results(trainer, module, rows)
        if not results:
            return
        weights = trainer.ckpt_path or module.adapter_path
        title = f"{_command(trainer)} of {backbone_name(module.model)}" + (f" with {weights}" if weights else "")
        settings = self._writer.settings() if self._writer else {}
        if settings:
            title += f"; scoring {settings['scoring']}"
        if settings.get("scoring") == "generate":
            title += ", num_beams {num_beams}, at most {max_new_tokens} tokens".format(**settings["evaluation"])
        if self._partial:
            title += f"; on a part of the data ({self._partial})"
        text = f"{title}\n\n{format_results(results, not_shares(module.task.new_metrics()))}\n"
        rank_zero_info(f"\n{text}")
        record = {
            "command": _command(trainer),
            "backbone": backbone_name(module.model),
            "weights": str(weights) if weights else None,
            "precision": str(trainer.precision),
            "settings": settings,
            "data": data_of(trainer),
            "examples": examples,
            "partial": self._partial,
            "sets": results,
            "average": average(results),
        }
        files = {"results.md": text, "results.json": json.dumps(record, indent=2, ensure_ascii=False)}
        for name, rows_in_set in rows.items():
            lines = "".join(json.dumps({"id": row["id"], "set": name} | row, ensure_ascii=False) + "\n" for row in rows_in_set)
            files |= {f"predictions/{file_name(name)}.jsonl": lines} if rows_in_set else {}
        output = self._output
        try:
            with locked(output):
                output = place(output, record, named=bool(self.directory))
                replace_files(output, {name: [content.encode()] for name, content in files.items()})
        except OSError as error:
            raise UserError(_not_writable(output, error)) from error
        if self._writer is not None:
            self._unfinished.remove()
        other = f"; {self._output} holds the results of another evaluation" if output != self._output else ""
        rank_zero_info(f"Written to {output}{other}")

    def _results(self, trainer: L.Trainer, module: AdaptationModule, rows: dict[str, list[Row]]) -> dict[str, dict[str, Any]]:
        """Return count, metrics and note of every set; none for a classifier's predictions, which PredictionsWriter writes."""
        sets = {"test": module.test_sets, "validate": module.val_sets}.get(_command(trainer))
        scored: dict[str, tuple[int, dict[str, float]]] = {}
        if self._writer is not None:
            scored = {name: (len(own), score_rows(own)) for name, own in rows.items() if own}
        elif sets is not None:
            scored = {name: (result.count, result.values) for name, result in zip(rows, sets.results, strict=True)}
        notes = run_data(trainer).evaluation_notes
        return {name: {"count": count, **values, "note": notes.get(name, "")} for name, (count, values) in scored.items()}


def _command(trainer: L.Trainer) -> str:
    assert trainer.state.fn is not None
    return trainer.state.fn.value


def _reports(trainer: L.Trainer) -> bool:
    return _command(trainer) != "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]


def _loaders(trainer: L.Trainer) -> Any:
    return {
        "test": trainer.test_dataloaders,
        "validate": trainer.val_dataloaders,
        "fit": trainer.val_dataloaders,
        "predict": trainer.predict_dataloaders,
    }[_command(trainer)]


def _not_writable(directory: Path, error: OSError) -> str:
    return f"directory={str(directory)!r} cannot be written ({error.strerror or error}); set another one in EvaluationReport"


def _asks(row: Row | None, prompt: str, answer: str) -> bool:
    return row is not None and (row["prompt"], row["answer"]) == (prompt, answer)


def _gather(trainer: L.Trainer, own: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the rows of all processes in the order of the data, each example once."""
    shares = of_all_processes(trainer, own)
    gathered: dict[str, list[Row]] = {}
    for name in own:
        # Processes take examples in turn, so the first of every process come first.
        turns = [(turn, rank, row) for rank, share in enumerate(shares) for turn, row in enumerate(share[name])]
        rows = (row for *_, row in sorted(turns, key=lambda item: item[:2]))
        gathered[name] = list({row["id"]: row for row in rows}.values())
    return gathered
