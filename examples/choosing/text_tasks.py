"""Draw the three text tasks of docs/evidence/language.md.

    python text_tasks.py MATH_DIRECTORY LLM_ADAPTERS_DIRECTORY TARGET [--train 240] [--test 120]

TARGET gets <task>.jsonl and <task>_test.jsonl, drawn at random, with question and answer. Choices are not shown, so that every
word of an answer has to be written:

- algebra: the rationale of a problem of AQuA's train file, in MATH_DIRECTORY; 37 of the 120 test questions are questions of the
  training with other numbers;
- advice: the right solution to a goal of PIQA, of its 1,838 validation questions;
- science: the right answer to a question of ARC-Easy's train file.

These are texts of the benchmarks, not their scores.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from drawing import count, draw, write_lines

QUESTION = re.compile(r"Please choose the correct \w+ to the question: (.*?)\n\n(.*)\n\nAnswer format: ", re.DOTALL)


def algebra(source: Path) -> Iterator[tuple[str, str]]:
    for line in (source / "flan_cot_aqua_train.tsv").read_text(encoding="utf-8").splitlines():
        question, _, rationale = line.replace("\\n", "\n").split("\t")
        yield question.split("\nOptions:")[0], rationale


def right_choices(file: Path) -> Iterator[tuple[str, str]]:
    """Yield each question and the text of its right choice, of a file in LLM-Adapters' format."""
    for row in json.loads(file.read_text(encoding="utf-8")):
        found = QUESTION.match(row["instruction"])
        if found is None:
            raise SystemExit(f"{file} has another form: {row['instruction']}")
        _, *texts = re.split(r"\s*\b(?:Answer|Solution)(\d): ", found[2])
        numbers, choices = texts[::2], texts[1::2]
        yield found[1].strip(), choices[numbers.index(row["answer"][-1])].strip()  # answer2, solution1


def main(math: Path, llm_adapters: Path, target: Path, train: int, test: int) -> None:
    tasks = {
        "algebra": algebra(math),
        "advice": right_choices(llm_adapters / "piqa" / "test.json"),
        "science": right_choices(llm_adapters / "ARC-Easy" / "train.json"),
    }
    drawn = {}
    for task, rows in tasks.items():
        pairs = list({question: answer for question, answer in rows if question and answer}.items())  # a question once
        drawn[task], drawn[f"{task}_test"] = draw(task, pairs, train, test)
    for name, part in drawn.items():
        lines = [json.dumps({"question": question, "answer": answer}, ensure_ascii=False) for question, answer in part]
        write_lines(target / f"{name}.jsonl", lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("math", type=Path)
    parser.add_argument("llm_adapters", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--train", type=count, default=240)
    parser.add_argument("--test", type=count, default=120)
    options = parser.parse_args()
    main(options.math, options.llm_adapters, options.target, options.train, options.test)
