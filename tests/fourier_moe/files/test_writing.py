"""Files are replaced whole, under temporary names that nobody can plant, and nothing of others is deleted."""

import os
import subprocess
import sys

import pytest
from support.models import trained

from fourier_moe import load_adapter, save_adapter
from fourier_moe.files import writing as file_writing
from fourier_moe.files.writing import new_directory, replace_files, replacing, write_file

HEX = "0123456789abcdef" * 2


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_content_is_replaced_and_directories_are_made(tmp_path):
    path = tmp_path / "a" / "b.txt"
    for content in ("one äé", b"two", memoryview(b"three")):
        write_file(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else bytes(content))
    assert names(path.parent) == ["b.txt"]


def test_files_have_the_permissions_that_the_user_gives_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_what_is_planted_under_a_temporary_name_is_neither_followed_nor_deleted(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    directory = tmp_path / "adapter"
    directory.mkdir()
    planted = ["adapter.json.part", "adapter.safetensors.part", ".adapter.json.part", f".adapter.json.{HEX}.part"]
    for name in planted:
        (directory / name).symlink_to(victim)
    (directory / "README.md.part").write_text("mine")
    save_adapter(trained(), directory)
    assert victim.read_text() == "precious"
    assert (directory / "README.md.part").read_text() == "mine"
    assert names(directory) == sorted([*planted, "README.md.part", "README.md", "adapter.json", "adapter.safetensors"])
    assert all((directory / name).is_symlink() for name in planted)


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_written_through(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "adapter.json"
    victim.write_text("precious")
    path.symlink_to(victim)
    write_file(path, b"new")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("precious", "new", False)


def test_what_a_killed_process_left_is_removed_and_the_file_of_a_living_one_is_not(tmp_path):
    write = "import os, sys, pathlib; from fourier_moe.files.writing import replacing\n"
    write += "with replacing(pathlib.Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os._exit(9)"
    path = tmp_path / "last.ckpt"
    assert subprocess.run([sys.executable, "-c", write, path], check=False).returncode == 9
    (left,) = names(tmp_path)
    assert left.endswith(".part")
    with replacing(path) as file:
        file.write(b"outer")
        living = file.name
        write_file(path, b"inner")
        assert os.path.exists(living)
        assert path.read_bytes() == b"inner"
    assert path.read_bytes() == b"outer"
    assert names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("holds_lock", [False, True])
def test_a_file_that_is_taken_for_abandoned_before_it_is_locked_is_written_again(tmp_path, monkeypatch, holds_lock):
    """Another writer of the same file removes it between its creation and its lock."""
    lock, taken = file_writing._lock, []

    def late(file):
        if not taken:
            taken.append(open(file.name, "rb"))  # noqa: SIM115 # closed below
            assert not holds_lock or lock(taken[0])
            os.unlink(file.name)
        return lock(file)

    monkeypatch.setattr(file_writing, "_lock", late)
    write_file(tmp_path / "a", "new")
    taken[0].close()
    assert (tmp_path / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("fails", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()], ids=repr)
def test_after_an_error_the_old_file_is_there_and_no_other(tmp_path, fails):
    path = tmp_path / "a"
    write_file(path, b"old")

    def fail(content):
        raise fails

    with pytest.raises(type(fails)), replacing(path) as file:
        fail(file.write(b"new"))
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a"])


def test_errors_name_the_file(tmp_path):
    (tmp_path / "file").touch()
    for write in (
        lambda: write_file(tmp_path / "file" / "a", b""),
        lambda: replace_files(tmp_path / "file", {"a": []}),
        lambda: write_file(tmp_path, b""),
    ):
        with pytest.raises(OSError, match=rf"what was there before is kept: '{tmp_path}"):
            write()
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["n" * 250, "汉" * 80, "é" * 125])
def test_long_names(tmp_path, name):
    """File systems count bytes, not characters."""
    path = tmp_path / name
    abandoned = tmp_path / f".{os.fsdecode(os.fsencode(name)[:100])}.{HEX}.part"
    abandoned.touch()
    write_file(path, b"x")
    assert names(tmp_path) == [path.name]


def test_new_directory_appears_whole_and_deletes_nothing_of_others(tmp_path):
    target, neighbor = tmp_path / "x" / "export", tmp_path / "x" / "export.part"
    neighbor.mkdir(parents=True)
    (neighbor / "notes").write_text("mine")
    with new_directory(target) as directory:
        (directory / "a").write_text("b")
        assert not target.exists()
    assert (target / "a").read_text() == "b"
    with pytest.raises(FileExistsError), new_directory(target) as directory:
        (directory / "a").write_text("c")
    with pytest.raises(RuntimeError), new_directory(tmp_path / "x" / "other") as directory:
        raise RuntimeError
    assert (target / "a").read_text() == "b"
    assert names(tmp_path / "x") == ["export", "export.part"]
    assert (neighbor / "notes").read_text() == "mine"


def test_adapter_saved_over_a_link_to_another_directory_stays_there(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    save_adapter(trained(), link)
    assert link.is_symlink()
    load_adapter(trained(), real)
