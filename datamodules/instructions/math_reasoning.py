"""Mathematical reasoning: word problems whose answer is a number or a letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datamodules.instructions import Benchmark, InstructionDataModule, TrainSet
from datamodules.instructions.benchmarks import MATH, MATH_TRAIN


class MathReasoningDataModule(InstructionDataModule):
    """AddSub, AQuA, GSM8K, MultiArith, SingleEq and SVAMP in LLM-Adapters' form.

    Scored against the sets' `answer`; their `output` is a model's and sometimes wrong, so test batches have no gold response.
    Trained on math_10k, AddSub, MultiArith and SingleEq say little: it holds questions of the collection they are from.

    Args:
        train: math_10k (the paper's), math_7k or math_14k (without that overlap), or paths of files of your own; one, a list,
            or each with its weight (how often each example comes in an epoch).
        test: AddSub, AQuA, gsm8k, MultiArith, SingleEq, SVAMP, or paths. Null is all six.
        max_length: of prompt and response in training, in tokens.
        arguments: see InstructionDataModule.
    """

    benchmarks: ClassVar[Mapping[str, Benchmark]] = MATH
    train_sets: ClassVar[Sequence[TrainSet]] = MATH_TRAIN

    def __init__(
        self,
        train: dict[str, float] | list[str] | str = "math_10k",
        test: list[str] | None = None,
        max_length: int = 1024,
        **arguments: Any,
    ) -> None:
        super().__init__(train=train, test=test, max_length=max_length, **arguments)
