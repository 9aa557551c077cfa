"""Compare methods of clustering by finished runs: `python -m benchmarks.clustering [RUNS…] [--run OPTIONS]`.

With --run, it first runs `fastroute cluster OPTIONS` for each method and seed, one after another, and resumes or keeps
what is there: `--run "--dataset digits --epochs 60" --folder runs/digits --seeds 0 1 2` compares all on the digits.
It adds the runs of `fastroute cluster` in the folders RUNS to the result file, and writes the page's tables from it.
Without RUNS, it only writes the tables anew. A run with the options and seed of an earlier one replaces it.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean

from benchmarks.saved_runs import read_folder, read_result, replaced, write_result
from fastroute._defaults import LR_CONSISTENCY, LR_EM
from fastroute._files import write_text
from fastroute._methods import METHODS
from fastroute.bench.report import table, with_section
from fastroute.training.recipes import recipes

RESULT, PAGE = Path("benchmarks/results/cpu_epyc_clustering.json"), Path("docs/clustering-results.md")
OPTIONS = ("method", "self_label", "dataset", "limit", "seed", "epochs", "batch_size", "n_init", "heads", "amp")
OPTIONS += ("lr_em", "lr_consistency", "clusters", "architecture", "batch_norm")
"""Options of a run that its result depends on."""
RATES = (
    ("lr_em", LR_EM, ("two-fold", "em")),
    ("lr_consistency", LR_CONSISTENCY, ("two-fold", "consistency", "iic")),
)
"""Learning rates, their defaults, and the methods that use them; other methods have their papers' own."""
THESIS = {"mnist": "cluster_mnist", "cifar10": "cluster_cifar10", "stl10": "cluster_stl10"}


def run_all(options: str, folder: Path, methods: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Run each method with each seed, in processes of their own, unless its run in the folder is finished.

    Args:
        options: of `fastroute cluster`.
        folder: of the runs; each has the name of its method and seed.
        methods, seeds: which.

    Returns:
        the folders of the runs.

    Raises:
        CalledProcessError: a run failed.
    """
    found = []
    for seed in seeds:
        for method in methods:
            place = folder / f"{method}-{seed}"
            if not (place / "assignments.csv").is_file():
                command = ["cluster", *shlex.split(options), "--method", method, "--seed", str(seed)]
                command += ["--output", str(folder), "--experiment", place.name]
                command += [] if METHODS[method].builder is None else ["--resume", "auto"]
                subprocess.run([sys.executable, "-m", "fastroute", *command], check=True)
            found.append(place)
    return found


def read_run(folder: Path, images_of: str | None = None) -> dict:
    """Return the options of a finished run, its number of images, last metrics and seconds.

    Args:
        folder: of the run.
        images_of: the name of the data set that a run on an image folder had; None calls it "imagefolder".

    Raises:
        FileNotFoundError: it lacks args.yaml, summary.csv or assignments.csv: it is not finished.
        ValueError: the images had no labels.
    """
    options, rows = read_folder(folder)
    with (folder / "assignments.csv").open() as file:
        images = sum(1 for _ in file) - 1
    if "acc" not in rows[-1]:
        raise ValueError(f"runs has {folder}; its images have no labels to compare with")
    known = METHODS[options["method"]]
    if options["dataset"] == "imagefolder" and images_of is not None:
        options["dataset"] = images_of
    kept = {name: options[name] for name in OPTIONS if name in options}
    if known.builder is None:
        kept |= {"epochs": None}
    metrics = {name: round(float(rows[-1][name]), 4) for name in ("acc", "nmi", "ari")}
    found = kept | {"images": images} | metrics | {"seconds": round(sum(float(row["seconds"]) for row in rows), 1)}
    if kept.get("self_label"):  # what the run had without its last step
        found["acc_before"] = round(float(rows[-1 - kept["self_label"]]["acc"]), 4)
    return found


def merged(earlier: Iterable[dict], later: Iterable[dict]) -> list[dict]:
    """Return runs in the order of the methods; a later one replaces an earlier one of the same options."""
    order, runs = list(METHODS), replaced(earlier, later, OPTIONS)
    return sorted(runs, key=lambda run: (run["dataset"], run["images"], order.index(run["method"]), run["seed"]))


def tables(runs: Sequence[dict]) -> str:
    """Return a Markdown table for each data set: means over the seeds, in percent, and the thesis's accuracy."""
    parts = []
    for (dataset, images), found in groupby(runs, key=lambda run: (run["dataset"], run["images"])):
        reported = {
            recipe.options["method"]: recipe.reported
            for name, recipe in recipes("cluster").items()
            if dataset in THESIS and name.startswith(f"{THESIS[dataset]}_")
        }
        lines = []
        settings = sorted(found, key=_setting)
        settings = [list(same) for _, same in groupby(settings, key=_setting)]
        for same in sorted(settings, key=lambda same: -mean(run["acc"] for run in same)):
            lines.append(_line(same, reported.get(same[0]["method"], {})))
        header = ["method", "epochs", "ACC", "of each seed", "NMI", "ARI", "s"]
        header += ["thesis: ACC", "NMI"] if reported else []
        lines = [line if reported else line[:-2] for line in lines]
        parts.append(f"**{dataset}**, {images:,} images:\n\n{table(header, lines, words=2)}")
    return "\n\n".join(parts)


def _setting(run: dict) -> tuple:
    """The options but the seed, as text, since some are None."""
    return tuple(str(run.get(name)) for name in OPTIONS if name != "seed")


def _line(same: Sequence[dict], reported: dict[str, float]) -> list[str]:
    run = same[0]
    more = f" `--n-init {run['n_init']}`" if run.get("n_init", 1) > 1 else ""
    more += f" `--self-label {run['self_label']}`" if run.get("self_label") else ""
    more += f" `--architecture {run['architecture']!r}`" if run.get("architecture") else ""
    for name, usual, methods in RATES:
        given = run["method"] in methods and run.get(name, usual) != usual
        more += f" `--{name.replace('_', '-')} {run[name]:g}`" if given else ""
    means = [f"{100 * mean(run[name] for run in same):.1f}" for name in ("acc", "nmi", "ari")]
    each = ", ".join(f"{100 * run['acc']:.1f}" for run in same)
    seconds = f"{mean(run['seconds'] for run in same):,.0f}"
    own = [f"{reported[name]:.1f}" if name in reported else "" for name in ("accuracy", "NMI")]
    return [f"`{run['method']}`{more}", str(run["epochs"] or ""), means[0], each, *means[1:], seconds, *own]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of runs, each with args.yaml")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file that keeps the runs")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose marked section is written")
    parser.add_argument("--run", metavar="OPTIONS", help="options of `fastroute cluster` for runs of all methods")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="where these runs are")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of these runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of these runs")
    parser.add_argument("--images-of", metavar="NAME", help="the data set whose images the folders of the runs have")
    options = parser.parse_args(arguments)
    if options.run is not None:
        options.runs += run_all(options.run, options.folder, options.methods, options.seeds)
    try:
        runs = merged(read_result(options.result), (read_run(run, options.images_of) for run in options.runs))
        page = with_section(options.page, "clusterings", options.result, tables(runs))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    write_result(options.result, runs)
    write_text(options.page, page)
    print(f"wrote {options.result} and {options.page}")


if __name__ == "__main__":
    main()
