"""Personal policies are tested on federations that can be done by hand, and in runs with everything observed."""

import sys
from pathlib import Path

import pytest
import torch

for folder in ("strategies", "laws"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Bits depend on the number of threads; an actor and an inline run have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
