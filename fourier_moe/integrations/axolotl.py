"""FourierMoE as a plugin of axolotl: `plugins: [fourier_moe.integrations.axolotl.FourierMoEPlugin]`, `adapter: fourier_moe`.

Written for the plugin interface of axolotl 0.19. The model is adapted by `inject`, not by peft, of which axolotl 0.19 takes a
release that is too old for `fourier_moe.integrations.peft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel
from torch import nn

from fourier_moe.errors import UserError
from fourier_moe.files.adapter_files import load_adapter, save_adapter
from fourier_moe.files.stored_values import settings_of
from fourier_moe.inject import inject
from fourier_moe.integrations.trainer_mixin import AdapterTrainerMixin
from fourier_moe.spectral.config import FourierMoEConfig

ADAPTER = "fourier_moe"
_RATES = "learning_rates"


class FourierMoEArgs(BaseModel):
    """What the plugin adds to axolotl's config.

    Attributes:
        fourier_moe: the settings of FourierMoEConfig (`targets`, `num_coefficients`, ...), and `learning_rates` by kind of
            parameters (`experts`, `router`, `head`); a kind without a rate has axolotl's `learning_rate`.
    """

    fourier_moe: dict[str, Any] | None = None


class FourierMoEPlugin(BasePlugin):  # type: ignore[misc] # axolotl has no types
    """Adapts the model, trains it with the balance loss and rates by kind, and saves adapter files."""

    def get_input_args(self) -> str:
        return f"{__name__}.{FourierMoEArgs.__name__}"

    def get_adapter_capabilities(self) -> list[Any]:
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[nn.Module, None] | None:
        """Adapt the model, or load `lora_model_dir`, as axolotl calls a trained adapter.

        Raises:
            UserError: for settings that do not fit the method or the model, a quantized model, or `rl: dpo`, `ipo` and `kto`.
        """
        if cfg.adapter != ADAPTER:
            return None
        if config_only:
            raise UserError(f"adapter: {ADAPTER} trains without rl, or with one that needs no peft config; rl={cfg.rl}")
        if cfg.load_in_4bit or cfg.load_in_8bit:
            raise UserError(
                f"adapter: {ADAPTER} needs load_in_4bit and load_in_8bit false: Trainer takes quantized models of peft"
            )
        settings, _ = _block(cfg)
        if cfg.lora_model_dir:
            load_adapter(model, cfg.lora_model_dir)
        else:
            inject(model, settings_of(FourierMoEConfig, settings))
        model.save_pretrained = partial(_save, model)  # type: ignore[assignment] # what axolotl ends a run with
        return model, None

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if cfg.adapter != ADAPTER:
            return None
        from axolotl.core.trainers.base import AxolotlTrainer  # slow to import, and plugins are loaded before the config

        rates = _block(cfg)[1]

        class FourierMoETrainer(AdapterTrainerMixin, AxolotlTrainer):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, learning_rates=rates, **options)

        return FourierMoETrainer


def _block(cfg: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the method's settings and the learning rates of a config."""
    block = cfg.fourier_moe
    if not isinstance(block, Mapping):
        raise UserError(f"adapter: {ADAPTER} needs a block `{ADAPTER}:` with targets and num_coefficients")
    settings = dict(block)
    return settings, dict(settings.pop(_RATES, None) or {})


def _save(model: nn.Module, directory: str, **_: Any) -> None:
    save_adapter(model, directory)
