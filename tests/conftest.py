import pytest
import torch


# The models here are too small for threads, which would only fight with those of other processes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """The same start for every test, whichever tests ran before it."""
    torch.manual_seed(0)
