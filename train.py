"""Train, evaluate and use adapters: python train.py {fit,validate,test,predict,compare} --config configs/NAME.yaml"""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fourier_moe import AdapterConfig
from lightning_modules import AdaptationModule

_OUR_PACKAGES = ("fourier_moe", "lightning_modules", "datamodules", "train", "__main__")
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # Lightning 2.6 on torch 2.15
warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")  # compare does

set_parsing_settings(subclasses_enabled=[AdapterConfig])  # a dataclass, which jsonargparse otherwise takes as final


class AdaptationCLI(LightningCLI):
    """LightningCLI with one model class (AdaptationModule), any DataModule, and the links between them."""

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        super().__init__(
            AdaptationModule,
            L.LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},  # resuming in the same directory writes the config again
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.adapter.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Refuse a missing checkpoint before anything is loaded."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        path = config.get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and "://" not in path and not Path(path).exists():
            near = ", ".join(sorted(str(file) for file in Path(path).parent.glob("*.ckpt"))) or "none"
            raise ValueError(f"ckpt_path={path!r} does not exist; checkpoints beside it: {near}")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let hyper-parameters found in the checkpoint win over the command line, silently."""


def main(args: list[str] | None = None) -> Any:
    """Run one subcommand; returns the AdaptationCLI, so that tests and scripts can look at what was built."""
    words = sys.argv[1:] if args is None else args
    if words[:1] == ["compare"]:
        from lightning_modules.compare import compare_command

        return compare_command(words[1:])
    return AdaptationCLI(args)


def _user_mistake(error: BaseException | None) -> BaseException | None:
    """The error in a chain that our own checks raised to say what to change; others may be bugs and keep their traceback."""
    while error is not None:
        innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
        if innermost.f_globals.get("__name__", "").partition(".")[0] in _OUR_PACKAGES:
            return error
        error = error.__cause__
    return None


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        mistake = _user_mistake(error)
        if mistake is None:
            raise
        sys.exit(f"\nerror: {mistake}")
