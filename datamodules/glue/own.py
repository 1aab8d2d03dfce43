"""A user's own labelled sentences as one more task, described by the files themselves."""

from __future__ import annotations

from pathlib import Path

from datamodules.glue.files import tsv_name
from datamodules.glue.tasks import TRAIN, GlueTask, TsvLayout

OWN = "own"
_LABEL, _SENTENCES = "label", (("sentence1", "sentence2"), ("sentence",))


def own_task(directory: Path) -> GlueTask:
    """The task of a directory with train.tsv and dev.tsv, tab-separated, whose first lines name the columns.

    Needed are ``sentence``, or ``sentence1`` and ``sentence2``, and ``label``; further columns are passed over. The classes
    are what the label column of train.tsv holds, in alphabetical order.

    Raises:
        ValueError: train.tsv or a column is missing, or there are fewer than two classes.
    """
    path = directory / tsv_name(TRAIN)
    if not path.is_file():
        raise ValueError(f"dataset '{OWN}' needs train.tsv and dev.tsv in directory '{directory}'; train.tsv is not there")
    with path.open(encoding="utf-8-sig") as file:
        columns = tuple(file.readline().rstrip("\r\n").split("\t"))
        sentences = next((names for names in _SENTENCES if set(names) <= set(columns)), None)
        if sentences is None or _LABEL not in columns:
            raise ValueError(
                f"'{path}' has columns {', '.join(columns)}; its first line should name sentence, or sentence1 and sentence2, "
                f"and {_LABEL}, with tabs between"
            )
        place = columns.index(_LABEL)
        rows = (line.rstrip("\r\n").split("\t") for line in file if line.strip())
        labels = tuple(sorted({row[place] for row in rows if len(row) == len(columns)}))
    if len(labels) < 2:
        raise ValueError(f"'{path}' has {len(labels)} class(es) in column {_LABEL}; two or more are needed")
    layout = TsvLayout(columns=columns, test_columns=columns, sentences=sentences, label=_LABEL, labels=labels)
    return GlueTask(folder=directory.name, class_names=labels, sentences=sentences, tsv=layout)
