"""Long attacks on the whole package; `make attack` runs them, `make test` does not."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the attacks out of other runs altogether: they import Triton before its own tests can."""
    return None if config.option.markexpr == "attack" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.attack)
