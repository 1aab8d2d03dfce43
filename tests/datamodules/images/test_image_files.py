import os

import numpy as np
import pytest
from PIL import Image

from datamodules.images import files as image_files
from datamodules.images.decoding import IMAGE_EXTENSIONS
from datamodules.images.files import check_usable, describe_left_out, find_files, read_file


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize(("file_format", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("BMP", "bmp"), ("WEBP", "webp")])
def test_truncated_file_is_reported_and_complete_one_is_not(file_format, suffix, tmp_path, encode, noise):
    content = encode(noise, file_format)
    good, bad = tmp_path / f"good.{suffix}", tmp_path / f"bad.{suffix}"
    good.write_bytes(content)
    bad.write_bytes(content[: len(content) // 2])
    check_usable([good])
    with pytest.raises(ValueError, match=r"1 truncated or corrupt image file\(s\): .*bad\..*download them again or delete"):
        check_usable([good, bad])


def test_empty_file_is_reported(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.jpg"):
        check_usable([tmp_path / "x.jpg"])


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_bytes_after_the_end_of_an_image_are_no_alarm(file_format, tmp_path, encode):
    (tmp_path / "x.jpg").write_bytes(encode(None, file_format) + b"\0" * 5000)
    check_usable([tmp_path / "x.jpg"])


def test_wrong_suffix_is_no_alarm(tmp_path, encode):
    (tmp_path / "x.jpg").write_bytes(encode(None, "PNG"))
    check_usable([tmp_path / "x.jpg"])


def test_complete_jpeg_and_png_are_not_decoded(tmp_path, encode, monkeypatch):
    monkeypatch.setattr(image_files, "decode_rgb", lambda *_: pytest.fail("decoded"))
    for name, file_format in (("a.jpg", "JPEG"), ("b.png", "PNG")):
        (tmp_path / name).write_bytes(encode(None, file_format))
    check_usable([tmp_path / "a.jpg", tmp_path / "b.png"])


def test_first_five_broken_files_are_named_and_all_are_counted(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for path in paths:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"7 truncated .*4\.png' and 2 more") as caught:
        check_usable(paths)
    assert "5.png" not in str(caught.value)


# Found by their names


def touch(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"")


def names(paths, directory):
    return [path.relative_to(directory).as_posix() for path in paths]


def test_images_are_found_at_any_depth_sorted_without_hidden_ones(tmp_path):
    touch(tmp_path, "b.JPG", "a/z.png", "a/b/c.webp", ".hidden/x.jpg", "a/._z.png", "notes.txt")
    assert names(find_files(tmp_path).images, tmp_path) == ["a/b/c.webp", "a/z.png", "b.JPG"]


def test_every_usual_suffix_is_read(tmp_path, encode):
    """torchvision's and those that browsers and cameras give."""
    for suffix in (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jfif", ".jpe", ".JPG", ".gif"):
        assert suffix.lower() in IMAGE_EXTENSIONS
    (tmp_path / "x.jfif").write_bytes(encode())
    check_usable(find_files(tmp_path).images)


def test_files_that_are_left_out_are_named(tmp_path):
    touch(tmp_path, "x.jpg", "a/phone.heic", "a/phone2.HEIC", "a\x1b[31m.txt", "README", ".DS_Store")
    found = find_files(tmp_path)
    (note,) = describe_left_out(tmp_path, [found])
    assert "4 file(s) left out" in note
    assert "2 .heic, 1 no suffix, 1 .txt" in note
    assert "'README', 'a\\x1b[31m.txt', 'a/phone.heic', 'a/phone2.HEIC'" in note
    assert describe_left_out(tmp_path / "a", []) == []


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    touch(outside, "deep/x.jpg")
    touch(inside, "real/y.jpg")
    for name, target in {"out": outside, "twin": outside, "up": tmp_path, "self": inside, "in": inside / "real"}.items():
        (inside / name).symlink_to(target)
    (outside / "loop").symlink_to(outside)
    found = find_files(inside)
    assert names(found.images, inside) == ["out/deep/x.jpg", "real/y.jpg"]
    assert names(found.links, inside) == ["in", "out/loop", "self", "twin", "up"]
    (note,) = describe_left_out(inside, [found])
    assert "5 link(s) left out" in note


def test_folder_behind_two_links_is_read_once(tmp_path):
    inside = tmp_path / "inside"
    touch(tmp_path, "outside/a/b/x.jpg")
    inside.mkdir()
    for name, target in {"l1": "outside/a/b", "l2": "outside/a", "l3": "outside"}.items():
        (inside / name).symlink_to(tmp_path / target)
    found = find_files(inside)
    assert names(found.images, inside) == ["l1/x.jpg"]
    assert names(found.links, inside) == ["l2/b", "l3/a"]


def test_file_that_a_disk_cannot_read_is_named(tmp_path, encode, monkeypatch):
    (tmp_path / "x.png").write_bytes(encode(None, "PNG"))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(tmp_path), "open", fail)
    monkeypatch.setattr(type(tmp_path), "read_bytes", fail)
    with pytest.raises(ValueError, match=r"x.png' cannot be read: Input/output error"):
        check_usable([tmp_path / "x.png"])
    with pytest.raises(ValueError, match=r"x.png' cannot be read: Input/output error"):
        read_file(tmp_path / "x.png")


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.jpg")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"folder '.*/a' cannot be listed: Permission denied"):
        find_files(tmp_path)


# What cannot be used


def test_image_above_pillows_limit_is_found_before_training_with_that_cause(tmp_path, encode, monkeypatch):
    for suffix, file_format in {"jpg": "JPEG", "png": "PNG", "bmp": "BMP"}.items():
        (tmp_path / f"x.{suffix}").write_bytes(encode(Image.new("RGB", (100, 40)), file_format))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"x\.bmp' is too large .*x\.jpg' is too large .*x\.png' is too large") as caught:
        check_usable(find_files(tmp_path).images)
    assert "truncated" not in str(caught.value)


def test_pipe_device_and_broken_link_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "nothing.jpg").symlink_to(tmp_path / "gone")
    found = find_files(tmp_path).images
    with pytest.raises(ValueError, match=r"nothing\.jpg' is not a file.*pipe\.jpg' is not a file.*zero\.jpg' is not a file"):
        check_usable(found)
    for path in found:
        with pytest.raises(ValueError, match="is not a file: a pipe, a device, or a link to nothing"):
            read_file(path)
