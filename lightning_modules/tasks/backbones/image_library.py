"""What ImageClassification needs to know of a library of image models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fourier_moe.errors import UserError

DEFAULT = "default"  # the weights that belong to a model's name
UNTRAINED_SEED = 0  # untrained towers are always the same, so that their adapters can be loaded again

Channels = tuple[float, float, float]


class ImageInput(NamedTuple):
    """The images that a model reads; None for what its files do not say.

    Attributes:
        image_size: side of the square in pixels.
        mean: of each color channel, of values from 0 to 1.
        std: of each color channel.
    """

    image_size: int | None
    mean: Channels | None = None
    std: Channels | None = None


class ImageLibrary(ABC):
    """The image models of one library: loading one, and what it reads. Cheap to construct.

    Args:
        model: the model's name or path.
        pretrained: `default`, or what the library takes for its weights; None for an untrained model.
        image_size: side of the input in pixels; None for the model's own.
        tiny: an untrained model of the same architecture, but tiny.

    Attributes:
        head_names: modules of the built model that are trained in full.

    Raises:
        UserError: for an argument that the library does not have.
    """

    head_names: tuple[str, ...] = ("head",)

    def __init__(self, model: str, pretrained: str | None, image_size: int | None, tiny: bool) -> None:
        self.model, self.pretrained = model, pretrained
        self.image_size, self.tiny = image_size, tiny

    @abstractmethod
    def fetch(self, *, look_up: bool = True) -> None:
        """Fetch the model's files from a network; see `fetch_model`.

        Raises:
            UserError: if they cannot be fetched.
        """

    @abstractmethod
    def input(self) -> ImageInput:
        """Return what images the model reads, by its own files; fetch them if they are not there."""

    @abstractmethod
    def build(self, num_classes: int, class_names: Sequence[str] | None = None) -> nn.Module:
        """Load the model with a new head; see Task.build."""

    @abstractmethod
    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return float32 logits (B, classes) of a built model for images (B, 3, H, W)."""

    @abstractmethod
    def save(self, model: Any, directory: Path, class_names: Sequence[str] | None) -> None:
        """Write a built model without adapters for the library."""

    def forward_flops(self) -> int | None:
        """Count the operations of one image's forward pass without loading anything; None if unknown."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"), suppress(NotImplementedError, RuntimeError):
            size = self.input().image_size or 224
            model = self.build(2).eval()
            return count_flops(lambda images: self.logits(model, images), torch.empty(1, 3, size, size))
        return None  # a model that looks at values, which the meta device has not


def count_flops(function: Any, *inputs: Tensor) -> int:
    """Count the floating-point operations of a call; a multiply-add counts as two. Free on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


@torch.no_grad()
def feature_size(backbone: Any, image_size: Any) -> int:
    """Find the width of a tower's output by running it."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    training = backbone.training
    size = backbone.eval()(torch.zeros(1, 3, height, width)).shape[-1]
    backbone.train(training)
    return size


def require_size(images: Tensor, size: Any, name: str) -> None:
    """Refuse images of another size than (height, width).

    Raises:
        UserError: naming both sizes, and the arguments that set them.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(images.shape[-2:]) != size:
        raise UserError(
            f"images are {images.shape[-2]} x {images.shape[-1]}, {name} needs {size[0]} x {size[1]}; set "
            f"data.init_args.image_size={size[0]}, or model.task.init_args.image_size={images.shape[-1]}"
        )


def channels(values: Any) -> Channels | None:
    """Return three numbers as a tuple; None for what is not three numbers."""
    if values is None or len(values) != 3:
        return None
    red, green, blue = map(float, values)
    return red, green, blue
