"""What the Triton kernels are expected to do on an H100, by the compiler and the launch tables, before a card says so.

    python -m benchmarks.triton_expected > fastroute/backends/triton/EXPECTED.md

compiles every kernel of every stage for sm_90 (minutes, no card needed) and writes the page.
"""

import importlib.metadata
import math

from tests.backends.test_triton_aot import reports_of, stage_cases

COPY = 3.0e12  # bytes a second of a copy on an H100
FROM_L2 = 5.5e12  # bytes a second of reads that hit L2
LATENCY = 0.7e-6  # seconds until a load from memory is there
LAUNCH, NEXT_LAUNCH = 2.0e-6, 1.0e-6  # seconds that a launch costs: the first one, and one that another hands on to
GATES = 1.5e-6  # seconds in which a resident or fused program makes the gates and no path moves
SMS, REGISTERS, THREADS, WARPS = 132, 65536, 2048, 64

READS = {  # kernel -> paths that it reads from memory, reads from L2 and writes, for 2 paths to 2
    "cross_connect_resident_fwd_kernel": (2, 0, 2),
    "cross_connect_fused_fwd_kernel": (2, 2, 2),
    "cross_connect_pool_fwd_kernel": (2, 0, 0),
    "mix_fwd_kernel": (0, 2, 2),
    "cross_connect_resident_bwd_kernel": (4, 0, 2),
    "cross_connect_fused_bwd_kernel": (4, 2, 2),
    "mix_bwd_kernel": (4, 0, 0),
    "cross_connect_inputs_bwd_kernel": (0, 2, 2),
}
LOADED_AT_ONCE = {  # kernel -> tiles, or blocks, of paths that a program has in flight
    "cross_connect_resident_fwd_kernel": ("tile", 2),
    "cross_connect_fused_fwd_kernel": ("block", 2),
    "cross_connect_pool_fwd_kernel": ("tile", 1),
    "mix_fwd_kernel": ("block", 2),
    "cross_connect_resident_bwd_kernel": ("tile", 4),
    "cross_connect_fused_bwd_kernel": ("block", 4),
    "mix_bwd_kernel": ("block", 4),
    "cross_connect_inputs_bwd_kernel": ("tile", 2),
}


def programs_at_once(report: dict) -> int:
    """Programs of a kernel that fit a multiprocessor: registers come in units of 8 a thread, shared memory is ample."""
    warps = report["num_warps"]
    return min(REGISTERS // (32 * warps * 8 * math.ceil(report["REG"] / 8)), WARPS // warps)


def occupancy(report: dict) -> tuple[float, int]:
    """Waves of a launch, and bytes of paths in flight on a multiprocessor."""
    programs, slots = math.prod(report["grid"]), SMS * programs_at_once(report)
    kind, tiles = LOADED_AT_ONCE[report["kernel"]]
    values = report["BC"] * report["BS"] if kind == "tile" else report["BLOCK"]
    return programs / slots, min(programs_at_once(report), math.ceil(programs / SMS)) * tiles * values * report[
        "itemsize"
    ]


def seconds(launches: list[dict], path_bytes: int) -> float:
    """Of all launches of one call. A launch moves its share of the batch at the rate of the copy, or of L2, or of what
    is in flight, and ends when the multiprocessor with the most programs has."""
    total, batch = 0.0, sum(report["grid"][0] for report in launches if report["kernel"] == launches[0]["kernel"])
    for index, report in enumerate(launches):
        total += LAUNCH if index == 0 else NEXT_LAUNCH
        if report["kernel"] not in READS:
            continue
        memory, l2, written = (count * path_bytes * report["grid"][0] / batch for count in READS[report["kernel"]])
        _, in_flight = occupancy(report)
        held = min(1.0, in_flight * SMS / LATENCY / COPY)
        share = math.prod(report["grid"]) / SMS
        full = share / math.ceil(share) if share > 1 else 1.0
        total += (memory + written) / (COPY * held * full) + l2 / (FROM_L2 * full)
        total += GATES if "resident" in report["kernel"] or "fused" in report["kernel"] else 0.0
    return total


def widths(report: dict, kind: str) -> str:
    return "/".join(str(width) for width in sorted(report[kind], reverse=True) if width >= 8) or "–"


def tier_of(report: dict) -> str:
    return next((tier for tier in ("resident", "fused") if tier in report["kernel"]), "split")


def rows(reports: list[dict]):
    cases = stage_cases()
    for case, (_, m, n, (batch, channels, side, _), _, _) in cases.items():
        every = [report for report in reports if report["case"] == case]
        path_bytes = batch * channels * side**2 * every[0]["itemsize"]
        forward = every[0]["forward_launches"]
        for name, launches, paths in (("forward", every[:forward], m + n), ("backward", every[forward:], 2 * m + n)):
            took = seconds(launches, path_bytes)
            copied = LAUNCH + paths * path_bytes / COPY
            yield case, name, launches, copied, took


HEAD = """# What to hold a card's figures against

Written by `python -m benchmarks.triton_expected > fastroute/backends/triton/EXPECTED.md`; do not edit.

Two paths to two and a gate of 16 on an H100, by the compiler of Triton {version} and by the launch tables. No card has
measured any of it. The prediction takes a copy at 3.0 TB/s and reads from L2 at 5.5 TB/s; 2 µs for a launch and 1 for
each that follows in a chain; 1.5 µs in which a resident or fused program makes the gates; 0.7 µs until a load is there;
and a launch that ends when the multiprocessor with the most programs has. *In flight* are the bytes of paths that a
multiprocessor has asked for at once; 17 KiB keep the rate of a copy. *Barriers* are those before paths are stored.
Kernels that move no path (gates, weights) are in the prediction as launches and have no line. × is how many launches of
a kernel a call takes, of which the first is shown.
"""

COLUMNS = (
    "",
    "tier",
    "kernel",
    "grid",
    "waves",
    "in flight, KiB",
    "registers",
    "loads, bytes",
    "stores, bytes",
    "barriers",
    "predicted",
)


def page(reports: list[dict]) -> str:
    lines = [HEAD.format(version=importlib.metadata.version("triton"))]
    last_case = None
    for case, name, launches, copied, took in rows(reports):
        if case != last_case:
            lines += ["", f"## {case}", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        last_case = case
        share = f"{took * 1e6:.0f} µs, {100 * copied / took:.0f}% of the copy"
        shown = {}
        for report in launches:
            if report["kernel"] in READS:
                shown.setdefault(report["kernel"], []).append(report)
        for kernel, same in shown.items():
            report = same[0]
            waves, in_flight = occupancy(report)
            times = f" ×{len(same)}" if len(same) > 1 else ""
            cells = [
                name,
                tier_of(report) if name else "",
                f"{kernel.removeprefix('cross_connect_').removesuffix('_kernel')}{times}",
                " × ".join(map(str, report["grid"])),
                f"{waves:.2f}",
                f"{in_flight / 1024:.0f}",
                str(report["REG"]),
                widths(report, "loads"),
                widths(report, "stores"),
                str(report["barriers_before_paths"]),
                share,
            ]
            lines.append("| " + " | ".join(cells) + " |")
            name, share = "", ""
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(reports_of(90, "stages")))
