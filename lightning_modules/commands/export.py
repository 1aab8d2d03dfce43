"""`python train.py export`: a trained adapter as an adapter directory, as LoRAs, or merged into the whole model."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fourier_moe import push_adapter, save_adapter
from fourier_moe.errors import UserError
from fourier_moe.files.format import TENSORS
from fourier_moe.files.hub import check_repo_id
from fourier_moe.files.writing import new_directory
from fourier_moe.serving.lora_export import ProjectionExport, export_loras
from lightning_modules.adaptation import untrained
from lightning_modules.cli import AdaptationCLI
from lightning_modules.commands.static_merge import MergeReport, merge
from lightning_modules.interruption import find_checkpoint, require_writable
from lightning_modules.tables import markdown_table
from lightning_modules.tasks.building_code import building_code

FORMATS = ("adapter", "lora", "merged")

# Options of a single format.
_ONLY_OF = {"push": "adapter", **dict.fromkeys(("split", "task", "max_difference", "max_drop", "force"), "merged")}


def export(args: list[str]) -> Path:
    """Write the adapter of a run in another format; prints a table and leaves it in export.json.

    Returns:
        The directory written.

    Raises:
        SystemExit: with status 2 for a wrong command line.
        UserError: if there is nothing to export, it has no such format, or a merge changes the model too much.
    """
    parser = argparse.ArgumentParser(
        prog="train.py export",
        description="Write a trained adapter (--model.adapter_path DIR or --ckpt_path FILE) as: `adapter`, its directory; "
        "`lora`, every expert as an exact LoRA that peft loads; `merged`, the whole model in its own library's format, with "
        "routing frozen to its mean gates, an approximation whose difference is measured. Further arguments are handed to fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, help="as for fit; repeat for overlays")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--ckpt_path", help="a training checkpoint, instead of --model.adapter_path")
    parser.add_argument("--output", help="a new directory (default runs/export/<config's name>/<format>)")
    parser.add_argument("--push", help="format adapter: also put it on the Hugging Face hub, as owner/name")
    merged = parser.add_argument_group("merged")
    merged.add_argument("--split", choices=("val", "test"), default="val", help="where gates and difference are measured")
    merged.add_argument("--task", help="one of the data's tasks, whose mean gates are taken; all examples otherwise")
    merged.add_argument(
        "--max_difference", type=float, default=0.1, help="largest relative rms difference of the logits (default 0.1)"
    )
    merged.add_argument(
        "--max_drop", type=float, default=1.0, help="largest loss of the main metric, in points of 100 (default 1)"
    )
    merged.add_argument("--force", action="store_true", help="write the merged model whatever the difference")
    options, fit_args = parser.parse_known_args(args)

    for name, of in _ONLY_OF.items():
        if options.format != of and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name} takes --format {of}, not {options.format}")
    if options.push:
        check_repo_id(options.push)
    output = Path(options.output or f"runs/export/{Path(options.config[0]).stem}/{options.format}")
    pushes_again = bool(options.push) and (output / TENSORS).is_file()
    if output.exists() and not pushes_again:
        raise UserError(f"--output {output} exists; give a new directory, or remove it first")
    require_writable(output, "--output")
    if options.ckpt_path:
        options.ckpt_path = find_checkpoint(options.ckpt_path)
    configs = [word for path in options.config for word in ("--config", path)]
    alone = ("devices=1", "num_nodes=1", "strategy=auto", "inference_mode=false")
    cli = AdaptationCLI([*configs, *fit_args, *(f"--trainer.{word}" for word in alone)], run=False)
    if bool(options.ckpt_path) == bool(cli.model.adapter_path):
        if options.ckpt_path:
            raise UserError("--ckpt_path and --model.adapter_path are two sources; give one of them")
        raise untrained("export")
    cli.trainer.callbacks, cli.trainer.loggers = [], []  # type: ignore[attr-defined] # nothing of a run is to be written

    if pushes_again:  # what was written before an earlier push failed
        _require_same_adapter(cli, options, output)
        print(f"On the hub: {push_adapter(output, options.push)}")
        return output

    write = {"adapter": _write_adapter, "lora": _write_loras, "merged": _write_merged}[options.format]
    with new_directory(output) as partial:  # what is interrupted leaves no half of an export
        table, facts = write(cli, options, partial)
        if facts:
            facts = {"format": options.format, "source": options.ckpt_path or cli.model.adapter_path, **facts}
            (partial / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table}\n\nWritten to {output}")
    if options.push:
        print(f"On the hub: {push_adapter(output, options.push)}")
    return output


def _require_same_adapter(cli: AdaptationCLI, options: Any, output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _write_adapter(cli, options, Path(folder))
        same = (Path(folder) / TENSORS).read_bytes() == (output / TENSORS).read_bytes()
    if not same:
        raise UserError(f"--output {output} holds another adapter; give a new directory, or remove it first")


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


def _write_adapter(cli: AdaptationCLI, options: Any, directory: Path) -> tuple[str, dict[str, Any]]:
    _load(cli, options.ckpt_path)
    model, stored = cli.model, cli.model._stored
    if stored is None:
        model.save_adapter(directory, {})
    else:
        code = building_code(model.task, model.num_classes, model.class_names)
        facts = {"class_names": stored.class_names, "metrics": stored.metrics, "task": stored.task}
        save_adapter(model.model, directory, **facts, code=code)
    size = sum(file.stat().st_size for file in directory.iterdir())
    return f"adapter directory, {size / 2**20:.2f} MiB", {}


def _write_loras(cli: AdaptationCLI, options: Any, directory: Path) -> tuple[str, dict[str, Any]]:
    _load(cli, options.ckpt_path)
    exports = export_loras(cli.model.model, directory)
    return lora_table(exports), {"projections": [asdict(export) for export in exports]}


def lora_table(exports: list[ProjectionExport]) -> str:
    """One line per kind of projection: ranks, the size of one expert's LoRAs, the largest measured difference."""
    groups: dict[tuple[str, str], list[ProjectionExport]] = {}
    for export in exports:
        shape = f"{export.out_features} x {export.in_features}"
        groups.setdefault((export.name.rpartition(".")[2], shape), []).append(export)
    header = ["projection", "count", "out x in", "experts", "rank", "MiB per expert", "largest relative difference"]
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


