"""The training of `fastroute demo`: one path and two routed paths on handwritten digits."""

import statistics
from pathlib import Path

import pytorch_lightning as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastroute._errors import printable
from fastroute.data.module import ImageDataModule
from fastroute.diagnostics.routing import gates_table, mean_gates, routing_share
from fastroute.training.classifier import RoutingClassifier
from fastroute.training.trainer import fit

NETWORKS = ("resnet20", "resnet20_cc2")


def demo(output: str | Path, epochs: int = 20, console: Console | None = None) -> None:
    """Train `NETWORKS` on scikit-learn's digits by a one-cycle schedule on the CPU, and print a comparison.

    Args:
        output: the folder to write into; each network gets its own folder in it.
        epochs: of each network.
        console: to print on; None is the standard output.
    """
    console, output = console or Console(), Path(output)
    data = ImageDataModule("digits")
    data.setup()
    table = Table("network", title="trained on digits", title_justify="left")
    for column in ("parameters", "error %", "images/s", "routing, % of step"):
        table.add_column(column, justify="right")
    gates = {}
    for name in NETWORKS:
        console.print(f"[bold]{name}[/]")
        pl.seed_everything(0, verbose=False)
        module = RoutingClassifier(name, data.num_classes, data.in_chans, data.img_size, sched="onecycle")
        rows = fit(module, data, epochs=epochs, output=output / name, accelerator="cpu", console=console)
        share = routing_share(module.model, next(iter(data.train_dataloader())))
        table.add_row(
            name,
            f"{sum(p.numel() for p in module.model.parameters()):,}",
            f"{rows[-1]['val_error']:.2f}",
            f"{statistics.median(row['images_per_s'] for row in rows):,.0f}",
            f"{100 * share:.1f}",
        )
        gates |= mean_gates(module.model, data.val_dataloader())
    console.print(table, gates_table(gates, title=f"mean gates of {NETWORKS[-1]}"))
    console.print(
        f"checkpoints and summary.csv: {escape(printable(output.resolve()))}/{{{','.join(NETWORKS)}}}", soft_wrap=True
    )
