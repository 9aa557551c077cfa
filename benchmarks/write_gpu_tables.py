"""Write the result of `gpu_check.py` and the tables of docs/gpu-path.md.

    python -m benchmarks.write_gpu_tables ROWS.jsonl [MORE.jsonl …] --date 2026-11-27 --driver 580.159.04

keeps the rows that matter in benchmarks/results/h100.json and writes the tables between the page's marker comments.
Without ROWS.jsonl it only writes the tables. Several files are runs on the same card, the last of which counts where
they measured the same.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.gpu_rows import BACKWARD, BOTH, FORWARD, HOST_BUDGET, Speeds, load, read, result_of, save
from fastroute._files import write_text
from fastroute.bench import report

ROOT = Path(__file__).resolve().parents[1]
RESULT, VARIANTS = (ROOT / "benchmarks/results" / name for name in ("h100.json", "h100_tuning.json"))
PAGE = ROOT / "docs/gpu-path.md"
EXPECTED = ("csrc/cuda/EXPECTED.md", "fastroute/backends/triton/EXPECTED.md")
NATIVE, TRITON = "native", "triton"
NAMES = {NATIVE: "native", TRITON: "Triton", "compile": "`torch.compile`", "default": "the default choice"}
NAMES |= {"eager": "plain PyTorch"}
CONTENDERS = {"eager": "plain", "compile": "plain, compiled", "fastroute": "fastroute"}
CONTENDERS |= {"fastroute compiled": "fastroute, compiled", "no routing": "no routing"}
FOLDERS = {"tests/backends/cuda_kernels": NATIVE, "tests/backends/triton_kernels": TRITON}
OFF = 0.2  # predictions further off are marked
WAYS = (FORWARD, BACKWARD)


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def case_text(case: str) -> str:
    shape, dtype, layout, *more = case.split()
    return " ".join([shape.replace("x", "×"), dtype, "NCHW" if layout == "contiguous" else layout, *more])


def time_text(speeds: Speeds, case: str, way: str, backend: str) -> str:
    """Return microseconds; † marks those that may be too long."""
    return number(speeds.us(case, way, backend)) + ("†" if speeds.disturbed(case, way, backend) else "")


def status(result: dict) -> str:
    """Format the outcomes of tests by operator and backend, the errors of timed results, and the sanitizer's lines."""
    counts: dict[tuple[str, str], Counter] = {}
    for row in result["tests"]:
        folder, _, file = row["file"].rpartition("/")
        operator = file.removeprefix("test_").removesuffix(".py") if folder in FOLDERS else "other tests"
        found = counts.setdefault((operator, FOLDERS.get(folder, "")), Counter())
        found.update({name: count for name, count in row.items() if name != "file"})
    lines = []
    for operator, backend in sorted(counts, key=lambda key: (key[1] == "", key)):
        found = counts[operator, backend]
        failed = sum(count for outcome, count in found.items() if outcome not in ("passed", "skipped"))
        right = f"{failed} failed" if failed else "yes" if found["passed"] else "not run"
        name = f"`{operator}`" if backend else operator
        lines.append([name, NAMES.get(backend, backend), right, str(found["passed"]), str(found["skipped"] or "")])
    header = ["operator", "backend", "right on the card", "passed", "skipped"]
    texts = [_machine(result), report.table(header, lines, words=3)]
    for backend in (NATIVE, TRITON):
        rows = [row for row in result["speed"] if row["backend"] == backend and "off" in row]
        if rows:
            wrong = sum(str(row.get("error", "")).startswith("wrong") for row in rows)
            worst = max(rows, key=lambda row: row["off"] / row["eager_off"])
            errors = f"{worst['off']:.2g} ({worst['eager_off']:.2g} in plain PyTorch)"
            texts.append(
                f"{NAMES[backend].capitalize()}, {len(rows)} timed calls compared with float64: {wrong or 'none'} "
                f"wrong by [the rule](numerics.md). The largest error, relative to plain PyTorch's, is {errors}."
            )
    tools = [f"- `{row['case']}`: {row.get('error') or row['summary']} ({_tested(row)})" for row in result["sanitizer"]]
    if tools:
        texts.append("compute-sanitizer, on tests of the native `cross_connect`:\n\n" + "\n".join(tools))
    for row in result["errors"]:
        texts.append(f"Not finished: {row['where']}: {row['error']}.")
    return "\n\n".join(texts)


def _tested(row: dict) -> str:
    return (row.get("tests") or "no tests").partition(",")[0]


def _machine(result: dict) -> str:
    versions = result["versions"]
    parts = [f"torch {versions['torch']}", f"Triton {versions['triton']}", f"CUDA {versions['cuda']}"]
    parts += [f"driver {result['driver']}"] if result.get("driver") else []
    parts += [f"Python {versions['python']}", f"commit {result['commit'][:7]}" if result["commit"] else ""]
    capability = result["machine"]["capability"]
    return f"{result['machine']['processor']} ({capability}): {', '.join(filter(None, parts))}; {result['date']}."


