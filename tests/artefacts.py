"""Keep what tests compile in build/tests, for the other processes of a run and for later runs."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

FOLDER = Path(__file__).parents[1] / "build" / "tests"


def artefact(name: str, sources: Iterable[object], build: Callable[[Path], object]) -> Path:
    """Return a folder filled by `build`, which is called only if there is none of the same sources yet.

    Sources are files, compared by content, and other values, compared by their text.
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
