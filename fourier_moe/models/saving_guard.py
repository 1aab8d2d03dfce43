"""Other libraries' `save_pretrained` on an adapted model, whose files `from_pretrained` could not read."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

from torch import nn

from fourier_moe.errors import UserError

_METHODS = ("save_pretrained", "push_to_hub")  # of transformers, huggingface_hub's mixin, diffusers


def guard_saving(model: nn.Module, adapter_class: type[nn.Module]) -> None:
    """Shadow `save_pretrained` and `push_to_hub` of every module that has them: refused while there is an adapter in it."""
    for module in model.modules():
        for method in _METHODS:
            if callable(getattr(type(module), method, None)):
                setattr(module, method, GuardedSaving(module, method, adapter_class))


class GuardedSaving:
    """Stands in for a method that saves a module: the weights of adapted projections have other names (`q_proj.base.weight`).

    It saves as before once no adapter is left (merged). A training checkpoint, which the same adapted model resumes from, is
    saved with a warning: where the tensors are named (`state_dict`), or in a directory that is called as transformers' Trainer
    calls its checkpoints, `checkpoint-500`. An error there would end a training run halfway.
    """

    def __init__(self, module: nn.Module, method: str, adapter_class: type[nn.Module]) -> None:
        self.module, self.method, self.adapter_class = module, method, adapter_class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save.

        Raises:
            UserError: if the module is adapted and it is no training checkpoint.
        """
        if any(isinstance(module, self.adapter_class) for module in self.module.modules()):
            problem = (
                f"{type(self.module).__name__} is adapted, so its weights have other names, and from_pretrained would start "
                "the adapted projections at random. Save what was trained with fourier_moe.save_adapter(model, directory), or "
                "push_adapter; a model without adapters is what `train.py export` writes"
            )
            if kwargs.get("state_dict") is None and not self._is_checkpoint(*args, **kwargs):
                raise UserError(problem)
            warnings.warn(f"{problem}. This checkpoint is good for resuming with the same adapter only", stacklevel=2)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def _is_checkpoint(self, save_directory: str | os.PathLike[str] = "", *_: Any, **__: Any) -> bool:
        name = os.path.basename(os.path.normpath(save_directory))
        return self.method == "save_pretrained" and re.fullmatch(r"checkpoint-\d+", name) is not None
