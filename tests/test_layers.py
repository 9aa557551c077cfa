"""Packages import those below them alone, as CONTRIBUTING.md draws it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def layers() -> list[list[str]]:
    """Read the drawing, from the top to the bottom."""
    drawing = re.search(r"```text\n(cli\n.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return [line.split() for line in drawing[1].splitlines()]


def imported(file: Path) -> set[str]:
    """Return the packages of fastroute that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        found |= {name.split(".")[1] for name in names if name.startswith("fastroute.")}
    return found


def test_every_package_is_drawn():
    packages = {path.parent.name for path in ROOT.glob("fastroute/*/__init__.py")}
    assert {name for layer in layers() for name in layer} == packages


def test_packages_import_those_below():
    depth = {name: k for k, layer in enumerate(layers()) for name in layer}
    for name in depth:
        for file in sorted((ROOT / "fastroute" / name).rglob("*.py")):
            above = {other for other in imported(file) & depth.keys() - {name} if depth[other] <= depth[name]}
            assert not above, f"{file.relative_to(ROOT)} imports {', '.join(sorted(above))}"
