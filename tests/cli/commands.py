"""Commands as tests run them, in this process or another."""

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from fastroute.cli import app

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
