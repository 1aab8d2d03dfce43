"""Find the checkpoint that a command names, and check that a run may write beside existing ones."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from fourier_moe.errors import UserError
from lightning_modules.interruption.checkpoints import is_intact, newest_intact, position, positions, read_checkpoint


def find_checkpoint(name: str, *others: Path, to_resume: bool = False) -> str:
    """Return the path of a checkpoint file as it is; for a directory, the newest intact checkpoint in or below it.

    Args:
        name: path of a file or a directory, or an address with `://`.
        others: further directories of the same run.
        to_resume: whether training resumes from it, which needs more than weights.

    Raises:
        UserError: if there is none, or if the directory has checkpoints of several runs.
    """
    path = Path(name)
    if "://" in name:
        return name
    if path.is_file():
        place = position(path)
        if to_resume and place is not None and not place.whole:
            raise UserError(
                f"ckpt_path={name!r} has weights only (save_weights_only), and training cannot resume without the optimizer "
                "state; give a whole checkpoint"
            )
        return name
    if not path.exists():
        near = ", ".join(sorted(str(file) for file in path.parent.glob("*.ckpt"))) or "none"
        raise UserError(f"ckpt_path={name!r} does not exist; checkpoints in its directory: {near}")
    _require_one_run(path)
    newest, problems = newest_intact(path, *others, to_resume=to_resume)
    for problem in problems:
        rank_zero_warn(f"skipped a damaged checkpoint: {problem}")
    if newest is None:
        whole = "whole " if to_resume else ""
        raise UserError(f"ckpt_path={name!r} has no intact checkpoint; it needs a {whole}.ckpt file in or below it")
    rank_zero_info(f"newest intact checkpoint of {path}: {newest}")
    return str(newest)


def require_own_checkpoint(path: str, max_epochs: int | None) -> None:
    """Refuse a checkpoint file of another program, or one that is beyond the end of the run, before anything is loaded.

    Args:
        path: a file, of which the weights are not read, or an address with `://`, which is not checked.
        max_epochs: epochs of the run that resumes; None or -1 if they are not limited.

    Raises:
        UserError: naming the file.
    """
    if "://" in path:
        return
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # torch and pickle raise errors of any kind for files that are no checkpoints
        content = read_checkpoint(path)  # says what is wrong
    if not isinstance(content, dict) or "adaptation" not in content:
        raise UserError(
            f"ckpt_path={path!r} was not written by this trainer; an adapter directory is given with --model.adapter_path"
        )
    epochs = content.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {}).get("processed", 0)
    if max_epochs not in (None, -1) and epochs > max_epochs:
        raise UserError(f"ckpt_path={path!r} has trained {epochs} epochs, more than trainer.max_epochs={max_epochs}")


def checkpoint_directories(trainer: L.Trainer) -> list[Path]:
    """Return the directories that the run's ModelCheckpoints will write to, before Lightning has set them up."""
    base = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    own = [Path(callback.dirpath) if callback.dirpath else base for callback in callbacks]
    return [directory for directory in dict.fromkeys(own) if "://" not in str(directory)]


def last_checkpoint(trainer: L.Trainer, to_resume: bool = False) -> str | None:
    """Resolve `--ckpt_path last`: the newest intact checkpoint in the run's own directories; None if there is none."""
    searched = checkpoint_directories(trainer)
    if trainer.log_dir:
        searched.insert(0, Path(trainer.log_dir))
    found = [directory for directory in searched if any(directory.rglob("*.ckpt"))]
    return find_checkpoint(str(found[0]), *found[1:], to_resume=to_resume) if found else None


def require_nothing_ahead(directories: list[Path], ckpt_path: str | None) -> None:
    """Refuse to write beside checkpoints of later steps, which would be taken for the newest of this run.

    Args:
        directories: where the run will write checkpoints.
        ckpt_path: the checkpoint that it resumes from; None if it starts from scratch.

    Raises:
        UserError: naming the later checkpoint.
    """
    start = position(Path(ckpt_path)) if ckpt_path and Path(ckpt_path).is_file() and is_intact(Path(ckpt_path)) else None
    if ckpt_path and start is None:
        return  # loading it raises the error
    step = start.step if start else 0
    newest, _ = newest_intact(*directories)
    place = position(newest) if newest else None
    if newest is not None and place is not None and place.step > step:
        start_of_run = f"resumes from step {step} ({ckpt_path})" if ckpt_path else "starts from scratch"
        raise UserError(
            f"{newest} is of step {place.step}, and this run, which {start_of_run}, would write beside it. Resume from "
            f"the newest with --ckpt_path {newest.parent}, give another --trainer.logger.init_args.version, or move the "
            "checkpoints away"
        )


def _require_one_run(directory: Path) -> None:
    """Refuse checkpoints of several runs. A run is a directory with `config.yaml`; files outside of one count as one run."""
    steps: dict[Path, int] = {}
    for path, place in positions(directory).items():
        parents = path.relative_to(directory).parents
        owners = (directory / parent for parent in parents if (directory / parent / "config.yaml").is_file())
        run = next(owners, directory)
        steps[run] = max(steps.get(run, 0), place.step if place else 0)
    if len(steps) > 1:
        found = ", ".join(f"{run} (step {step})" for run, step in sorted(steps.items()))
        raise UserError(f"ckpt_path={str(directory)!r} has checkpoints of {len(steps)} runs; choose one of them: {found}")
