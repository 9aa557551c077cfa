"""Read rows of `gpu_check.py`, and keep the ones that matter in a result file, without importing torch.

A result has machine, versions, commit, date, driver and command of a run; "tests" has the outcomes by file, "errors"
what was not finished, and the other lists the rows of their kind.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"
KINDS = ("sanitizer", "host", "speed", "profile", "step")
MAPS = {FORWARD: 4, BOTH: 10}  # maps read or written, 2 → 2 paths
# Microseconds of the host for one call of cross_connect on a GPU: 2 paths to 2, 16 channels, 4 × 4 positions.
HOST_BUDGET = {"native": {FORWARD: 12, BOTH: 50}, "triton": {FORWARD: 40, BOTH: 130}}
BACKWARD_MAPS = MAPS[BOTH] - MAPS[FORWARD]
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
DISTURBED = 1.1  # a copy that takes this many times the least one shows that the measurement was disturbed


def read(path: Path) -> list[dict]:
    """Return the rows of a file that `gpu_check.py` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"rows are {path}; there is no such file")
    try:
        rows = [json.loads(text) for text in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"rows are {path}; it must be a rows.jsonl that gpu_check.py wrote ({error})") from None
    return rows


def of_kind(rows: Iterable[dict], kind: str) -> list[dict]:
    return [row for row in rows if row.get("kind") == kind]


def outcomes(rows: Iterable[dict]) -> Counter:
    """Count the tests' outcomes."""
    return Counter(row.get("outcome", "failed") for row in of_kind(rows, "test"))


def result_of(rows: Sequence[dict], **about: str) -> dict:
    """Return the result of one or more runs on the same card.

    Args:
        rows: all their rows; of rows that measure the same, the last counts.
        about: date, driver and command.

    Raises:
        ValueError: no row describes the machine.
    """
    machines = [row for row in of_kind(rows, "machine") if "result" in row]
    if not machines:
        raise ValueError("no row describes the machine: give the rows of a whole run of gpu_check.py")
    here = machines[-1]["result"]
    result = {"machine": here["machine"], "versions": here["versions"] | {"triton": machines[-1]["triton"]}}
    result |= {"commit": here["commit"], **about}
    tests: dict[str, Counter] = {}
    for row in {row["case"]: row for row in of_kind(rows, "test")}.values():
        tests.setdefault(row["case"].partition("::")[0], Counter())[row.get("outcome", "failed")] += 1
    result["tests"] = [{"file": file, **dict(sorted(tests[file].items()))} for file in sorted(tests)]
    for kind in KINDS:
        result[kind] = list({_identity(row): _kept(row) for row in of_kind(rows, kind)}.values())
    result["profile"] = [row for row in result["profile"] if row.get("us") != 0]  # calls of the host
    failed = [row for row in rows if "error" in row and row.get("kind") not in ("test", *KINDS)]
    result["errors"] = [{"where": row.get("case") or row.get("job"), "error": row["error"]} for row in failed]
    return result


def _identity(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("case", "backend", "kernel", "network", "contender"))


def _kept(row: dict) -> dict:
    left_out = ("at", "stage", "job", "kind", "share_of_copy")
    return {name: _brief(value) for name, value in row.items() if name not in left_out}


def _brief(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def save(result: dict, path: Path) -> None:
    """Write a result atomically, one row a line."""
    parts = []
    for name, value in result.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value) + "\n ]"
        parts.append(f' "{name}": {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    temporary.replace(path)


def load(path: Path) -> dict:
    """Read a result.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a result.
    """
    if not path.is_file():
        raise FileNotFoundError(f"result is {path}; there is no such file")
    try:
        result = json.loads(path.read_text())
    except ValueError:
        result = None
    if not isinstance(result, dict) or not {"machine", "versions", "tests", *KINDS} <= result.keys():
        raise ValueError(f"result is {path}; it must be a result that write_gpu_tables.py wrote")
    return result


class Speeds:
    """Device time by case, direction and backend, and the share of a copy's speed.

    A case is "256x64x56x56 bfloat16 contiguous". The copy is the least among rows of the same bytes and direction: a
    single one may have been disturbed. The backward is the difference of forward+backward and forward; the copy of its
    6 maps is interpolated between those of 4 and 10.

    Args:
        rows: with kind "speed".
    """

    def __init__(self, rows: Iterable[dict]):
        self._rows: dict[tuple, dict] = {}
        self._copies: dict[tuple, float] = {}
        for row in rows:
            if "us" not in row:  # it failed before it was timed
                continue
            case, _, direction = row["case"].rpartition(" ")
            self._rows[case, direction, row["backend"]] = row
            key = self._moved(case, direction), direction
            self._copies[key] = min(self._copies.get(key, math.inf), row["copy_us"])
        self.cases = list(dict.fromkeys(case for case, _, _ in self._rows))
        self.backends = list(dict.fromkeys(backend for _, _, backend in self._rows))

    @staticmethod
    def _moved(case: str, direction: str) -> int:
        shape, dtype, _ = case.split()
        return MAPS[direction] * math.prod(map(int, shape.split("x"))) * BYTES[dtype]

    def copy_us(self, case: str, direction: str) -> float | None:
        if direction == BACKWARD:
            few, many = (self.copy_us(case, way) for way in (FORWARD, BOTH))
            step = (BACKWARD_MAPS - MAPS[FORWARD]) / (MAPS[BOTH] - MAPS[FORWARD])
            return None if few is None or many is None else few + step * (many - few)
        return self._copies.get((self._moved(case, direction), direction))

    def us(self, case: str, direction: str, backend: str) -> float | None:
        if direction == BACKWARD:
            few, many = (self.us(case, way, backend) for way in (FORWARD, BOTH))
            return None if few is None or many is None else many - few
        row = self._rows.get((case, direction, backend))
        return None if row is None else row["us"]

    def share(self, case: str, direction: str, backend: str) -> float | None:
        us, copy_us = self.us(case, direction, backend), self.copy_us(case, direction)
        return None if us is None or copy_us is None else copy_us / us

    def disturbed(self, case: str, direction: str, backend: str) -> bool:
        """Return whether the copy that was timed in turn with this one took a tenth longer than the least copy."""
        ways = (FORWARD, BOTH) if direction == BACKWARD else (direction,)
        rows = ((self._rows.get((case, way, backend)), self.copy_us(case, way)) for way in ways)
        return any(row is not None and row["copy_us"] > DISTURBED * least for row, least in rows)
