"""The model card: the README.md of an adapter directory, which the Hugging Face hub shows as the repository's page."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from torch import nn

from fourier_moe.files.format import AdapterDescription
from fourier_moe.models.backbone import backbone_name

# The last line of a card says what the rest was when it was written: a card that a user has edited is theirs.
_MARK = re.compile(rb"<!-- written by save_adapter, replaced with the adapter unless edited: ([0-9a-f]{64}) -->\n")


def model_card(description: AdapterDescription, code: str) -> str:
    """Return the front matter for the hub, how to use the adapter, and what is known of it.

    Args:
        code: Python that makes the pretrained model as `model`.
    """
    text = "\n".join([*_front_matter(description), "", *_body(description, code), ""])
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}<!-- written by save_adapter, replaced with the adapter unless edited: {checksum} -->\n"


def is_edited(path: Path) -> bool:
    """Return whether there is a card that `model_card` did not write as it stands."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    mark = _MARK.search(content)
    return mark is None or mark.end() != len(content) or hashlib.sha256(content[: mark.start()]).hexdigest().encode() != mark[1]


def loading_code(model: nn.Module) -> str:
    """Return Python code that loads a transformers model again by its name; of another model it can only say the name."""
    name, kind = backbone_name(model), type(model)
    if name is None or not kind.__module__.startswith("transformers."):
        return f"model = ...  # the pretrained model: {name or kind.__name__}"
    labels = f", num_labels={model.config.num_labels}" if kind.__name__.endswith("Classification") else ""  # type: ignore[union-attr]
    if kind.__name__.endswith("ForImageClassification"):  # most of their files have a head for ImageNet's classes
        labels += ", ignore_mismatched_sizes=True"
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    if getattr(vision, "vision_use_head", True) is False:  # SigLIP built without a pooling that its classifier does not read
        labels += ", vision_config={'vision_use_head': False}"
    return f"from transformers import {kind.__name__}\n\nmodel = {kind.__name__}.from_pretrained({name!r}{labels})"


def _front_matter(description: AdapterDescription) -> list[str]:
    """Return the front matter as YAML; every value is written as JSON, which YAML contains."""
    fields: dict[str, object] = {"library_name": "fourier_moe"}
    if description.backbone_revision is not None:  # else the name is none of the hub's
        fields["base_model"] = description.backbone
        fields["base_model_relation"] = "adapter"
    if description.task.get("pipeline_tag"):
        fields["pipeline_tag"] = description.task["pipeline_tag"]
    fields["tags"] = ["fourier_moe", type(description.config).__name__]
    metrics = sorted({name.rpartition("/")[2] for name in description.metrics} - {"loss", "total_loss", "balance_loss"})
    if metrics:
        fields["metrics"] = metrics
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"]


def _body(description: AdapterDescription, code: str) -> list[str]:
    method, task = type(description.config).__name__, description.task
    trained = ", ".join(f"{kind} {count:,}" for kind, count in description.trained_parameters.items() if count)
    revision = f" at revision {description.backbone_revision}" if description.backbone_revision else ""
    facts = {
        "backbone": f"{description.backbone}{revision}" if description.backbone else None,
        "method": method,
        "task": task.get("class"),
        "data": f"{task['data']} at revision {task['data_revision']}" if task.get("data_revision") else task.get("data"),
        "prompt": f"{task['prompt']}, by chat_template in adapter.json" if task.get("chat_template") else task.get("prompt"),
        "trained parameters": trained,
        "classes": str(len(description.class_names)) if description.class_names else None,
        "written by": f"fourier_moe {description.written_by}",
    }
    lines = [f"# {method} adapter" + (f" of {description.backbone}" if description.backbone else ""), ""]
    lines += ["```python", "from fourier_moe import load_adapter", *code.split("\n")]
    lines += ['load_adapter(model, ".")  # this directory, or hf://owner/name of this repository', "```", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items() if value)]
    if description.metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {_cell(name)} | {value:.4f} |" for name, value in description.metrics.items()]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
