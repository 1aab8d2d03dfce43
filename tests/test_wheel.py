"""The wheel: one name in site-packages, and a command that finds its configs and demo models from any directory."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("fourier_moe", "lightning_modules", "datamodules", "configs", "examples")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.mark.slow
def test_wheel_trains_the_demo_in_an_empty_directory(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, tmp_path / "source" / name)
    for name in FILES:
        shutil.copy(REPOSITORY / name, tmp_path / "source")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"fourier_moe"}

    empty.mkdir()
    start = "import fourier_moe, sys; assert sys.path[-1] == sys.argv.pop(); from fourier_moe.__main__ import run; run()"
    words = ["fit", "--config", "demo", "--config", "adapters/lora", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    trainer = site / "fourier_moe/trainer"
    paths = os.pathsep.join(map(str, (site, trainer)))  # the second, since these tests may see the repository's packages too
    subprocess.run(
        [sys.executable, "-c", start, *words, trainer], cwd=empty, env={**os.environ, "PYTHONPATH": paths}, check=True
    )
    (saved,) = empty.glob("runs/*/version_0/config.yaml")
    model = yaml.safe_load(saved.read_text())["model"]
    assert model["adapter"]["class_path"] == "fourier_moe.LoRAConfig"
    assert Path(model["task"]["init_args"]["pretrained"]).is_relative_to(trainer)
    assert (saved.parent / "adapter_last").is_dir()
