"""Read the folders of finished runs, and keep their results in a JSON file, one run on each line."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from fastroute._files import write_text


def read_folder(folder: Path) -> tuple[dict, list[dict[str, str]]]:
    """Return the options of a run, and the rows of its summary.

    Raises:
        FileNotFoundError: the folder lacks args.yaml or summary.csv.
    """
    options = yaml.safe_load((folder / "args.yaml").read_text())
    with (folder / "summary.csv").open(newline="") as file:
        return options, list(csv.DictReader(file))


def read_result(file: Path) -> list[dict]:
    """Return the runs of a result file, none if there is no such file."""
    return json.loads(file.read_text()) if file.is_file() else []


def write_result(file: Path, runs: Iterable[dict]) -> None:
    """Replace a result file atomically."""
    write_text(file, "[\n" + ",\n".join(f" {json.dumps(run)}" for run in runs) + "\n]\n")


def replaced(earlier: Iterable[dict], later: Iterable[dict], options: Sequence[str]) -> list[dict]:
    """Return all runs; a later one replaces an earlier one of the same options."""
    return list({tuple((name, run.get(name)) for name in options): run for run in (*earlier, *later)}.values())
