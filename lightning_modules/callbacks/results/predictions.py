"""PredictionsWriter: the CSV file of `predict`."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from fourier_moe.errors import UserError
from fourier_moe.files.writing import replacing
from lightning_modules.adaptation import AdaptationModule
from lightning_modules.callbacks.any_module import adaptation_module
from lightning_modules.callbacks.processes import of_all_processes
from lightning_modules.callbacks.results.sealed_rows import user_key
from lightning_modules.callbacks.results.unfinished_evaluation import about
from lightning_modules.callbacks.results.unfinished_predictions import UnfinishedPredictions, describe_data, fingerprint
from lightning_modules.evaluation_sets import each_loader, limit_of, num_own
from lightning_modules.run_directory import run_directory
from lightning_modules.tables import csv_line
from lightning_modules.tasks import CausalLanguageModel
from lightning_modules.tasks.generation import is_sharded

UNFINISHED = "unfinished_predictions"


class PredictionsWriter(L.Callback):
    """Write one CSV row per example: the task's `prediction_columns`.

    A classifier has id, text (of sentences), label (if known), prediction, its probability, and the probability of every
    class. Other rows are written as they are, unless `prediction_columns` chooses.

    Rows are written batch by batch to a directory `unfinished_predictions` and become the CSV file at the end; memory holds one
    batch. An interrupted prediction resumes when the same user repeats the command: batches are not computed again if weights,
    backbone, precision, batch size, number of processes and inputs are the same. The directory lies beside the file that
    `path` names, otherwise beside the adapter or checkpoint. Without either it lies in the run directory, which is new in every
    run, so nothing can be resumed. With limit_predict_batches the file is called `..._partial.csv`; with fast_dev_run
    nothing is written.

    Cells are made safe to open: control characters are escaped, and text that a spreadsheet would take for a formula gets an
    apostrophe in front.

    Args:
        path: the file; null for `predictions.csv` in the run directory.

    Raises:
        UserError: when prediction starts, if the task is a language model's, if another process is making the same predictions,
            or if rows cannot be written.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = adaptation_module(pl_module, self)
        if isinstance(module.task, CausalLanguageModel):
            raise UserError(
                "PredictionsWriter writes probabilities of classes, and a language model has none; use EvaluationReport"
            )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._rows = self._open(trainer, module)
        self._seen = 0
        self._known = min(of_all_processes(trainer, len(self._rows)))
        self._rows.keep(self._known)
        if self._known:
            rank_zero_info(f"resuming predictions: {self._known:,} batches of every process are done")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Skip a batch whose rows are on disk; if the model is sharded, all processes skip it or none does."""
        module = adaptation_module(pl_module, self)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._inputs = fingerprint(batch)
        skips = self._seen < self._known and self._rows.inputs(self._seen) == self._inputs
        if self._seen < self._known and is_sharded(module.model):
            skips = trainer.strategy.reduce_boolean_decision(skips, all=True)
        if not skips and self._seen < self._known:  # the data changed
            self._rows.keep(self._seen)
            self._known = self._seen
        module.skips_prediction = skips

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        module = adaptation_module(pl_module, self)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not module.skips_prediction:
            loader = each_loader(trainer.predict_dataloaders)[dataloader_idx]
            own = outputs[: num_own(loader, batch_idx, len(outputs))]
            try:
                self._rows.append(dataloader_idx, self._inputs, _lines(own, module))
            except OSError as error:
                raise UserError(
                    f"predictions cannot be written ({error.strerror}); free some space and repeat the command"
                ) from error
        self._seen += 1
        module.skips_prediction = False

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write one file of all batches, in the order of the data."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(self.path) if self.path else run_directory(trainer) / "predictions.csv"  # a collective call
        if limit_of(trainer, "predict", each_loader(trainer.predict_dataloaders)):
            path = path.with_name(f"{path.stem}_partial{path.suffix}")  # does not replace complete predictions
        self._rows.keep(self._seen)
        lines = self._all_lines(trainer)
        first = next(lines, None)
        if first is not None:
            count, problem = 0, None
            if trainer.is_global_zero:
                try:
                    count = _write(path, first, lines)
                except OSError as error:
                    problem = f"predictions cannot be written to '{path}' ({error.strerror})"
            for _ in lines:  # other processes only pass on their lines
                pass
            problem = trainer.strategy.broadcast(problem)  # otherwise the others would wait for the one that failed
            if problem is not None:
                raise UserError(problem)
            rank_zero_info(f"Predictions written: {path} ({count} rows)")
        trainer.strategy.barrier()
        self._rows.remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, AdaptationModule):
            pl_module.skips_prediction = False
        if hasattr(self, "_rows"):
            self._rows.close()

    def _open(self, trainer: L.Trainer, module: AdaptationModule) -> UnfinishedPredictions:
        """Open the rows that this process has on disk. The name of their file depends on all that they depend on."""
        description = json.dumps(
            {**about(trainer, module, {}), "data": describe_data(trainer), "rows": "with a header"}, sort_keys=True
        )
        key, description = trainer.strategy.broadcast((user_key() if trainer.is_global_zero else b"", description))
        name = hmac.new(key, description.encode(), "sha256").hexdigest()[:16]
        rows, problem = None, None
        directory = self._directory(trainer, module)
        try:
            rows = UnfinishedPredictions(directory / UNFINISHED / f"{name}.{trainer.global_rank}.jsonl", key, description)
        except OSError as error:
            problem = f"'{directory}' cannot be written ({error.strerror}); give PredictionsWriter another path"
        except ValueError as error:
            problem = str(error)
        problems = [found for found in of_all_processes(trainer, problem) if found]
        if problems or rows is None:
            if rows is not None:
                rows.close()
            raise UserError(problems[0])
        return rows

    def _directory(self, trainer: L.Trainer, module: AdaptationModule) -> Path:
        """Return the directory where a repeated command finds the rows of an interrupted one, else the run directory."""
        own = run_directory(trainer)  # a collective call
        if self.path:
            return Path(self.path).parent
        weights = trainer.ckpt_path or module.adapter_path
        if weights and "://" not in str(weights) and os.access(Path(weights).parent, os.W_OK):
            return Path(weights).parent
        return own

    def _all_lines(self, trainer: L.Trainer) -> Iterator[str]:
        """Yield the header, then the lines of all processes, set by set in the data's order: processes take examples in turn.

        All processes must read it to its end.
        """
        header: str | None = None
        for index in range(len(each_loader(trainer.predict_dataloaders))):
            batches = self._rows.batches_of(index)
            rounds = max(of_all_processes(trainer, self._rows.count(index)))
            for _ in range(rounds):
                shares = of_all_processes(trainer, next(batches, []))
                for own_header, *_ in filter(None, shares):
                    if header is None:
                        yield own_header
                    elif own_header != header:
                        raise UserError(f"predictions have the columns {header.strip()} and also {own_header.strip()}")
                    header = own_header
                yield from (line for turn in zip_longest(*(share[1:] for share in shares)) for line in turn if line is not None)


def _write(path: Path, header: str, lines: Iterator[str]) -> int:
    """Write a file of lines; return the number of lines below the header."""
    count = 0
    with replacing(path) as file:
        file.write(header.encode())
        for line in lines:
            file.write(line.encode())
            count += 1
    return count


def _lines(rows: Sequence[Mapping[str, Any]], module: AdaptationModule) -> list[str]:
    """Return the names of the columns and the rows as lines; nothing without rows."""
    cells = [_cells(row, module) for row in rows]
    return [csv_line(list(cells[0])), *(csv_line(list(row.values())) for row in cells)] if cells else []


def _cells(row: Mapping[str, Any], module: AdaptationModule) -> Mapping[str, Any]:
    """Return a row by column."""
    if (columns := module.task.prediction_columns) is not None:
        if missing := [column for column in columns if column not in row]:
            raise UserError(
                f"{type(module.task).__name__}.prediction_columns names {', '.join(missing)}, but its predictions have "
                f"{', '.join(row)}"
            )
        return {column: row[column] for column in columns}
    if "probabilities" not in row:
        return row
    probabilities = row["probabilities"]
    names = module.class_names or [str(index) for index in range(len(probabilities))]
    best = max(range(len(names)), key=probabilities.__getitem__)
    label = "" if row.get("label") is None else names[row["label"]]
    inputs = {name: row[name] for name in ("id", "text") if name in row}
    result = {"label": label, "prediction": names[best], "probability": f"{probabilities[best]:.6g}"}
    return {**inputs, **result, **{f"p({name})": f"{p:.6g}" for name, p in zip(names, probabilities, strict=True)}}
