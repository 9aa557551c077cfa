"""How many threads tests compute on."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: small networks are slower on several, and much slower if other work holds a processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="package")
def small_networks():
    """Imported by the conftest of a package whose tests train."""
    with one_thread():
        yield
