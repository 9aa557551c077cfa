"""Tables of one result, of two results compared, and the documentation's section on speed."""

import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastroute.bench.results import Result, Row, label_text

FOREIGN = ("eager", "compile", "copy")
"""Contenders without code of this package: plain PyTorch, the same compiled, and a copy."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """Format a Markdown table with aligned columns.

    Args:
        header: the column names.
        rows: the cells.
        words: number of left-aligned columns; the others hold numbers and are right-aligned.
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line):
        cells = [
            cell.ljust(w) if i < words else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * w if i < words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([text(lines[0]), f"| {' | '.join(rule)} |", *map(text, lines[1:])])


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive values."""
    return math.exp(statistics.fmean(map(math.log, values)))


def by_suite(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by suite."""
    suites: dict[str, list[Row]] = {}
    for row in rows:
        suites.setdefault(row.suite, []).append(row)
    return suites


def _peers(rows: Iterable[Row]) -> list[str]:
    """Return all peers of these rows except the copy, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.ms if name not in ("fastroute", "copy")))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f}"


def _means(rows: Sequence[Row], peers: Iterable[str], cold: bool = False) -> list[float | None]:
    columns = ([r for row in rows if (r := row.times_as_fast_as(peer, cold)) is not None] for peer in peers)
    return [geometric_mean(column) if column else None for column in columns]


def _compiled_ratio(row: Row) -> float | None:
    """Return the time of plain PyTorch, compiled, over that of ours, compiled."""
    both = "compile" in row.ms and "fastroute compiled" in row.ms
    return row.ms["compile"] / row.ms["fastroute compiled"] if both else None


def tables(rows: Iterable[Row]) -> str:
    """Format one table per suite: milliseconds, GB/s, share of the copy's speed, speed-up over each peer, and memory.

    "cold" columns are single calls after the others have used the caches, all others consecutive calls; see `Row`.
    "compiled × compile" is the time of plain PyTorch over ours, both compiled. "saved MiB" is the memory that autograd
    saves for backward, ours and eager's; "peak MiB" the peak allocation on a GPU. The last rows have the geometric mean
    and the least of each ratio.
    """
    return "\n\n".join(f"{suite}\n\n{_suite_table(rows)}" for suite, rows in by_suite(rows).items())


def _suite_table(rows: list[Row]) -> str:
    peers = _peers(rows)
    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    columns: dict[str, Callable[[Row], str]] = {"ms": lambda row: _ms(row.ms["fastroute"])}
    ratios: dict[str, Callable[[Row], float | None]] = {}  # the columns that have a mean and a least

    def add_ratio(name: str, of: Callable[[Row], float | None]) -> None:
        ratios[name], columns[name] = of, lambda row: _ratio(of(row))

    if any("copy" in row.ms for row in rows):
        columns["GB/s"] = lambda row: "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}"
        add_ratio("share of copy", lambda row: row.times_as_fast_as("copy"))
    for peer in peers:
        add_ratio(f"× {peer}", lambda row, peer=peer: row.times_as_fast_as(peer))
    if any(_compiled_ratio(row) is not None for row in rows):
        add_ratio("compiled × compile", _compiled_ratio)
    if any(row.cold_ms for row in rows):
        columns["cold ms"] = lambda row: _ms(row.cold_ms.get("fastroute"))
        for peer in peers:
            add_ratio(f"cold × {peer}", lambda row, peer=peer: row.times_as_fast_as(peer, cold=True))
    for name, memory in (("saved", "saved_bytes"), ("peak", "peak_bytes")):
        if any(any(getattr(row, memory).values()) for row in rows):
            columns[f"{name} MiB"] = lambda row, memory=memory: _mib(getattr(row, memory).get("fastroute"))
            columns[f"eager's {name} MiB"] = lambda row, memory=memory: _mib(getattr(row, memory).get("eager"))
    for fact in facts:
        columns[fact.replace("_", " ")] = lambda row, fact=fact: _fact(row.facts.get(fact))
    labels = list(rows[0].labels)
    lines = [[*map(label_text, row.labels.values()), *(column(row) for column in columns.values())] for row in rows]
    if len(rows) > 1:
        found = {name: [ratio for row in rows if (ratio := of(row)) is not None] for name, of in ratios.items()}
        for name, summary in (("geometric mean", geometric_mean), ("least", min)):
            cells = (_ratio(summary(found[column]) if found.get(column) else None) for column in columns)
            lines.append([name, *[""] * (len(labels) - 1), *cells])
    return table([*labels, *columns], lines, words=len(labels))


def _fact(value) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def compare(old: Result, new: Result) -> str:
    """Compare two results case by case: the speed-up, and the part of it due to the machine.

    "peers" is the geometric mean of the speed-ups of `FOREIGN` contenders, which is the drift of the machine. "net" is
    the speed-up over the drift.

    Args:
        old, new: results with cases in common.

    Returns:
        What differs between the machines and versions, and one table per suite.

    Raises:
        ValueError: the results have no case in common.
    """
    before = {(row.suite, row.id): row for row in old.rows}
    common = [row for row in new.rows if (row.suite, row.id) in before]
    if not common:
        raise ValueError("the results have no case in common")
    changes = [
        f"{name}: {then.get(name)} before, {now.get(name)} now"
        for then, now in ((old.machine, new.machine), (old.versions, new.versions), (old.settings, new.settings))
        for name in then | now
        if name != "failures" and then.get(name) != now.get(name)
    ]
    texts = ["The results differ in:\n" + "\n".join(changes)] if changes else []
    for suite, rows in by_suite(common).items():
        lines, nets = [], []
        for now in rows:
            then = before[suite, now.id]
            ours = then.ms["fastroute"] / now.ms["fastroute"]
            same = [name for name in FOREIGN if name in now.ms and name in then.ms]
            drift = geometric_mean([then.ms[name] / now.ms[name] for name in same]) if same else 1.0
            nets.append(ours / drift)
            times = f"{then.ms['fastroute']:.3f}", f"{now.ms['fastroute']:.3f}"
            lines.append([now.id, *times, _ratio(ours), _ratio(drift), _ratio(ours / drift)])
        lines.append(["geometric mean", "", "", "", "", _ratio(geometric_mean(nets))])
        texts.append(
            f"{suite}\n\n{table(['case', 'ms before', 'ms now', '× as fast', 'peers', 'net'], lines, words=1)}"
        )
    left = len(old.rows) + len(new.rows) - 2 * len(common)
    if left:
        texts.append(f"{left} cases are in only one of the results")
    return "\n\n".join(texts)


def stated(result: Result) -> list[Row]:
    """Return the rows for the documentation: forward plus backward of `cross_connect`."""
    return [
        row
        for row in result.rows
        if row.suite == "operators"
        and row.labels["operator"] == "cross_connect"
        and row.labels["direction"] == "forward+backward"
    ]


def speed_section(result: Result, name: str) -> str:
    """Return the documentation's section on speed.

    Args:
        result: a result with the cases of the documentation.
        name: link to the result file.

    Raises:
        ValueError: the result has no such case.
    """
    rows = stated(result)
    if not rows:
        raise ValueError("the result has no forward+backward of cross_connect: measure with --stated")
    has_cold = all(row.cold_ms for row in rows)
    lines, groups = [], {}
    for row in rows:
        groups.setdefault((row.labels["dtype"], row.labels["layout"]), []).append(row)
    for (dtype, layout), group in groups.items():
        line = [f"{dtype}, {layout}"]
        for cold in (False, True) if has_cold else (False,):
            eager, compiled, copied = _means(group, ("eager", "compile", "copy"), cold)
            line += [f"{eager:.1f}", _ratio(compiled), _ratio(copied)]
        lines.append(line)
    paths = sorted({label_text(row.labels["paths"]) for row in rows})
    shapes = dict.fromkeys(label_text(row.labels["shape"]).replace("x", "×") for row in rows)
    introduction = (
        f"On {_place(result)}: geometric means over\n"
        f"{len(rows)} cases ([every case]({name})), which are maps of\n"
        f"{', '.join(shapes)},\n"
        f"routed {' and '.join(paths).replace('x', ' to ')}."
    )
    header = ["× eager", "× `torch.compile`", "share of the copy"]
    header += ["cold: × eager", "× compile", "share"] if has_cold else []
    return (
        f"{introduction}\n\n{table(['dtype, layout', *header], lines, words=1)}\n\n"
        f"The least of the {len(rows)} cases is {_least(rows)}"
        + (f",\ncold {_least(rows, cold=True)}." if has_cold else ".")
    )


def _place(result: Result) -> str:
    where = result.machine
    threads = f"{where['threads']} threads of " if "threads" in where else ""  # a GPU has none
    return f"{threads}{where['processor']} ({where['capability']}, torch {result.versions['torch']})"


def _least(rows: Sequence[Row], cold: bool = False) -> str:
    compiled = min((row.times_as_fast_as("compile", cold) for row in rows if "compile" in row.ms), default=None)
    eager = f"{min(row.times_as_fast_as('eager', cold) for row in rows):.1f} times as fast as eager"
    return eager if compiled is None else f"{compiled:.2f} times as fast as `torch.compile` and {eager}"


def steps_section(result: Result, name: str) -> str:
    """Return the documentation's section on whole steps beside plain PyTorch's, both also compiled.

    Args:
        result: a result with the cases of `--steps`.
        name: link to the result file.

    Raises:
        ValueError: the result has no such case.
    """
    groups: dict[tuple, dict[str, Row]] = {}
    for row in result.rows:
        if "fastroute compiled" in row.ms:  # the compiled peer may be left out
            labels = row.labels
            key = f"`{labels['network']}`, {labels['batch']}", f"{labels['dtype']}, {labels['layout']}"
            groups.setdefault(key, {})["forward" if labels["direction"] == "forward" else "step"] = row
    if not groups:
        raise ValueError("the result has no step of a network, compiled: measure with --steps")
    lines, ratios = [], {}
    for key, rows in groups.items():
        line = [*key]
        for direction in ("step", "forward"):
            row = rows.get(direction)
            eager, compiled = (None, None) if row is None else (row.times_as_fast_as("eager"), _compiled_ratio(row))
            line += [_ms(row and row.ms["fastroute compiled"]), _ratio(eager), _ratio(compiled)]
            for column, ratio in ((f"eager, {direction}", eager), (f"compiled, {direction}", compiled)):
                if ratio is not None:
                    ratios.setdefault(column, []).append(ratio)
        lines.append(line)
    header = ["network, batch", "dtype, layout"]
    header += [column for d in ("step", "forward") for column in (f"{d}: ms", "× eager", "× compiled")]
    summary = "\n".join(
        f"- {column}: {geometric_mean(found):.2f}, the least {min(found):.2f}"
        for column, found in sorted(ratios.items())
    )
    return (
        f"On {_place(result)}, [all rows]({name}). The milliseconds are those of our\n"
        "network, compiled. × eager is the time of plain PyTorch over ours, both eager; × compiled is the same, both\n"
        f"compiled.\n\n{table(header, lines, words=2)}\n\nGeometric means:\n\n{summary}"
    )


SECTIONS = {"speed": speed_section, "steps": steps_section}
"""Topic → the function that writes the section on it from a result and the link to its file."""


def page_result(page: Path, topic: str = "speed") -> Path:
    """Return the path of the result file from which a page's section on a topic of `SECTIONS` is generated.

    Raises:
        FileNotFoundError: there is no such page.
        ValueError: it has no section on the topic between the marker comments.
    """
    return page.parent / _section(page, topic)["result"]


def rewrite_page(page: Path, result: Path, topic: str = "speed") -> str:
    """Return the text of a page with its section on a topic of `SECTIONS` regenerated from a result file.

    The section is between `<!-- TOPIC: RESULT -->` and `<!-- end of TOPIC -->`; RESULT is relative to the page.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the page has no such section, or the result has no case for it.
    """
    name = link(page, result)
    body = SECTIONS[topic](Result.load(result), name)
    plots = (result.with_name(f"{result.stem}_{plot}.svg") for plot in ("share_of_copy", "steps", "memory"))
    images = [f"![{path.stem}]({Path(name).with_name(path.name).as_posix()})" for path in plots if path.is_file()]
    return with_section(page, topic, result, "\n\n".join([body, *images]))


def link(page: Path, file: Path) -> str:
    """Return the relative link from a page to a file."""
    return Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix()


def with_section(page: Path, topic: str, result: Path, text: str) -> str:
    """Return the text of a page with other text in its section on a topic.

    The section is between `<!-- TOPIC: RESULT -->` and `<!-- end of TOPIC -->`; RESULT is relative to the page.

    Args:
        page: the file.
        topic: of the section.
        result: the file of which the text is made.
        text: to put in.

    Raises:
        FileNotFoundError: there is no such page.
        ValueError: it does not have one such section.
    """
    section = _section(page, topic)
    return (
        section.string[: section.start()]
        + f"<!-- {topic}: {link(page, result)} -->\n\n{text}\n\n<!-- end of {topic} -->"
        + section.string[section.end() :]
    )


def _section(page: Path, topic: str) -> re.Match:
    if not page.is_file():
        raise FileNotFoundError(f"page is {page}; there is no such file")
    pattern = rf"<!-- {topic}: (?P<result>\S+) -->\n.*?<!-- end of {topic} -->"
    sections = list(re.finditer(pattern, page.read_text(), re.DOTALL))
    if len(sections) != 1:
        raise ValueError(
            f"page is {page}; it must have <!-- {topic}: RESULT --> and <!-- end of {topic} --> once, "
            f"but has them {len(sections)} times"
        )
    return sections[0]
