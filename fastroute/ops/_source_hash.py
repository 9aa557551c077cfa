import hashlib
from pathlib import Path

# The folders of csrc that the operators' library, those of the CPU and that of CUDA are built from.
OPERATORS, CPU, CUDA = ("ops", "triton", "cuda"), ("cpu",), ("cuda",)


def source_hash(root: Path, *folders: str) -> str:
    """Return a hash of what a library in the checkout `root` is built from: csrc, its `folders`, and the schemas."""
    digest = hashlib.sha256((root / "fastroute/ops/schemas.inc").read_bytes())
    for path in sorted(path for folder in ("", *folders) for path in (root / "csrc" / folder).glob("*")):
        if path.suffix in {".cpp", ".cu", ".h", ".cuh"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
