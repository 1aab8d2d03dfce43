"""Adapters on the Hugging Face hub: fetched through its own cache on this disk, pushed to an imitation."""

import inspect
import socket
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from fourier_moe_models import Transformer, tokens, trained
from huggingface_hub import errors

from fourier_moe import describe_adapter, load_adapter, push_adapter, save_adapter
from fourier_moe.hub import local_directory

COMMIT, NEWER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache as huggingface_hub lays it out, with two commits of owner/name; main is the first."""
    directory = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(directory))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = directory / "models--owner--name"
    for commit, metrics in ((COMMIT, {"accuracy": 0.25}), (NEWER, {"accuracy": 0.5})):
        saved = save_adapter(trained(), tmp_path / commit, metrics=metrics)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in saved.iterdir():
            blob = repository / "blobs" / f"{commit}-{path.name}"
            blob.parent.mkdir(exist_ok=True)
            path.rename(blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    (repository / "refs/newer").write_text(NEWER)
    return repository


@pytest.mark.parametrize(
    ("path", "accuracy"),
    [
        ("hf://owner/name", 0.25),
        ("hf://owner/name@main", 0.25),
        ("hf://owner/name@newer", 0.5),
        (f"hf://owner/name@{NEWER}", 0.5),
    ],
)
def test_adapter_is_read_from_the_revision_that_is_asked_for(cache, path, accuracy):
    model, x = Transformer().eval(), tokens(4, 5, 16)
    assert load_adapter(model, path).metrics == describe_adapter(path).metrics == {"accuracy": accuracy}
    assert torch.equal(model(x), trained()(x))


@pytest.mark.parametrize("path", ["hf://owner/other", "hf://owner/name@missing", f"hf://owner/name@{'c' * 40}"])
def test_what_is_not_in_the_cache_without_a_network_is_one_line(cache, path):
    with pytest.raises(ValueError, match=rf"{path} cannot be fetched: .*fetch it where there is a network, and give") as caught:
        load_adapter(Transformer(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["hf://", "hf://name", "hf://owner/name@", "hf://a/b/c", "hf://owner/name@a@b", "hf://o w/n"])
def test_path_of_another_form_is_an_error(path):
    with pytest.raises(ValueError, match="must be hf://owner/name or hf://owner/name@revision"):
        local_directory(path)


def test_damaged_file_in_the_cache_is_an_error(cache):
    blob = cache / "blobs" / f"{COMMIT}-adapter.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"snapshots/a+/adapter.safetensors is damaged"):
        describe_adapter("hf://owner/name")


def hub_error(kind, message):
    response = SimpleNamespace(headers={}, request=None, status_code=404, text="", json=dict)
    return kind(message, response=response)


@pytest.mark.parametrize(
    "error",
    [
        hub_error(errors.RepositoryNotFoundError, "404 Client Error\n\nRepository Not Found\nfor url"),
        hub_error(errors.RevisionNotFoundError, "Revision Not Found"),
        hub_error(errors.GatedRepoError, "Access is restricted"),
        ConnectionError("no route"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_answers_is_one_line(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=rf"hf://owner/name cannot be fetched: {type(error).__name__}: ") as caught:
        describe_adapter("hf://owner/name")
    assert "\n" not in str(caught.value)


def test_only_the_adapters_own_files_are_fetched(tmp_path, monkeypatch):
    saved, calls = save_adapter(trained(), tmp_path), []

    def snapshot_download(*args, **options):
        inspect.signature(original).bind(*args, **options)
        calls.append(options)
        return str(saved)

    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    describe_adapter("hf://owner/name@v1")
    assert calls[0]["allow_patterns"] == ["adapter.safetensors", "adapter.json"]
    assert calls[0]["revision"] == "v1"


# ---------------------------------------------------------------- pushing


class FakeHub:
    """In the place of HfApi: takes what the real one would take, and keeps it."""

    def __init__(self, monkeypatch, refuse=None):
        self.repositories, self.files, self.refuse = {}, {}, refuse
        real = huggingface_hub.HfApi
        hub = self

        class Api:
            def __init__(self, **options):
                inspect.signature(real).bind(**options)

            def create_repo(self, *args, **options):
                inspect.signature(real.create_repo).bind(self, *args, **options)
                if hub.refuse:
                    raise hub.refuse
                hub.repositories[args[0]] = options

            def upload_folder(self, **options):
                inspect.signature(real.upload_folder).bind(self, **options)
                paths = [path.name for path in options["folder_path"].iterdir()]
                sent = huggingface_hub.utils.filter_repo_objects(paths, allow_patterns=options["allow_patterns"])
                hub.files[options["repo_id"]] = sorted(sent), options["commit_message"]
                return SimpleNamespace(oid=COMMIT)

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def test_push_sends_the_adapters_files_and_nothing_else(tmp_path, monkeypatch):
    hub, saved = FakeHub(monkeypatch), save_adapter(trained(), tmp_path)
    (saved / "secret.txt").touch()
    (saved / "adapter.json.part").touch()
    assert push_adapter(saved, "owner/name") == f"hf://owner/name@{COMMIT}"
    assert hub.repositories == {"owner/name": {"private": True, "exist_ok": True}}
    assert hub.files["owner/name"] == (["README.md", "adapter.json", "adapter.safetensors"], "Adapter: FourierMoEConfig")
    push_adapter(str(saved), "owner/name", private=False, commit_message="better")
    assert hub.repositories["owner/name"]["private"] is False
    assert hub.files["owner/name"][1] == "better"


def test_damaged_adapter_is_not_pushed(tmp_path, monkeypatch):
    hub, saved = FakeHub(monkeypatch), save_adapter(trained(), tmp_path)
    path = saved / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        push_adapter(saved, "owner/name")
    assert hub.repositories == {}


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "hf://owner/name", ""])
def test_repository_of_another_form_is_an_error(tmp_path, monkeypatch, repo_id):
    FakeHub(monkeypatch)
    with pytest.raises(ValueError, match=r"repo_id='.*' must be owner/name"):
        push_adapter(save_adapter(trained(), tmp_path), repo_id)


def test_what_the_hub_refuses_is_one_line(tmp_path, monkeypatch):
    FakeHub(monkeypatch, refuse=hub_error(errors.HfHubHTTPError, "401 Client Error\nInvalid token"))
    with pytest.raises(ValueError, match=r"cannot be pushed to owner/name: HfHubHTTPError: 401 .*Invalid token.*auth login"):
        push_adapter(save_adapter(trained(), tmp_path), "owner/name")


def test_package_does_not_import_the_hub_before_it_is_needed():
    import subprocess
    import sys

    code = "import sys, fourier_moe; sys.exit('huggingface_hub' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_network_is_noticed_by_the_real_client(tmp_path, monkeypatch):
    """Online, with an empty cache, and every connection refused."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    def refuse(*_, **__):
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(ValueError, match=r"hf://owner/name cannot be fetched: .*fetch it where there is a network, and give"):
        describe_adapter("hf://owner/name")
