"""What tests compile, kept in build/tests for the other processes of a run and for the runs after it."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

FOLDER = Path(__file__).parents[1] / "build" / "tests"


def artefact(name: str, sources: Iterable[object], build: Callable[[Path], object]) -> Path:
    """Return the folder that `build` has filled, which is called where none is left of the same sources.

    Sources are files, of which the contents count, and any other values, of which the text does.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes() if isinstance(source, Path) else str(source).encode())
        digest.update(b"\0")
    folder = FOLDER / f"{name}-{digest.hexdigest()[:16]}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=FOLDER, prefix=f"{name}-") as unfinished:
                part = Path(unfinished) / name
                part.mkdir()
                build(part)
                part.rename(folder)
    return folder
