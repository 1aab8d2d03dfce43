"""The instruction benchmarks as tasks of lm-evaluation-harness, with the prompts, the scoring and the rules of `test`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.instructions.benchmarks import COMMONSENSE, MATH, Benchmark
from datamodules.instructions.reading.records import Record, read_records
from datamodules.instructions.reading.source import LocalFiles, PinnedFiles
from datamodules.shared.user_cache import default_cache_directory
from fourier_moe.errors import UserError
from lightning_modules.commands.language.trained_model import TrainedModel

BENCHMARKS: dict[str, Benchmark] = {
    f"llm_adapters_{name.lower().replace('-', '_')}": benchmark for name, benchmark in {**COMMONSENSE, **MATH}.items()
}
_MEAN = {"aggregation": "mean", "higher_is_better": True}


def benchmark_task(name: str, trained: TrainedModel, directory: str | None) -> Any:
    """Return the test set of a benchmark as a task.

    Under `scoring: generate` the model writes answers; `acc` is the accuracy by the published rule, `strict_acc` by the strict
    one. Under `likelihood`, `acc` is the share of questions where the correct choice is the most probable one.

    Args:
        name: one of `BENCHMARKS`.
        trained: the model, whose run decides over prompt, scoring and length of answers.
        directory: local files; None fetches them.

    Raises:
        UserError: if the files are missing or malformed, or there are no choices to score.
    """
    from datasets import Dataset  # both are slow to import
    from lm_eval.api.task import ConfigurableTask

    benchmark, task = BENCHMARKS[name], trained.task
    if trained.style == "chat":
        raise UserError(f"--tasks {name} needs a prompt of its own, not the chat template; give --style llm_adapters or plain")
    files = PinnedFiles(default_cache_directory()) if directory is None else LocalFiles(Path(directory).expanduser())
    records = [vars(record) for record in read_records(files.get(benchmark.test_file), needs_answer=True) if record]
    style = trained.prompt_style

    def text(document: dict[str, str]) -> str:
        return style.evaluation(Record(**document)).text

    def choices(document: dict[str, str]) -> list[str]:
        return [style.response(benchmark.response(choice)) for choice in benchmark.choices(document["instruction"])]

    def target(document: dict[str, str]) -> int:
        return benchmark.choices(document["instruction"]).index(document["answer"])

    def graded(document: dict[str, str], outputs: list[str]) -> dict[str, float]:
        grade = benchmark.grade(outputs[0].strip(), document["answer"])
        return {"acc": float(grade.correct), "strict_acc": float(grade.strict_correct)}

    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(records)},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": text,
        "metadata": {"version": 1.0},
    }
    if task.scoring == "likelihood":
        if not benchmark.rule.choices:
            raise UserError(f"--tasks {name} has no choices, which the run's scoring=likelihood compares")
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": choices,
            "doc_to_target": target,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", **_MEAN}],
        }
    else:
        settings = task.evaluation
        config |= {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {
                "until": [],
                "max_gen_toks": settings.max_new_tokens,
                "num_beams": settings.num_beams,
                "do_sample": False,
                "repetition_penalty": 1.0,
            },
            "process_results": graded,
            "metric_list": [{"metric": metric, **_MEAN} for metric in ("acc", "strict_acc")],
        }
    return ConfigurableTask(config=config)
