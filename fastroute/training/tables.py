"""Tables of a run: rows that are part of its checkpoints, and the CSV files they are written to."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl

from fastroute._files import replacing


class RowTable(pl.Callback):
    """Keep rows in the checkpoint, so that the file of a resumed run has those of the epochs before it too.

    Lightning's CSVLogger starts its file anew where a run is resumed.

    Args:
        path: the CSV file.

    Attributes:
        rows: a dict for each row.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows = list(state_dict["rows"])

    def write(self) -> None:
        """Replace the file by the rows so far."""
        write_csv(self.path, self.rows)


def best_first(rows: Sequence[dict], metric: str) -> list[dict]:
    """Return the rows that have a metric, the lowest first, earlier ones before equal later ones, NaN last."""
    return sorted((row for row in rows if metric in row), key=lambda row: (math.isnan(row[metric]), row[metric]))


def out_of_patience(rows: Sequence[dict], metric: str, patience: int) -> dict | None:
    """Return the best row if `patience` epochs or more after it were not better, else None.

    Args:
        rows: of the summary, in the order of the epochs.
        metric: a column of it; lower is better.
        patience: the number of epochs.
    """
    ranked = best_first(rows, metric)
    return ranked[0] if ranked and rows[-1]["epoch"] - ranked[0]["epoch"] >= patience else None


def write_csv(path: Path, rows: Sequence[dict], columns: Sequence[str] | None = None) -> None:
    """Write rows to a CSV file atomically.

    Args:
        path: the file to replace.
        rows: a dict for each row; a column that a row lacks is left empty.
        columns: by default those of all rows, in the order in which they first appear.

    Raises:
        OSError: the file cannot be written; it is then unchanged.
    """
    with replacing(path, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
