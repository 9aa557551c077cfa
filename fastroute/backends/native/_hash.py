import hashlib
from pathlib import Path


def source_hash(root: Path, folder: str) -> str:
    """A hash of the C++ and CUDA sources in `root` and in its `folder`, which the build writes into the libraries."""
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*"), *(root / folder).glob("*")]):
        if path.suffix in {".cpp", ".cu", ".h", ".cuh"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