def device(result: dict) -> str:
    """Format the device's microseconds of forward and backward, and the share of the copy's speed."""
    speeds = Speeds(result["speed"])
    backends = [backend for backend in (NATIVE, TRITON) if backend in speeds.backends]
    columns = ["copy", *(NAMES[backend] for backend in backends)]
    header = ["case", *(f"{way}: {name}" for way in WAYS for name in columns)]
    lines = []
    for case in speeds.cases:
        cells = []
        for way in WAYS:
            copy_us = speeds.copy_us(case, way)
            cells.append("" if copy_us is None else number(copy_us))
            for backend in backends:
                share = speeds.share(case, way, backend)
                cells.append("" if share is None else f"{time_text(speeds, case, way, backend)} ({share:.2f})")
        if any(cells[1 : 1 + len(backends)]):
            lines.append([case_text(case), *cells])
    tables = [report.table(header, lines, words=1), _compiled(speeds)]
    return "\n\n".join(filter(None, tables))


def _compiled(speeds: Speeds) -> str | None:
    lines = []
    for case in speeds.cases:
        for way in (FORWARD, BOTH):
            theirs = speeds.us(case, way, "compile")
            ours = [us for backend in (NATIVE, TRITON) if (us := speeds.us(case, way, backend)) is not None]
            if theirs is not None and ours:
                line = [case_text(case), way, number(theirs), number(min(ours)), f"{theirs / min(ours):.2f}"]
                lines.append(line)
    header = ["case", "", NAMES["compile"], "the faster of ours", "×"]
    return report.table(header, lines, words=2) if lines else None


def predictions_native(text: str) -> dict[tuple[str, str], float]:
    """Return the predicted µs by case and direction from csrc/cuda/EXPECTED.md, which are for NCHW."""
    found = {}
    for paths, dtype, forward, backward in re.findall(
        r"^\| ([\d×]+), (bf16|f32) .*\| (\d+) +\d+ % +\| (\d+) +of \d+ +\d+ % +\|$", text, re.MULTILINE
    ):
        case = f"{_batched(paths)} {'bfloat16' if dtype == 'bf16' else 'float32'} contiguous"
        found |= {(case, FORWARD): float(forward), (case, BACKWARD): float(backward)}
    return found


def predictions_triton(text: str) -> dict[tuple[str, str], float]:
    """Return the predicted µs by case and direction from the page that `triton_expected.py` writes."""
    found: dict[tuple[str, str], float] = {}
    case = None
    for line in text.splitlines():
        if match := re.match(r"## \S+ ([\d×]+) (\S+) (\S+)$", line):
            paths, dtype, layout = match.groups()
            case = f"{_batched(paths)} {dtype} {'contiguous' if layout == 'NCHW' else layout}"
        elif match := re.match(r"\| (forward|backward) \|.*\| (\d+) µs", line):
            found[case, match[1]] = float(match[2])
    return found


def _batched(paths: str) -> str:
    """Return the shape with the batch for which both pages predict: 128 for 32×32 images, 256 for larger ones."""
    shape = paths.replace("×", "x")
    return f"{128 if shape in ('16x32x32', '32x16x16', '64x8x8') else 256}x{shape}"


def predicted(result: dict, native: str, triton: str) -> str:
    """Format predicted and measured microseconds; those further off than `OFF` are bold."""
    speeds = Speeds(result["speed"])
    expected = {NATIVE: predictions_native(native), TRITON: predictions_triton(triton)}
    off, total = [], 0

    def cell(case, way, backend):
        nonlocal total
        guess, us = expected[backend].get((case, way)), speeds.us(case, way, backend)
        if guess is None or us is None:
            return ""
        total += 1
        text = f"{guess:.0f} → {time_text(speeds, case, way, backend)}, {round(100 * (us / guess - 1)):+d} %"
        if abs(us / guess - 1) <= OFF:
            return text
        off.append((backend, us / guess))
        return f"**{text}**"

    table = _four_columns(speeds.cases, cell)
    slower = sum(ratio > 1 for _, ratio in off)
    by_backend = Counter(backend for backend, _ in off)
    which = " and ".join(f"{by_backend[backend]} of {NAMES[backend]}" for backend in (NATIVE, TRITON))
    return (
        f"{table}\n\nOff by more than {100 * OFF:.0f} % (bold): {len(off)} of {total}, {which}; "
        f"{slower} of them took longer than predicted."
    )


def _four_columns(cases: Iterable[str], cell: Callable[[str, str, str], str]) -> str:
    columns = [(way, backend) for backend in (NATIVE, TRITON) for way in WAYS]
    lines = [[case_text(case), *(cell(case, way, backend) for way, backend in columns)] for case in cases]
    header = ["case", *(f"{NAMES[backend]}, {way}" for way, backend in columns)]
    return report.table(header, [line for line in lines if any(line[1:])], words=1)


