import logging
import os
import tempfile

import pytest


# Before any library reads them. No test reaches the network, and each process of tests keeps what it caches to itself.
CACHE = tempfile.TemporaryDirectory(prefix="vicmae_tests_")
os.environ.update({"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(name, None)


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: some tests wait for others' deaths, disks and time limits."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(autouse=True, scope="session")
def blank_pictures():
    """All over; `pictures.drawn` where they are looked at."""
    # Not above: the process that hands out the tests need not load it.
    from pictures import blank

    with blank():
        yield


@pytest.fixture(autouse=True)
def same_start():
    """For every test, whichever tests ran before it, and in whichever process."""
    import torch

    # The models here are too small for threads, which would only fight with those of other processes.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("vicmae_hf").setLevel(logging.NOTSET)  # scripts show more, to the end of their process
