"""The overlays in configs/strategies from the command line, on two processes."""

import json
import shlex
from pathlib import Path

import pytest
from processes import run_in_two

REPOSITORY = Path(__file__).parent.parent.parent
QUICK = {
    "fsdp": ["--data.init_args.test", "[gsm8k]", "--model.task.init_args.evaluation.max_new_tokens", "2"],
    "ddp": [],
}


def fit_and_test(main, words, directory):
    words = [*words, "--trainer.devices", "2", "--trainer.logger.init_args.save_dir", str(directory)]
    fitted = main("fit", *words)
    run = Path(fitted.trainer.log_dir)
    tested = main("test", *words, "--model.adapter_path", str(run / "adapter"))
    metrics = {name: float(value) for name, value in tested.trainer.callback_metrics.items()}
    return type(fitted.trainer.strategy).__name__, str(run), fitted.model.activation_checkpointing, metrics


@pytest.mark.parametrize(("name", "strategy"), [("fsdp", "ShardedBaseStrategy"), ("ddp", "DDPStrategy")])
def test_overlay_s_command_fits_and_tests_in_smoke_size_on_two_processes(main, tmp_path, name, strategy):
    """With every callback of the config that the command names."""
    first_line = (REPOSITORY / f"configs/strategies/{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    words = [*shlex.split(first_line)[4:], "--config", "configs/smoke.yaml", "--trainer.limit_val_batches", "1", *QUICK[name]]
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
