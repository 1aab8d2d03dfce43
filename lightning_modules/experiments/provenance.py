"""The origin of a result: commit, versions, and a hash of the config."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("torch", "lightning", "transformers", "peft", "open_clip_torch", "datasets", "numpy")


@functools.cache
def repository_commit() -> str | None:
    """Return the commit of the repository that tracks this file, with `+dirty` for uncommitted changes; None without one."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # no git, or installed below another repository
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+dirty" if changes else "")


def _git(*words: str) -> str | None:
    """Return the output of git in this file's directory; None if git fails or is missing."""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on, and the device's name."""
    found = {"python": platform.python_version()} | library_versions(_LIBRARIES)
    return found | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()}


def library_versions(libraries: Sequence[str]) -> dict[str, str]:
    """Return the versions of those libraries that are installed."""
    found = {}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def without_logger(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved config without its logger: where a run writes does not matter."""
    return {**config, "trainer": {key: value for key, value in config["trainer"].items() if key != "logger"}}


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a hash of a resolved config without its logger."""
    text = json.dumps(without_logger(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
