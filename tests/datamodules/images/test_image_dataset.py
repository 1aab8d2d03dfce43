from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from datamodules.images.dataset import FileSplit, ImageDataset
from datamodules.images.transforms import CLIP_MEAN, CLIP_STD, CentralSquare, eval_transform, normalization, train_transform
from datamodules.shared.sampling import hold_out


def test_held_out_examples_are_reproducible_and_depend_on_the_seed():
    labels = [index % 5 for index in range(100)]
    assert hold_out(labels, 0.2, seed=3) == hold_out(labels, 0.2, seed=3)
    assert hold_out(labels, 0.2, seed=3) != hold_out(labels, 0.2, seed=4)


def test_each_class_gives_its_share():
    labels = [0] * 100 + [1] * 50 + [2] * 10
    train, validation = hold_out(labels, 0.1, seed=0)
    assert sorted(train + validation) == list(range(160))
    assert Counter(labels[index] for index in validation) == {0: 10, 1: 5, 2: 1}


def test_total_is_right_when_classes_are_too_small_to_give_a_share_each():
    labels = [index // 5 for index in range(980)]
    train, validation = hold_out(labels, 0.1, seed=0)
    assert len(validation) == 98
    assert max(Counter(labels[index] for index in validation).values()) == 1
    assert len({labels[index] for index in train}) == 196
    drawn = {labels[index] for index in validation}
    assert drawn != set(range(98)), "the classes that give an image are drawn, not the first ones"


def test_at_least_one_example_is_held_out():
    assert len(hold_out([0, 0, 1, 1], 0.01, seed=0)[1]) == 1


@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_no_class_of_train_is_emptied(fraction):
    labels = [0, 1, 1, 2, 2, 2]
    train, _ = hold_out(labels, fraction, seed=0)
    assert {labels[index] for index in train} == {0, 1, 2}


def test_nothing_to_hold_out_is_an_error():
    with pytest.raises(ValueError, match="every class of train has a single one"):
        hold_out([0, 1, 2], 0.5, seed=0)


def test_image_that_breaks_after_the_check_is_named(tmp_path, encode):
    path = tmp_path / "a" / "x.jpg"
    path.parent.mkdir()
    path.write_bytes(encode()[:150])
    dataset = ImageDataset(FileSplit(tmp_path, [path], [0]), [0], eval_transform(8))
    with pytest.raises(ValueError, match=r"a/x\.jpg' cannot be decoded"):
        dataset[0]


def test_eval_transform_resizes_the_shorter_side_and_crops_the_center():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 30, 20))
    tensor = eval_transform(10)(image)
    assert tensor.shape == (3, 10, 10)
    assert tensor.dtype == torch.uint8
    assert tensor[2, 5, 5] == 255
    assert tensor[:, :, 5].float().mean(dim=1).argmax() == 2


def resized_whole(image: Image.Image, size: int) -> np.ndarray:
    resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC)
    return np.asarray(v2.CenterCrop(size)(resize(image)), int)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (7, 201), (5, 400), (400, 5), (3, 301)])
def test_central_square_of_any_shape_is_that_of_the_image_resized_as_a_whole(size):
    wave = (127 + 100 * np.sin(np.arange(size[0])[None] / 3 + np.arange(size[1])[:, None] / 5)).astype(np.uint8)
    image = Image.fromarray(wave).convert("RGB")
    difference = np.abs(np.asarray(CentralSquare(32)(image), int) - resized_whole(image, 32)).max()
    assert difference <= (1 if max(size) > 32 * min(size) else 0)


@pytest.mark.parametrize("size", [(2, 8000), (8000, 2)])
def test_long_image_is_cropped_before_it_is_resized(size, monkeypatch):
    resize, sizes = Image.Image.resize, []

    def measured(self, size, *arguments, **options):
        sizes.append(size)
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", measured)
    tensor = eval_transform(224)(Image.new("RGB", size, (255, 0, 0)))
    assert sizes == [(224, 224)]
    assert (tensor == torch.tensor([255, 0, 0])[:, None, None]).all()


def test_white_is_normalized_with_mean_and_std():
    image = Image.new("RGB", (9, 7), (255, 255, 255))
    expected = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    for transform in (train_transform, eval_transform):
        tensor = normalization(CLIP_MEAN, CLIP_STD)(transform(6)(image))
        torch.testing.assert_close(tensor, expected[:, None, None].expand(3, 6, 6))


def test_batch_is_normalized_to_the_bit_as_image_by_image():
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 1, 8, 16).repeat(1, 3, 1, 1)
    image_by_image = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(CLIP_MEAN), list(CLIP_STD))])
    expected = torch.stack([image_by_image(image) for image in images])
    assert torch.equal(normalization(CLIP_MEAN, CLIP_STD)(images), expected)


def test_train_transform_crops_at_least_ninety_percent_and_never_mirrors():
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")
    transform = train_transform(32)
    directions = set()
    for _ in range(20):
        row = transform(ramp)[0, 16] / 255
        directions.add(bool(row[-1] > row[0]))
        assert (row[-1] - row[0]).abs() > 0.8
    assert len(directions) == 1
