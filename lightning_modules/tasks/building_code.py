"""Python code for model cards that builds the model of an adapter."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from lightning_modules.tasks import Task


def building_code(task: Task, num_classes: int | None, class_names: Sequence[str] | None) -> str | None:
    """Return Python code that builds a task's pretrained model as `model`; None if the task has no `arguments`.

    Arguments with default values are left out, except for the first.
    """
    arguments = task.arguments()
    if arguments is None:
        return None
    kind = type(task)
    parameters = inspect.signature(kind).parameters
    changed = ", ".join(
        f"{name}={value!r}"
        for index, (name, value) in enumerate(arguments.items())
        if not index or value != parameters[name].default
    )
    lines = [f"from {kind.__module__} import {kind.__name__}", ""]
    if class_names:
        lines[:1] = ["from fourier_moe import describe_adapter", lines[0]]
        lines += ['class_names = describe_adapter(".").class_names']
    classes = "len(class_names), class_names" if class_names else repr(num_classes)
    return "\n".join([*lines, f"model = {kind.__name__}({changed}).build({classes})"])
