"""Results of a benchmark run, and their file format."""

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import fastroute
from fastroute._files import replacing

OURS = "fastroute"
"""The name of our time among those of a row."""


@dataclass(frozen=True)
class Row:
    """Measurements of one case.

    suite: the kind of case; rows of a suite have the same labels.
    labels: describe the case, such as `{"operator": "mix", "dtype": "float32", …}`.
    ms: contender → median milliseconds of consecutive calls; on a GPU, of calls with flushed caches. "fastroute" is
        this package, "copy" a copy of `floor_bytes`.
    floor_bytes: minimal number of bytes read and written, if memory is the bound.
    saved_bytes: contender → bytes saved for backward.
    peak_bytes: contender → peak of allocated bytes, if the device reports it.
    facts: further measurements.
    cold_ms: contender → median milliseconds of single calls, each after the other contenders have used the caches;
        empty on a GPU.
    """

    suite: str
    labels: dict
    ms: dict[str, float]
    floor_bytes: int | None = None
    saved_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    cold_ms: dict[str, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return case_id(self.labels)

    @property
    def gb_per_s(self) -> float | None:
        """Effective memory bandwidth: `floor_bytes` over the time."""
        return self.floor_bytes / self.ms["fastroute"] / 1e6 if self.floor_bytes is not None else None

    def times_as_fast_as(self, peer: str, cold: bool = False) -> float | None:
        """Return the peer's time over ours; for the copy, this is the share of its speed."""
        ms = self.cold_ms if cold else self.ms
        return ms[peer] / ms["fastroute"] if peer in ms else None


@dataclass
class Result:
    """Rows of a run, with machine, versions and settings."""

    machine: dict
    versions: dict
    commit: str | None
    settings: dict
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def here(cls, device: torch.device, **settings) -> "Result":
        """Return a result without rows, for this machine and checkout."""
        versions = {"fastroute": fastroute.__version__, "torch": str(torch.__version__)}
        versions |= {"python": platform.python_version()}
        if device.type == "cuda":
            versions["cuda"] = torch.version.cuda
        return cls(machine(device), versions, commit(), settings)

    def save(self, path: str | Path) -> None:
        """Write the result to a JSON file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not the result of a benchmark.
        """
        path = Path(path)
        if not path.is_file():
            what = "it is a folder" if path.is_dir() else "there is no such file"
            raise FileNotFoundError(f"result is {path}; {what}")
        try:
            values = json.loads(path.read_text())
            if not isinstance(values, dict) or not isinstance(values.get("rows"), list):
                raise ValueError("it has no list of rows")
            result = cls(**{**values, "rows": [Row(**row) for row in values["rows"]]})
            for row in result.rows:
                _check_row(row)
            return result
        except (ValueError, TypeError) as error:
            raise ValueError(f"result is {path}; it must be a file that `fastroute bench` wrote ({error})") from None


def _check_row(row: Row) -> None:
    """Raise ValueError unless a row has labels, and times above 0, ours among them."""
    if not isinstance(row.labels, dict):
        raise ValueError(f"a row's labels are {row.labels!r}; they must be names and values")
    for times in (row.ms, row.cold_ms):
        if not isinstance(times, dict) or not all(isinstance(ms, (int, float)) and ms > 0 for ms in times.values()):
            raise ValueError(f"the times of {row.id} are {times!r}; they must be milliseconds above 0")
    if OURS not in row.ms:
        raise ValueError(f"{row.id} has no time of {OURS!r}")


def case_id(labels: Mapping[str, object]) -> str:
    """Return the labels as one word, such as "mix-forward-native-float32-contiguous-128x16x32x32-2x2"."""
    return "-".join(label_text(value) for value in labels.values())


def label_text(value: object) -> str:
    """Return a label as text; tuples as "128x16x32x32"."""
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def machine(device: torch.device) -> dict:
    """Return the properties of a device: processor, capability, and its threads or memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": "cuda",
            "processor": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return {
        "device": device.type,
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """Return the commit of this checkout, with "+changes" if files differ from it; None without git."""
    root = Path(fastroute.__file__).parents[1]
    if not (root / ".git").exists():  # installed, possibly inside another repository
        return None

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
