import hashlib
from pathlib import Path

# Folders of csrc from which the operator library, the CPU libraries and the CUDA library are built.
OPERATORS, CPU, CUDA = ("ops", "triton", "cuda"), ("cpu",), ("cuda",)


def source_hash(root: Path, *folders: str) -> str:
    """Return a hash of the sources of a library in the checkout `root`: csrc, its `folders`, and the schemas."""
    digest = hashlib.sha256((root / "fastroute/ops/schemas.inc").read_bytes())
    for path in sorted(path for folder in ("", *folders) for path in (root / "csrc" / folder).glob("*")):
        if path.suffix in {".cpp", ".cu", ".h", ".cuh"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
