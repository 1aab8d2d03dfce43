"""What is on the disk: damage of any kind is noticed, an interruption leaves one adapter whole, older versions load."""

import errno
import hashlib
import itertools
import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save
from support.adapter_files import CARD, DESCRIPTION, TENSORS, embedded, rewrite
from support.models import Transformer, tokens, trained

from fourier_moe import __version__, adapters, describe_adapter, load_adapter, save_adapter
from fourier_moe.files import writing as file_writing


@pytest.fixture
def saved(tmp_path):
    return save_adapter(trained(), tmp_path / "adapter", class_names=["a", "b", "c"], metrics={"accuracy": 0.5})


def other_adapter():
    model = trained()
    with torch.no_grad():
        model.classifier.weight.zero_()
    return model


def refused(directory, name):
    """Neither read nor loaded, with an error that names the file."""
    for action in (describe_adapter, lambda path: load_adapter(Transformer(), path)):
        with pytest.raises(ValueError) as caught:
            action(directory)
        assert str(directory / name) in str(caught.value)
        assert "damaged" in str(caught.value) or "format_version" in str(caught.value)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION])
def test_a_byte_changed_at_200_positions_is_noticed_and_the_file_is_named(saved, name):
    path, generator = saved / name, random.Random(0)
    data = path.read_bytes()
    for position in [0, 7, 8, len(data) - 1, *generator.choices(range(len(data)), k=200)]:
        other = data[position] ^ generator.randrange(1, 256)
        path.write_bytes(data[:position] + bytes([other]) + data[position + 1 :])
        refused(saved, name)
    path.write_bytes(data)
    load_adapter(Transformer(), saved)


def test_changes_of_the_header_that_mean_the_same_are_noticed(saved):
    """White space for white space in the description's JSON and around it, capital for small letters in the checksum."""
    path = saved / TENSORS
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for position in range(8, end, 7):
        byte = data[position : position + 1]
        for other in ({b" ", b"\t", b"\n"} if byte.isspace() else {byte.swapcase()}) - {byte}:
            path.write_bytes(data[:position] + other + data[position + 1 :])
            with pytest.raises(ValueError, match="damaged"):
                describe_adapter(saved)


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION])
def test_truncated_lengthened_and_empty_files_are_noticed(saved, name):
    path, generator = saved / name, random.Random(1)
    data = path.read_bytes()
    for shortened in [b"", data[:-1], data + b"\0", data + b"\n", *(data[: generator.randrange(len(data))] for _ in range(50))]:
        path.write_bytes(shortened)
        refused(saved, name)


@pytest.mark.parametrize(
    "content",
    [b"x" * 100, struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2**63) + b"{}"],
    ids=["noise", "deep", "list", "length"],
)
def test_what_is_no_safetensors_file_is_a_value_error(saved, content):
    (saved / TENSORS).write_bytes(content)
    refused(saved, TENSORS)


def pickled(path):
    torch.save({"a": torch.ones(1)}, path)


def test_pickle_is_refused_unread(saved):
    pickled(saved / TENSORS)
    refused(saved, TENSORS)


@pytest.mark.parametrize("text", ['"x"', "[]", "null", "{}", '{"format_version": 2}', '{"format_version": "x", "sha256": "y"}'])
def test_metadata_that_is_no_description_is_an_error(saved, text):
    (saved / TENSORS).write_bytes(save(load_file(saved / TENSORS), metadata={"fourier_moe": text}))
    refused(saved, TENSORS)


def test_tensors_that_end_early_behind_a_valid_checksum_are_an_error(saved):
    data = (saved / TENSORS).read_bytes()[:-4]
    checksum = json.loads(embedded(saved))["sha256"].encode()
    blank = data.replace(checksum, b"0" * 64)
    (saved / TENSORS).write_bytes(blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1))
    (saved / DESCRIPTION).unlink()
    with pytest.raises(ValueError, match=r"adapter.safetensors is no valid safetensors file"):
        load_adapter(Transformer(), saved)


def test_missing_files(saved, tmp_path):
    (saved / DESCRIPTION).unlink()
    (saved / CARD).unlink()
    load_adapter(Transformer(), saved)  # the copies are for people
    with pytest.raises(ValueError, match=r"no adapter in .*nowhere: adapter.safetensors not found; give the directory"):
        load_adapter(Transformer(), tmp_path / "nowhere")
    save_adapter(trained(), saved)
    (saved / TENSORS).unlink()
    with pytest.raises(ValueError, match=r"no adapter in .*not found; adapter.json is there, so it is incomplete"):
        describe_adapter(saved)


# ---------------------------------------------------------------- what the description says


def test_copy_and_description_are_the_same_text_and_the_checksum_is_over_the_file(saved):
    text = (saved / DESCRIPTION).read_text(encoding="utf-8")
    assert text == embedded(saved)
    raw, data = json.loads(text), (saved / TENSORS).read_bytes()
    assert data.count(raw["sha256"].encode()) == 1
    assert hashlib.sha256(data.replace(raw["sha256"].encode(), b"0" * 64)).hexdigest() == raw["sha256"]
    assert (raw["format_version"], raw["fourier_moe_version"]) == (2, __version__)


