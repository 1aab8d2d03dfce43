"""Instruction data for tests: records, files in LLM-Adapters' layout, a small DataModule, a module that remembers batches."""

import json
from collections import Counter

from datamodules import CommonsenseDataModule
from support.recorder import Recorder


def record(question, answer="true", output=None):
    return {"instruction": question, "input": "", "output": output or f"the correct answer is {answer}", "answer": answer}


def questions(prefix, count, answer="true"):
    return [record(f"{prefix} {number}?", answer) for number in range(count)]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def module(directory=None, kind=CommonsenseDataModule, **arguments):
    given = {"train": "boolq", "test": ["boolq"], "tokenizer": "bytes", "num_workers": 0, "batch_size": 4, "validation_size": 0}
    given |= {"max_length": 400, "prompt": "plain"}
    return kind(directory=None if directory is None else str(directory), **(given | arguments))


def fitted(directory, **arguments):
    data = module(directory, **arguments)
    data.setup("fit")
    return data


def seen(data):
    return [id_ for batch in data.train_dataloader() for id_ in batch["id"]]


class InstructionRecorder(Recorder):
    def __init__(self):
        super().__init__("input_ids")
        self.validated, self.tested = Counter(), {}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated[dataloader_idx] += len(batch["id"])

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        graded = [rule.grade(answer, answer).correct for rule, answer in zip(batch["benchmark"], batch["answer"], strict=True)]
        self.tested.setdefault(dataloader_idx, []).extend(graded)


def write_own(path, count, **fields):
    """Alpaca's records: no `answer`, one object a line, whatever the file is called."""
    records = [{"instruction": f"{path.stem} {number}?", "output": f"It is {number}.", **fields} for number in range(count)]
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)
