import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Layers this small lose by being shared out, and much where other work holds a processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
