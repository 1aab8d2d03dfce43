"""Two processes of a run, as torchrun starts them, but forked from the test: nothing is imported again."""

import io
import multiprocessing
import os
import socket
import traceback
from queue import Empty

import torch

from support.limits import HANGS_AFTER


def run_in_two(function, *args):
    """What `function(*args)` returns in each of two processes of one torch.distributed run."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_run, args=(rank, port, results, function, args)) for rank in range(2)]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < 2:
            rank, error, result = results.get(timeout=HANGS_AFTER)
            assert error is None, f"process {rank}:\n{error}"
            found[rank] = torch.load(io.BytesIO(result), weights_only=False)
    except Empty:
        raise AssertionError(f"only processes {sorted(found)} of 2 have ended") from None
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [found[0], found[1]]


def _run(rank, port, results, function, args):
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in torchrun.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    try:
        saved = io.BytesIO()  # the queue would hand over a tensor's memory, which ends with this process
        torch.save(function(*args), saved)
        results.put((rank, None, saved.getvalue()))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
