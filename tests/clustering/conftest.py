import pytest

from tests.threads import one_thread


@pytest.fixture(autouse=True, scope="package")
def small_networks():
    with one_thread():
        yield