def _write_merged(cli: AdaptationCLI, options: Any, directory: Path) -> tuple[str, dict[str, Any]]:
    cli.model.task.fetch()
    report = merge(
        cli.trainer, cli.model, cli.datamodule, split=options.split, task_name=options.task, ckpt_path=options.ckpt_path or None
    )
    table = merge_table(report)
    problems = []
    if not report.logit_difference <= options.max_difference:
        problems.append(f"logits by {report.logit_difference:.1%} (--max_difference {options.max_difference:.1%})")
    if not report.drop <= options.max_drop:
        problems.append(f"{report.main_metric} by {report.drop:.2f} points (--max_drop {options.max_drop})")
    if problems and not options.force:
        print(f"\n{table}\n")
        raise UserError(f"the merged model differs too much: {', '.join(problems)}; --force writes it all the same")
    cli.model.task.save_model(directory, cli.model.class_names)
    facts = {name: value for name, value in asdict(report).items() if name != "gates"}
    return table, {**facts, "task": options.task, "drop": report.drop, "gates": report.gates}


def merge_table(report: MergeReport) -> str:
    """Main metric and loss with and without adapters, and how far the logits are apart."""
    names = dict.fromkeys([report.main_metric, *(name for name in report.routed if name.endswith("loss"))])
    rows = [
        [f"{report.split}/{name}", f"{report.routed[name]:.4f}", f"{report.merged[name]:.4f}"]
        for name in names
        if name in report.merged
    ]
    rows.append(["relative rms difference of the logits", "", f"{report.logit_difference:.2e}"])
    return markdown_table(["", "adapter", "merged"], rows)
