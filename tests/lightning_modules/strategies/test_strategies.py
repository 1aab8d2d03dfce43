"""The overlays in configs/strategies from the command line, on two processes, and the launch lines of docs and examples."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from support import REPOSITORY
from support.commands import ParsedError
from support.processes import run_in_two

from lightning_modules import cli

QUICK = [
    "--trainer.limit_train_batches",
    "2",
    "--trainer.limit_val_batches",
    "1",
    "--model.adapter.init_args.num_coefficients",
    "512",
]
QUICK_ANSWERS = ["--data.init_args.test", "[gsm8k]", "--model.task.init_args.evaluation.max_new_tokens", "2"]


def fit_and_test(main, words, directory):
    words = [*words, "--trainer.devices", "2", "--trainer.logger.init_args.save_dir", str(directory)]
    fitted = main("fit", *words)
    run = Path(fitted.trainer.log_dir)
    tested = main("test", *words, "--model.adapter_path", str(run / "adapter"))
    metrics = {name: float(value) for name, value in tested.trainer.callback_metrics.items()}
    return type(fitted.trainer.strategy).__name__, str(run), fitted.model.activation_checkpointing, metrics


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), [("fsdp", "ShardedBaseStrategy"), ("ddp", "DDPStrategy")])
def test_overlay_s_command_fits_and_tests_in_smoke_size_on_two_processes(main, tmp_path, name, strategy):
    """With every callback of the config that the command names."""
    first_line = (REPOSITORY / f"configs/strategies/{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    words = [*shlex.split(first_line)[4:], "--config", "configs/smoke.yaml", *QUICK]
    words += QUICK_ANSWERS if name == "fsdp" else []
    first, second = run_in_two(fit_and_test, main, words, tmp_path)
    used, run, recomputing, metrics = first
    assert second == first
    assert used == strategy
    assert recomputing == (name == "fsdp")
    assert "test/accuracy" in metrics
    for file in ("adapter/adapter.safetensors", "adapter/adapter.json", "adapter_last/adapter.json", "checkpoints/last.ckpt"):
        assert Path(run, file).is_file()
    if name == "fsdp":
        rows = Path(run, "adapter_test/predictions/gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
        assert len({json.loads(row)["id"] for row in rows}) == len(rows) == 8


SCRIPTS = sorted((REPOSITORY / "examples/slurm").glob("*.sbatch"))
PAGES = [REPOSITORY / "docs/guides/cluster.md", *SCRIPTS]
LINES = sorted({line for page in PAGES for line in re.findall(r"train\.py .*", page.read_text().replace("\\\n", " "))})
VALUES = {"$SLURM_NNODES": "2", "$SLURM_NTASKS_PER_NODE": "1", "$config": "configs/math_qwen2_5_14b.yaml"}
RUN = "runs/math_qwen2_5_14b/version_0"


@pytest.mark.parametrize("line", [line for line in LINES if f"--ckpt_path {RUN}" not in line])
def test_launch_line_is_understood(main, monkeypatch, line):
    def instantiate_classes(self):
        raise ParsedError

    monkeypatch.setattr(cli.AdaptationCLI, "instantiate_classes", instantiate_classes)
    words = [VALUES.get(word, word) for word in shlex.split(line.partition("`")[0], comments=True)[1:]]
    with pytest.raises(ParsedError):
        main(*(word for word in words if word != "$@"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_slurm_script_is_bash_and_starts_one_process_for_each_gpu(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text()
    (gpus,), (tasks,) = (re.findall(rf"#SBATCH --{name}=(\d+)", text) for name in ("gpus-per-node", "ntasks-per-node"))
    assert gpus == tasks
    assert re.search(r"srun python train\.py fit", text)
    assert re.search(r"#SBATCH --requeue", text)
    assert (
        '--trainer.logger.init_args.version "job_$SLURM_JOB_ID" --ckpt_path last "$@"' in text
    )  # or it would start from scratch
