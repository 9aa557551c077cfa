import pytest
from typer.testing import CliRunner

from fastroute.cli import app
from tests.threads import small_networks  # noqa: F401


@pytest.fixture(scope="package")
def run():
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})

    return run


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory, run):
    """Train a network with two paths for an epoch on digits."""
    folder = tmp_path_factory.mktemp("runs")
    done = run(*("train", "resnet20_cc2", "-b", 256, "--epochs", 1), "--output", folder, "--experiment", "digits")
    assert done.exit_code == 0, done.output
    return folder / "digits" / "best.ckpt"


@pytest.fixture(scope="package")
def page(checkpoint, run):
    """Write the report of the network, compared with itself."""
    done = run("report", checkpoint, "--gates", 2, "--before", checkpoint, "--runs", checkpoint.parents[1])
    assert done.exit_code == 0, done.output
    path = checkpoint.parent / "report" / "report.html"
    assert str(path) in done.output
    return path