def host(result: dict) -> str:
    """Format the host's microseconds per call, and the budget."""
    found = {(row["backend"], row["direction"]): row["us"] for row in result["host"] if "us" in row}
    backends = dict.fromkeys(backend for backend, _ in found)
    lines = []
    for backend in backends:
        line = [NAMES.get(backend, backend)]
        for way in (FORWARD, BOTH):
            us, budget = found.get((backend, way)), HOST_BUDGET.get(backend, {}).get(way)
            line += ["" if us is None else number(us), "" if budget is None else f"{budget}"]
        lines.append(line)
    return report.table(["", FORWARD, "budget", BOTH, "budget"], lines, words=1)


def steps(result: dict) -> str:
    """Format milliseconds of whole steps, and the share of the time of plain PyTorch, compiled or not as they are."""
    found = {(row["network"], row["batch"], row.get("contender")): row for row in result["step"]}
    lines = []
    for network, batch in dict.fromkeys(key[:2] for key in found):
        for contender, name in CONTENDERS.items():
            row = found.get((network, batch, contender))
            if row is None:
                continue
            plain = found.get((network, batch, "compile" if "compile" in contender else "eager"), {})
            cells = []
            for way in ("ms", "graph_ms"):
                cells.append(f"{row[way]:.2f}" if way in row else _reason(row, way))
                cells.append(f"{row[way] / plain[way]:.2f}" if way in row and way in plain else "")
            lines.append([f"`{network}`, batch {batch}", name, *cells])
    if not lines:
        return "Not measured yet: `python benchmarks/gpu_check.py --peers`."
    table = report.table(["network", "contender", "loop, ms", "of plain", "graph, ms", "of plain"], lines, words=2)
    unequal = {f"`{row['network']}`, batch {row['batch']}": row["error"] for row in result["step"] if _unequal(row)}
    return "\n\n".join([table, *(f"Not compared with plain PyTorch: {name}: {why}." for name, why in unequal.items())])


def _unequal(row: dict) -> bool:
    """Return whether the row says that the contenders' results differ, or could not be compared."""
    return "error" in row and "contender" not in row


def _reason(row: dict, way: str) -> str:
    return "failed" if "error" in row else "not captured" if way == "graph_ms" and "not_in_a_graph" in row else ""


def tuning(variants: dict) -> str:
    """Format the least microseconds of each build, and the share of the least copy of the case and direction."""
    rows = variants["rows"]
    builds, cases = (list(dict.fromkeys(row[name] for row in rows)) for name in ("build", "case"))

    def cell(case, way, build):
        same = [row for row in rows if (row["case"], row["direction"]) == (case, way)]
        times = [row["us"] for row in same if row["build"] == build]
        if not times:
            return ""
        return f"{number(min(times))} ({min(row['copy_us'] for row in same) / min(times):.2f})"

    columns = [(way, build) for way in WAYS for build in builds]
    lines = [[case_text(case), *(cell(case, *column) for column in columns)] for case in cases]
    return report.table(["case", *(f"{way}: {build}" for way, build in columns)], lines, words=1)


def sections(result: dict, variants: dict) -> dict[str, str]:
    """Return the text of each marked section, from a result and the times of several builds."""
    expected = [(ROOT / name).read_text() for name in EXPECTED]
    return {
        "status": status(result),
        "device": device(result),
        "predicted": predicted(result, *expected),
        "tuning": tuning(variants),
        "host": host(result),
        "steps": steps(result),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=Path, help="rows.jsonl of gpu_check.py")
    parser.add_argument("--date", help="of the run; required with rows")
    parser.add_argument("--driver", default="", help="version of the driver, as nvidia-smi prints it")
    parser.add_argument("--command", default="python benchmarks/gpu_check.py", help="that was run")
    parser.add_argument("--result", type=Path, default=RESULT, help="the result file that is written and read")
    parser.add_argument("--variants", type=Path, default=VARIANTS, help="the times of builds, by gpu_variants.py")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose marked sections are written")
    parser.add_argument("--only-result", action="store_true", help="write no page")
    options = parser.parse_args()
    if options.rows and not options.date:
        parser.error("--date is missing: the rows do not say when they were measured")
    try:
        if options.rows:
            rows = [row for path in options.rows for row in read(path)]
            about = {"date": options.date, "driver": options.driver, "command": options.command}
            save(result_of(rows, **about), options.result)
            print(f"wrote {options.result}")
        if not options.only_result:
            for topic, text in sections(load(options.result), json.loads(options.variants.read_text())).items():
                write_text(options.page, report.with_section(options.page, topic, options.result, text))
            print(f"wrote {options.page}")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
