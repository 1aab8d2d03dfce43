"""Build the wheel: the trainer's packages and configs go below `fourier_moe`, the one name in site-packages."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXAMPLES = ("digits_tower", "arithmetic_model")  # pretrained models of the demos


class BuildPy(build_py):
    """Move the trainer to `fourier_moe/trainer`, which `fourier_moe` appends to `sys.path`, unless the install is editable."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        trainer = Path(self.build_lib, "fourier_moe/trainer")
        shutil.rmtree(trainer, ignore_errors=True)
        for package in ("lightning_modules", "datamodules"):
            shutil.move(Path(self.build_lib, package), trainer / package)
        for directory in ("configs", *(f"examples/{name}" for name in EXAMPLES)):
            shutil.copytree(directory, trainer / directory, ignore=shutil.ignore_patterns("__pycache__", "*.py"))


setup(cmdclass={"build_py": BuildPy})
