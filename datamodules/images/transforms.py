"""From an RGB image to the model's input tensor, in two steps: bytes in the loading process, floats on the model's device."""

from collections.abc import Sequence

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MAX_ASPECT = 32  # of an image that is resized as a whole


def train_transform(image_size: int) -> v2.Compose:
    """Return a random crop of 90 to 100 % of the area, bicubic, without flips (mirrored digits and signs change their class).

    Returns:
        From a PIL image to a uint8 tensor (3, image_size, image_size).
    """
    crop = v2.RandomResizedCrop(image_size, scale=(0.9, 1.0), ratio=(0.75, 1.3333), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.ToImage(), v2.ToPureTensor()])


def eval_transform(image_size: int) -> v2.Compose:
    """Resize the shorter side to `image_size`, bicubic, then crop the central square.

    Returns:
        From a PIL image to a uint8 tensor (3, image_size, image_size).
    """
    return v2.Compose([CentralSquare(image_size), v2.ToImage(), v2.ToPureTensor()])


def normalization(mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """Return the last step, made on the model's device: workers hand bytes on, a quarter of the memory of float32.

    Returns:
        From uint8 images (..., 3, H, W) to float32, scaled to 0 to 1, then normalized.
    """
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


class CentralSquare:
    """Resize the shorter side to `image_size`, bicubic, then crop the central square.

    An image of 2 x 8000 pixels would have 200 million when it is resized. Where one side is longer than 32 times the other, the
    crop therefore comes first; the pixels are the same but for rounding.

    Args:
        image_size: side of the square in pixels.
    """

    def __init__(self, image_size: int) -> None:
        self._size = image_size
        resize = v2.Resize(image_size, interpolation=InterpolationMode.BICUBIC)
        self._resize_and_crop = v2.Compose([resize, v2.CenterCrop(image_size)])

    def __call__(self, image: Image.Image) -> Image.Image:
        short, long = sorted(image.size)
        if long <= _MAX_ASPECT * short:
            return self._resize_and_crop(image)
        resized = self._size * long // short  # torchvision rounds down, too
        first = round((resized - self._size) / 2)
        start, end = (place * long / resized for place in (first, first + self._size))
        box = (start, 0, end, short) if image.width == long else (0, start, short, end)
        return image.resize((self._size, self._size), Image.Resampling.BICUBIC, box=box)
