"""The command line: `fastroute <command>`, or `python -m fastroute <command>`."""

import ctypes
import platform
import sys
from pathlib import Path
from typing import Annotated

import torch

import fastroute
from fastroute._extras import extra

try:
    with extra("train", "the command line"):
        import typer
        from rich.console import Console
        from rich.table import Table

        from fastroute.commands import bench
        from fastroute.commands.cluster import cluster
        from fastroute.commands.common import plain_errors
        from fastroute.commands.outside import Commands, shown
        from fastroute.commands.paths import paths
        from fastroute.commands.recipes import recipes
        from fastroute.commands.report import report, write_report
        from fastroute.commands.train import train
        from fastroute.commands.validate import validate
except ModuleNotFoundError as error:
    raise SystemExit(str(error)) from None

app = typer.Typer(
    cls=Commands,
    help="Data-dependent routing for multi-path neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FASTROUTE_DEBUG", help="Show the traceback of an error, too.")
    ] = False,
) -> None:
    """Data-dependent routing for multi-path neural networks."""


app.command()(train)
app.command()(validate)
app.command()(paths)
app.command()(recipes)
app.command()(cluster)
app.command()(report)
app.add_typer(bench.app, name="bench")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="For each network.")] = 20,
) -> None:
    """Train one path and two routed paths on real handwritten digits, and compare them; show what the routers do."""
    with plain_errors():
        from fastroute.training.demo import NETWORKS, demo
    demo(output, epochs)
    with plain_errors():
        page = write_report(output / NETWORKS[-1] / "best.ckpt", output / "report")
    Console().print(f"what its routers do: {shown(page.resolve())}", soft_wrap=True)


@app.command()
def models(pattern: Annotated[str, typer.Argument(help="A shell pattern, such as '*cc*'.")] = "*") -> None:
    """List the networks, with parameters and multiply-accumulates for one image as the thesis has them."""
    table = Table("network")
    for column in ("parameters", "thesis, M", "MACs, M", "table"):
        table.add_column(column, justify="right")
    registry = fastroute.models
    with torch.device("meta"), plain_errors():
        if not registry.list_models(pattern):
            raise ValueError(f"pattern is {pattern!r}; there is no such network")
        for name in registry.list_models(pattern):
            info, model = registry.model_info(name), registry.create_model(name)
            count = sum(parameter.numel() for parameter in model.parameters())
            macs = registry.count_macs(model, (3, info.img_size, info.img_size)) / 1e6
            table.add_row(name, f"{count:,}", info.params, f"{macs:,.1f}", info.table)
    Console().print(table)


@app.command()
def info() -> None:
    """Print versions, and which backend serves which tensors, or why it cannot."""
    console = Console()
    table = Table(show_header=False)
    table.add_row("fastroute", fastroute.__version__)
    table.add_row("torch", torch.__version__)
    table.add_row("Python", platform.python_version())
    table.add_row("CUDA of torch", torch.version.cuda or "none")
    table.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    table.add_row("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    console.print(table)

    table = Table("device", "backend", "types", "serves", title="backends, first choice first", title_justify="left")
    for device, names in fastroute.backends.ORDER.items():
        for name in names:
            backend, answers = fastroute.backends.BACKENDS[name], {}
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                reason = backend.reason_against(torch.device(device), dtype)
                answers.setdefault(reason, []).append(str(dtype).removeprefix("torch."))
            for reason, types in answers.items():
                table.add_row(device, name, ", ".join(types), "yes" if reason is None else f"no: {shown(reason)}")
        table.add_section()
    console.print(table)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of handing it back to the system after every step.

    Each step asks for the same memory again, and mapping it page by page took about 8 % of a CPU training step of
    resnet20_cc2. Other C libraries have no `mallopt`, and are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc allows


def main() -> None:
    if sys.argv[1:2] != ["bench"]:  # which measures what a user's own program would see, unless told otherwise
        keep_freed_memory()
    app(prog_name="fastroute")
