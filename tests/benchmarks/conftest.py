import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _fast_garbage_collection():
    """The benchmarks collect garbage between measurements, which takes long among the objects of a whole test session."""
    gc.freeze()
    yield
    gc.unfreeze()
