"""`fastroute models`: list the networks."""

from typing import Annotated

import typer
from rich.table import Table

import fastroute
from fastroute.cli.common import plain_errors
from fastroute.cli.errors import escaped, standard_output


def models(pattern: Annotated[str, typer.Argument(help="A shell pattern, such as '*cc*'.")] = "*") -> None:
    """List the networks, with parameters and multiply-accumulates for one image as the thesis has them."""
    import torch

    table = Table("network")
    for column in ("parameters", "thesis, M", "MACs, M", "table"):
        table.add_column(column, justify="right")
    registry, missing = fastroute.models, {}
    with torch.device("meta"), plain_errors():
        if not registry.list_models(pattern):
            raise ValueError(f"pattern is {pattern!r}; there is no such network")
        for name in registry.list_models(pattern):
            info = registry.model_info(name)
            try:
                model = registry.create_model(name)
            except ModuleNotFoundError as error:
                table.add_row(name, "", info.params, "", info.table)
                missing.setdefault(str(error), []).append(name)
                continue
            count = sum(parameter.numel() for parameter in model.parameters())
            macs = registry.count_macs(model, (3, info.img_size, info.img_size)) / 1e6
            table.add_row(name, f"{count:,}", info.params, f"{macs:,.1f}", info.table)
    console = standard_output()
    console.print(table)
    for error, names in missing.items():
        count = "1 network is" if len(names) == 1 else f"{len(names)} networks are"
        console.print(f"{count} not counted: {escaped(error)}", soft_wrap=True, highlight=False)
