"""What every test shares: no network, and the trainer in this process with its files in the test's own directory."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent
LOCAL = ("127.0.0.1", "::1", "localhost", None)

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
sys.path.insert(0, str(REPOSITORY))  # before tests/, whose folders are called like the packages


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Look-ups and connections fail, and so does the test that asked, even where a library gets over it."""
    asked: list[Any] = []
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            asked.append(address)
            raise OSError(f"tests have no network: {address}")
        connect(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in LOCAL:
            asked.append(host)
            raise socket.gaierror(f"tests have no network: {host}")
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield
    assert asked == [], "the network was asked for"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits
    torch.ones(1, requires_grad=True).backward()  # autograd counts devices once, and forks nothing if a library has added one
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures at the end of training, which take longer than a short run. `trained` has them."""
    from lightning_modules.callbacks import RouterLoad, SpectralOccupancy

    for callback, draw in ((RouterLoad, "_draw"), (SpectralOccupancy, "_figures")):
        monkeypatch.setattr(callback, draw, lambda *_: {})


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, no_figures: None) -> Callable[..., Any]:
    """`main("fit", "--config", ...)`: the command `python train.py fit --config ...` in the repository, without its bar."""
    import train

    monkeypatch.chdir(REPOSITORY)  # configs name files in examples/ and configs/
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return lambda *words: train.main([*words, "--trainer.enable_progress_bar", "false"])


@pytest.fixture
def run(main: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`main` for commands other than compare, writing to tmp_path instead of runs/."""
    return lambda *words: main(*words, "--trainer.logger.init_args.save_dir", str(tmp_path))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo after one epoch of 3 steps: the CLI, for tests that only look."""
    import train

    words = [
        "--trainer.logger.init_args.save_dir",
        str(tmp_path_factory.mktemp("trained")),
        "--trainer.enable_progress_bar",
        "false",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", ["train.py"])
        return train.main(
            ["fit", "--config", "configs/demo.yaml", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", *words]
        )


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_modules import AdaptationModule

    monkeypatch.setattr(AdaptationModule, "training_step", lambda *_: pytest.fail("training began"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A stand-in of the Hugging Face hub, asked by huggingface_hub's real client with an empty cache in `tmp_path / "hub"`."""
    from support import hub_server

    server = hub_server.serve()
    hub_server.connect(monkeypatch, tmp_path / "hub", server.url)
    yield server
    server.shutdown()
    server.server_close()
