"""Commonsense reasoning: eight sets of questions with choices, trained on together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datamodules.instructions import Benchmark, InstructionDataModule, TrainSet
from datamodules.instructions.benchmarks import COMMONSENSE, COMMONSENSE_TRAIN


class CommonsenseDataModule(InstructionDataModule):
    """BoolQ, PIQA, Social IQa, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA in LLM-Adapters' form.

    BoolQ comes without its passages. Other arguments are those of InstructionDataModule.

    Args:
        train: commonsense_170k (all eight training sets), commonsense_15k (a smaller mix), single sets by the names of `test`,
            or paths of files of your own; one, a list, or each with its weight (how often each example comes in an epoch).
        test: boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa, or paths. Null is all eight.
        max_length: of prompt and response in training, in tokens.
        arguments: see InstructionDataModule.
    """

    benchmarks: ClassVar[Mapping[str, Benchmark]] = COMMONSENSE
    train_sets: ClassVar[Sequence[TrainSet]] = COMMONSENSE_TRAIN

    def __init__(
        self,
        train: dict[str, float] | list[str] | str = "commonsense_170k",
        test: list[str] | None = None,
        max_length: int = 256,
        **arguments: Any,
    ) -> None:
        super().__init__(train=train, test=test, max_length=max_length, **arguments)
