"""`python train.py evaluate`: a trained language model on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import difflib
import fnmatch
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from fourier_moe.errors import UserError, shorten
from lightning_modules.commands.language.benchmark_tasks import BENCHMARKS, benchmark_task
from lightning_modules.commands.language.trained_model import Dtype, Style, TrainedModel, load_trained
from lightning_modules.interruption import require_new, require_writable


def evaluate(
    *,
    adapter: str,
    tasks: str | list[str],
    limit: PositiveInt | None = None,
    num_fewshot: NonNegativeInt | None = None,
    batch_size: PositiveInt = 8,
    directory: str | None = None,
    include_path: str | None = None,
    output: str | None = None,
    style: Style | None = None,
    model: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    without_adapter: bool = False,
) -> dict[str, Any]:
    """Measure a trained language model on tasks of lm-evaluation-harness.

    `llm_adapters_boolq`, `llm_adapters_arc_easy`, ... are the test sets of this package, with the prompt, the scoring and the
    rules of `test`, and so with its accuracies. All other tasks bring their own prompts.

    Args:
        adapter: a run's directory, an adapter's, or `hf://owner/name[@revision]`.
        tasks: names of tasks, groups or tags, separated by commas, perhaps with wildcards: `boolq,arc_easy,mmlu_*`.
        limit: number of questions of each task, the first ones; by default all.
        num_fewshot: solved examples before each question; by default the task's own number. The `llm_adapters_...` tasks have
            none, as in `test`.
        batch_size: questions answered at once.
        directory: local files of the `llm_adapters_...` tasks, as in `--data.directory`; by default they are fetched.
        include_path: a directory with tasks of your own, in lm-evaluation-harness's YAML.
        output: a new file for all results; by default `lm_eval_<k>.json` in the run's directory.
        style: prompt of the `llm_adapters_...` tasks; by default that of the training.
        model: name or directory of the base model, if it is not where the run's config says.
        dtype: of the base model's weights; by default the run's.
        device: cpu, cuda, ...; by default a GPU where there is one.
        without_adapter: measure the base model alone.

    Returns:
        The results of lm-evaluation-harness.

    Raises:
        UserError: if it is not installed, a task is unknown, its data cannot be loaded or it has no solved examples, or the
            adapter is missing or not a language model's.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table
    except ModuleNotFoundError as error:
        raise UserError(f"evaluate needs lm-evaluation-harness ({error}): pip install 'lm-eval[hf]>=0.4.13'") from error
    if output is not None:
        require_new(output, "--output", "file")
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    manager = TaskManager(include_path=include_path, include_defaults=not BENCHMARKS.keys() >= set(names))  # thousands of files
    names = known_tasks(names, manager)
    if num_fewshot and (fixed := [name for name in names if name in BENCHMARKS]):
        raise UserError(f"--num_fewshot {num_fewshot} has no effect on {', '.join(fixed)}, as in `test`; leave it out")
    trained = load_trained(adapter, model=model, dtype=dtype, device=device, style=style, without_adapter=without_adapter)
    with _errors_only("lm_eval"):  # it warns of a model and of data that are in memory, as these are
        harness_model = _language_model(trained, batch_size)
        own = {name: benchmark_task(name, trained, directory) for name in names if name in BENCHMARKS}
    path = Path(output) if output is not None else _free(trained.run or Path("runs/evaluate", Path(adapter).name))
    require_writable(path.parent, "--output")
    results = lm_eval.simple_evaluate(
        model=harness_model,
        tasks=[*own.values(), *_load([name for name in names if name not in own], manager)],
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    assert results is not None  # of the only process
    path.parent.mkdir(parents=True, exist_ok=True)
    results["adapter"], results["prompt"] = None if without_adapter else adapter, trained.style
    path.write_text(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n", encoding="utf-8")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    print(f"Written to {path}")
    return dict(results)


def known_tasks(names: Sequence[str], manager: Any) -> list[str]:
    """Return what names stand for, of tasks, groups and tags, and wildcards, of tasks.

    Raises:
        UserError: for a name that stands for none, with similar ones.
    """
    everything = [*BENCHMARKS, *manager.all_tasks]
    found: dict[str, None] = {}
    for name in filter(None, names):
        matches = [name] if name in everything else fnmatch.filter([*BENCHMARKS, *manager.all_subtasks], name)
        if not matches:
            near = difflib.get_close_matches(name, everything, n=5, cutoff=0.6)
            advice = f"did you mean {', '.join(near)}?" if near else f"there are {len(everything):,}: {shorten(everything, 20)}"
            raise UserError(f"--tasks {name} is no task of lm-evaluation-harness; {advice}")
        found |= dict.fromkeys(matches)
    if not found:
        raise UserError("--tasks is empty; give names such as boolq,arc_easy")
    return list(found)


def _load(names: Sequence[str], manager: Any) -> list[Any]:
    """Return tasks and groups of the harness with their data."""
    loaded: list[Any] = []
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # of datasets and the hub, of many kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"--tasks {name}: its data cannot be loaded ({reason})") from error
        group = found.get("groups", {}).get(name)
        loaded += [group] if group is not None else found["tasks"].values()
    try:
        manager.load(loaded)
    except ValueError as error:  # a task that is also in a group
        raise UserError(f"--tasks {','.join(names)}: {error}") from error
    return loaded


def _language_model(trained: TrainedModel, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    tokenizer = trained.task.tokenizer
    ends = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # a tokenizer that would end every prompt
    return HFLM(
        pretrained=trained.task.model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False if ends else None
    )


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _free(directory: Path) -> Path:
    """Return the first `lm_eval_<k>.json` that does not exist."""
    return next(path for number in count() if not (path := directory / f"lm_eval_{number}.json").exists())
