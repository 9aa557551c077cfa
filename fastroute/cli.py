"""The command line: `fastroute <command>`, or `python -m fastroute <command>`."""

import ctypes
import platform
import re
import sys
import time
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import torch

import fastroute
from fastroute._extras import extra

try:
    with extra("train", "the command line"):
        import typer
        import yaml
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        from fastroute.commands import bench
        from fastroute.commands.common import plain_errors
except ModuleNotFoundError as error:
    raise SystemExit(str(error)) from None

app = typer.Typer(
    help="Data-dependent routing for multi-path neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench.app, name="bench")


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a YAML file as defaults, which flags on the command line override."""
    if path is None:
        return None
    with plain_errors():
        if not path.is_file():
            raise FileNotFoundError(f"config is {path}; there is no such file")
        values = yaml.safe_load(path.read_text()) or {}
        if not isinstance(values, dict):
            raise ValueError(f"config is {path}; it must hold one `name: value` for each option")
        values = {str(name).replace("-", "_"): value for name, value in values.items()}
        options = {option.name for option in context.command.params} - {"config"}
        for name in values.keys() - options:
            near = get_close_matches(name, options, n=1)
            raise ValueError(
                f"config is {path}; there is no option {name!r}" + f"; did you mean {near[0]!r}?" * len(near)
            )
    context.default_map = values
    return path


def _milestones(value: str | None) -> list[int] | None:
    if value is None:
        return None
    items = [item for item in re.split(r"[\s,\[\]]+", value) if item]
    if not items or not all(item.isdigit() for item in items):
        raise typer.BadParameter(f"{value!r} is not a list of epochs, such as 80,150")
    return [int(item) for item in items]


@app.command()
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The network; `fastroute models` lists them.")],
    config: Annotated[
        Path | None,
        typer.Option("-c", "--config", is_eager=True, callback=_use_config, help="YAML file of defaults for all this."),
    ] = None,
    dataset: Annotated[Literal["digits", "imagefolder"], typer.Option(help="Where the images come from.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="For imagefolder: a folder with train/ and val/.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Logits. (default: the data's classes)")] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Size of the images. (default: 8 or 32)")] = None,
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", min=1)] = 128,
    workers: Annotated[int | None, typer.Option("-j", "--workers", min=1, help="Threads that decode images.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate at the start, or at the top of the cycle.")] = 0.1,
    momentum: Annotated[float, typer.Option()] = 0.9,
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    sched: Annotated[Literal["step", "onecycle"], typer.Option(help="Schedule of the learning rate.")] = "step",
    decay_milestones: Annotated[
        str | None, typer.Option(help="For step: epochs, such as 80,150. (default: 2/5 and 3/4 of all)")
    ] = None,
    decay_rate: Annotated[float, typer.Option(help="For step: the factor at each milestone.")] = 0.1,
    amp: Annotated[bool, typer.Option("--amp/--no-amp", help="Mixed precision.")] = False,
    amp_dtype: Annotated[Literal["bfloat16", "float16"], typer.Option()] = "bfloat16",
    channels_last: Annotated[bool, typer.Option("--channels-last/--no-channels-last")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 42,
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    experiment: Annotated[str | None, typer.Option(help="Folder of this run. (default: time, model, data)")] = None,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
    log_interval: Annotated[int, typer.Option(min=1, help="Steps between readings of the loss.")] = 50,
) -> None:
    """Train a network; write checkpoints, summary.csv and args.yaml."""
    console = Console()
    with plain_errors():
        import pytorch_lightning as pl

        from fastroute import training

        milestones = _milestones(decay_milestones)
        data = training.ImageDataModule(dataset, data_dir, batch_size, img_size, workers, seed)
        with console.status("reading the images"):
            data.setup()
        if num_classes is not None and num_classes < data.num_classes:
            raise ValueError(f"num_classes is {num_classes}; the data has {data.num_classes} classes")
        pl.seed_everything(seed, verbose=False)
        module = training.RoutingClassifier(
            model,
            num_classes or data.num_classes,
            data.in_chans,
            data.img_size,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            sched=sched,
            decay_milestones=milestones,
            decay_rate=decay_rate,
            channels_last=channels_last,
        )
        if resume is not None:
            training.check_resume(resume, module, epochs)
        folder = output / (experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{model}-{dataset}")
        if resume is not None and experiment is None:
            folder = resume.parent
        folder.mkdir(parents=True, exist_ok=True)
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in context.params.items()}
        (folder / "args.yaml").write_text(yaml.safe_dump(arguments))

    training.fit(
        module,
        data,
        epochs=epochs,
        output=folder,
        amp_dtype=amp_dtype if amp else None,
        resume=resume,
        log_interval=log_interval,
        console=console,
    )
    if gates := training.mean_gates(module.model, data.val_dataloader()):
        console.print(training.gates_table(gates, title="mean gates over the validation images"))
    console.print(f"last.ckpt, best.ckpt, summary.csv, args.yaml: {folder.resolve()}", soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="For each network.")] = 20,
) -> None:
    """Train one path and two routed paths on real handwritten digits, and compare them."""
    with plain_errors():
        from fastroute.training.demo import demo
    demo(output, epochs)


@app.command()
def models(pattern: Annotated[str, typer.Argument(help="A shell pattern, such as '*cc*'.")] = "*") -> None:
    """List the networks, with their parameters for 10 classes."""
    table = Table("network")
    table.add_column("parameters", justify="right")
    with torch.device("meta"):
        for name in fastroute.models.list_models(pattern):
            count = sum(p.numel() for p in fastroute.models.create_model(name).parameters())
            table.add_row(name, f"{count:,}")
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
                table.add_row(device, name, ", ".join(types), "yes" if reason is None else f"no: {escape(reason)}")
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