def test_one_adapter_gives_one_file_wherever_it_is_written(tmp_path):
    first, second = (save_adapter(trained(), tmp_path / name, class_names=["0" * 64, "b", "c"]) for name in "ab")
    for name in (TENSORS, DESCRIPTION, CARD):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert describe_adapter(first).class_names == ["0" * 64, "b", "c"]  # which looks like the checksum's place


def test_task_revision_and_counts_are_kept(tmp_path):
    model = trained()
    model.config = type("Config", (), {"_name_or_path": "owner/base", "_commit_hash": "c0ffee"})()
    save_adapter(model, tmp_path, task={"class": "Words", "main_metric": "f1", "data": "rte", "pipeline_tag": None})
    description = describe_adapter(tmp_path)
    assert (description.backbone, description.backbone_revision) == ("owner/base", "c0ffee")
    assert description.task == {"class": "Words", "main_metric": "f1", "data": "rte", "pipeline_tag": None}
    assert description.trained_parameters == {"experts": 128, "router": 256, "head": 51, "backbone": 0}
    assert description.written_by == __version__


def test_unknown_config_class_is_an_error_that_lists_the_known(saved):
    rewrite(saved, config={"class": "os.system"})
    with pytest.raises(ValueError, match=r"config class 'os.system' is unknown; known: .*FourierMoEConfig"):
        load_adapter(Transformer(), saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"top_k": 77}},
        {"config": {"unheard_of": 1}},
        {"config": {"top_k": "two"}},
        {"config": None},
        {"config": []},
        {"class_names": "abc"},
        {"metrics": 3},
        {"backbone": 1},
        {"task": []},
        {"backbone_fingerprint": None},
    ],
    ids=str,
)
def test_impossible_description_behind_a_valid_checksum_is_an_error(saved, changes):
    rewrite(saved, **changes)
    with pytest.raises(ValueError, match=r"adapter.safetensors cannot be read as an adapter description"):
        describe_adapter(saved)


def test_description_that_a_later_package_wrote_says_so(saved):
    rewrite(saved, fourier_moe_version="9.1", config={"unheard_of": 1})
    with pytest.raises(ValueError, match=rf"written by fourier_moe 9.1, this is {__version__}: .*unheard_of"):
        describe_adapter(saved)
    rewrite(saved, format_version=3)
    with pytest.raises(ValueError, match=r"format_version 3, newer than this package reads \(2\); upgrade fourier_moe"):
        describe_adapter(saved)
    rewrite(saved, format_version=1)
    with pytest.raises(ValueError, match="format_version is 1, and the first is 2"):
        describe_adapter(saved)


def test_tensors_that_lost_their_description_are_no_adapter(saved):
    (saved / TENSORS).write_bytes(save(load_file(saved / TENSORS)))
    refused(saved, TENSORS)


# ---------------------------------------------------------------- interruptions and full disks


class Killed(BaseException):
    pass


def kill_at(patch, moment):
    """The process dies where it would change the disk for the `moment`-th time: nothing follows, not even cleaning up."""
    changes = itertools.count()

    def dying(original):
        def call(*args, **kwargs):
            if next(changes) >= moment:
                raise Killed
            return original(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink"):
        patch.setattr(os, name, dying(getattr(os, name)))
    patch.setattr(file_writing.Path, "unlink", lambda self, missing_ok=False: os.unlink(self) if self.exists() else None)
    patch.setattr(file_writing, "_remove_abandoned", lambda path: None)


def test_interruption_at_any_moment_leaves_the_old_adapter_or_the_new_one(tmp_path, monkeypatch):
    x = tokens(4, 5, 16)
    outputs = {"old": trained()(x), "new": other_adapter()(x)}
    found = []
    for moment in itertools.count():
        directory = tmp_path / str(moment)
        save_adapter(trained(), directory)
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            try:
                save_adapter(other_adapter(), directory)
                break  # it was done before
            except Killed:
                pass
        model = Transformer().eval()
        load_adapter(model, directory)
        found += [name for name, output in outputs.items() if torch.equal(model(x), output)]
        save_adapter(other_adapter(), directory)  # and the next save is like any other
        assert sorted(path.name for path in directory.iterdir()) == [CARD, DESCRIPTION, TENSORS]
        load_adapter(Transformer(), directory)
    # Three files written, the old copy removed, three put in place, the directory brought to the disk.
    assert len(found) == moment == 8
    assert found == sorted(found, reverse=True)  # old until some moment, then new
    assert set(found) == {"old", "new"}


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_full_disk_keeps_the_old_adapter_removes_what_it_wrote_and_names_the_file(saved, monkeypatch, fails_at):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    calls = []

    def fsync(_):
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    name = (TENSORS, DESCRIPTION, CARD)[fails_at - 1]
    with pytest.raises(OSError, match=rf"No space left on device; what was there before is kept: .*adapter/{name}") as caught:
        save_adapter(other_adapter(), saved)
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"what was there before is kept: .*file/adapter"):
        save_adapter(trained(), tmp_path / "file" / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_processes_than_the_first_write_nothing_but_refuse_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    save_adapter(trained(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model = trained()
    with torch.no_grad():
        adapters(model)["layers.1.attention.v_proj"].experts.coefficients[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    save_adapter(trained(), tmp_path / "adapter")
    load_adapter(Transformer(), tmp_path / "adapter")
