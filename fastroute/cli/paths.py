"""`fastroute paths`: estimate how many paths the routers of a checkpoint need."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fastroute.cli.common import COUNT, DataDirOption, DatasetOption, WorkersOption, plain_errors
from fastroute.cli.errors import escaped, standard_output
from fastroute.cli.trained import OwnModelOption, check_finite, load_trained


def paths(
    checkpoint: Annotated[Path, typer.Argument(help="Of `fastroute train`.")],
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    model: OwnModelOption = None,
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=1, max=COUNT)] = 128,
    workers: WorkersOption = None,
) -> None:
    """Estimate how many paths each router of a network needs, from its gates over the validation images.

    For each incoming path, "used" is the number of outgoing paths that all images together spread over. "clusters" is
    the number of kinds of images that its gates distinguish, near 1 for gates that hardly differ. "needed" is one more
    than the effective number of independent ways in which the gates vary over images: about as many paths would
    suffice, since the gates of the others follow from theirs.
    """
    with plain_errors():
        from fastroute.diagnostics.statistics import needed_paths
        from fastroute.training.checkpoints import read_checkpoint
        from fastroute.visualize.collect import check_gates, collect_routing

        given = load_trained(
            checkpoint,
            read_checkpoint(checkpoint, "checkpoint"),
            dataset=dataset,
            data_dir=data_dir,
            batch_size=batch_size,
            workers=workers,
            model=model,
        )
        check_finite(given.network, checkpoint)
        console = standard_output()
        console.print(escaped(given.images), soft_wrap=True, highlight=False)
        with console.status("routing the validation images"):
            routing = collect_routing(given.network, given.loader)
        check_gates(routing)
    table = Table("router", "from", title="paths that the gates need", title_justify="left")
    for column in ("paths", "used", "clusters", "needed"):
        table.add_column(column, justify="right")
    for name, statistics in routing.statistics().items():
        # `needed_paths` does not depend on the size of the differences: gates alike for all images need one path.
        alike = (statistics.peak - statistics.trough).amax(1) < 0.005
        needed = needed_paths(routing.gates[name]).masked_fill(alike, 1)
        numbers = statistics.used_paths, statistics.effective_clusters, needed
        for i, row in enumerate(zip(*(column.tolist() for column in numbers), strict=True)):
            first = ("", "") if i else (escaped(name), str(statistics.gates.shape[1]))
            table.add_row(first[0], str(i + 1), first[1], *(f"{number:.2f}" for number in row))
        table.add_section()
    console.print(table)
