"""Work in threads that begin at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor

THREADS = 8


def together(work, count=THREADS):
    """Run work(0), work(1), ... in threads that begin at the same moment."""
    barrier = threading.Barrier(count)

    def begin(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))
