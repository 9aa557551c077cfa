"""`fastroute info`: print versions and backends."""

import platform

from rich.table import Table

import fastroute
from fastroute.cli.errors import escaped, standard_output


def info() -> None:
    """Print versions, and which backend serves which tensors, or why it cannot."""
    import torch

    from fastroute.ops._instruction_set import own_instruction_set

    console = standard_output()
    table = Table(show_header=False)
    table.add_row("fastroute", fastroute.__version__)
    table.add_row("torch", torch.__version__)
    table.add_row("Python", platform.python_version())
    table.add_row("CUDA of torch", torch.version.cuda or "none")
    table.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    table.add_row("CPU", f"{own_instruction_set().upper()}, {torch.get_num_threads()} threads")
    console.print(table)

    table = Table("device", "backend", "types", "serves", title="backends, first choice first", title_justify="left")
    for device, names in fastroute.backends.ORDER.items():
        for name in names:
            backend, answers = fastroute.backends.BACKENDS[name], {}
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                reason = backend.reason_against(torch.device(device), dtype)
                answers.setdefault(reason, []).append(str(dtype).removeprefix("torch."))
            for reason, types in answers.items():
                table.add_row(device, name, ", ".join(types), "yes" if reason is None else f"no: {escaped(reason)}")
        table.add_section()
    console.print(table)
