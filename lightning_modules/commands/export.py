"""`python train.py export`: a trained adapter as an adapter directory, as LoRAs, or merged into the whole model."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from fourier_moe import push_adapter, save_adapter
from fourier_moe.errors import UserError
from fourier_moe.files.format import TENSORS
from fourier_moe.files.hub import check_repo_id
from fourier_moe.files.writing import new_directory
from fourier_moe.serving.lora_export import ProjectionExport, export_loras
from fourier_moe.serving.merge import merge_adapters
from lightning_modules.adaptation import prompt_of, untrained
from lightning_modules.cli import AdaptationCLI
from lightning_modules.commands.command_line import CommandLine
from lightning_modules.interruption import find_checkpoint, require_new, require_writable
from lightning_modules.tables import markdown_table
from lightning_modules.tasks.building_code import building_code


def export(
    line: CommandLine,
    *,
    format: Literal["adapter", "lora", "merged"],
    ckpt_path: str | None = None,
    output: str | None = None,
    rank: PositiveInt | None = None,
    push: str | None = None,
) -> Path:
    """Write a trained adapter as an adapter directory, as LoRAs, or merged into the whole model.

    The adapter is that of `--model.adapter_path DIR` or of a training checkpoint. Further arguments are those of fit.

    Args:
        line: the config and the arguments of fit.
        format: `adapter`, its directory; `lora`, every expert as a LoRA that peft loads, exact unless `rank` is smaller;
            `merged`, for methods without routing, the whole model in its own library's format.
        ckpt_path: a training checkpoint, instead of `--model.adapter_path`.
        output: a new directory; `runs/export/<config's name>/<format>` by default.
        rank: for the format lora: largest rank of a LoRA, for servers with a limit; the table shows what that loses.
        push: for the format adapter: also put it on the Hugging Face hub, as owner/name.

    Returns:
        The directory written. `lora` also leaves its table in export.json.

    Raises:
        UserError: if there is nothing to export, or it has no such format.
    """
    if push and format != "adapter":
        raise UserError(f"--push takes --format adapter, not {format}")
    if rank and format != "lora":
        raise UserError(f"--rank takes --format lora, not {format}")
    if push:
        check_repo_id(push)
    directory = Path(output or f"runs/export/{line.name}/{format}")
    pushes_again = bool(push) and (directory / TENSORS).is_file()
    if not pushes_again:
        require_new(directory, "--output", "directory")
    require_writable(directory, "--output")
    if ckpt_path:
        ckpt_path = find_checkpoint(ckpt_path)
    alone = ("devices=1", "num_nodes=1", "strategy=auto")
    cli = AdaptationCLI([*line.words, *(f"--trainer.{word}" for word in alone)], run=False)
    if bool(ckpt_path) == bool(cli.model.adapter_path):
        if ckpt_path:
            raise UserError("--ckpt_path and --model.adapter_path are two sources; give one of them")
        raise untrained("export")
    cli.trainer.callbacks, cli.trainer.loggers = [], []  # type: ignore[attr-defined] # writes nothing of a run
    _load(cli, ckpt_path)

    if pushes_again:  # what was written before an earlier push failed
        _require_same_adapter(cli, directory)
    else:
        with new_directory(directory) as unfinished:  # an interrupted export leaves nothing behind
            if format == "lora":
                table, facts = _write_loras(cli, unfinished, rank)
            else:
                table, facts = (_write_adapter if format == "adapter" else _write_merged)(cli, unfinished)
            if facts:
                facts = {"format": format, "source": ckpt_path or cli.model.adapter_path, **facts}
                (unfinished / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        print(f"\n{table}\n\nWritten to {directory}")
    if push:
        print(f"On the hub: {push_adapter(directory, push)}")
    return directory


def _require_same_adapter(cli: AdaptationCLI, directory: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _write_adapter(cli, Path(folder))
        same = (Path(folder) / TENSORS).read_bytes() == (directory / TENSORS).read_bytes()
    if not same:
        raise UserError(f"--output {directory} holds another adapter; give a new directory, or remove it first")


def _load(cli: AdaptationCLI, ckpt_path: str | None) -> None:
    """Build the adapted model without reading data, and load a checkpoint into it."""
    model = cli.model
    model.trainer, cli.trainer.datamodule = cli.trainer, cli.datamodule  # type: ignore[attr-defined] # what fit would do
    if not ckpt_path:
        model.configure_model()
        return
    checkpoint = cli.trainer.strategy.checkpoint_io.load_checkpoint(ckpt_path, map_location="cpu", weights_only=True)
    model.class_names = checkpoint.get("adaptation", {}).get("class_names")
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=False)


def _write_adapter(cli: AdaptationCLI, directory: Path) -> tuple[str, dict[str, Any]]:
    model, stored = cli.model, cli.model._stored
    if stored is None:
        model.save_adapter(directory, {})
    else:
        code = building_code(model.task, model.num_classes, model.class_names)
        facts = {"class_names": stored.class_names, "metrics": stored.metrics, "task": stored.task}
        save_adapter(model.model, directory, **facts, code=code)
    return f"adapter directory, {_mebibytes(directory)}", {}


def _write_loras(cli: AdaptationCLI, directory: Path, rank: int | None) -> tuple[str, dict[str, Any]]:
    exports = export_loras(cli.model.model, directory, rank)
    return lora_table(exports), {"projections": [asdict(export) for export in exports]}


def _write_merged(cli: AdaptationCLI, directory: Path) -> tuple[str, dict[str, Any]]:
    merge_adapters(cli.model.model)
    stored = cli.model._stored.task if cli.model._stored else {}
    if template := stored.get("chat_template") or prompt_of(cli.datamodule).get("chat_template"):
        cli.model.task.tokenizer.chat_template = template  # of a language model
    cli.model.task.save_model(directory, cli.model.class_names)
    return f"merged model, {_mebibytes(directory)}", {}


def _mebibytes(directory: Path) -> str:
    return f"{sum(file.stat().st_size for file in directory.iterdir()) / 2**20:.2f} MiB"


def lora_table(exports: list[ProjectionExport]) -> str:
    """Return a table with a row per kind of projection: ranks, size of one expert's LoRAs, largest measured difference."""
    groups: dict[tuple[str, str], list[ProjectionExport]] = {}
    for export in exports:
        shape = f"{export.out_features} x {export.in_features}"
        groups.setdefault((export.name.rpartition(".")[2], shape), []).append(export)
    header = ["projection", "count", "out x in", "experts", "rank", "MiB per expert", "largest relative error"]
    rows = []
    for (name, shape), members in groups.items():
        ranks = [rank for member in members for rank in member.ranks]
        numbers = sum((member.out_features + member.in_features) * sum(member.ranks) for member in members)
        experts = len(members[0].ranks)
        size = 4 * numbers / experts / 2**20
        difference = max(difference for member in members for difference in member.differences)
        rows.append(
            [name, str(len(members)), shape, str(experts), f"{min(ranks)}-{max(ranks)}", f"{size:.2f}", f"{difference:.1e}"]
        )
    return markdown_table(header, rows)
