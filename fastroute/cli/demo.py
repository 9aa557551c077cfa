"""`fastroute demo`: train two networks on digits, and show the routers of one."""

from pathlib import Path
from typing import Annotated

import typer

from fastroute.cli.common import plain_errors
from fastroute.cli.errors import escaped, standard_output
from fastroute.cli.report import write_report


def demo(
    output: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each network.")] = 20,
) -> None:
    """Train one path and two routed paths on real handwritten digits, and compare them; show what the routers do."""
    with plain_errors():
        from fastroute.training.demo import NETWORKS, demo
    demo(output, epochs, standard_output())
    with plain_errors():
        page = write_report(output / NETWORKS[-1] / "best.ckpt", output / "report")
    standard_output().print(f"what its routers do: {escaped(page.resolve())}", soft_wrap=True)
