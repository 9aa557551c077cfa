"""Compare networks and recipes by finished runs of `fastroute train`: `python -m benchmarks.short_recipes [RUNS…]`.

It adds each run to the result file and writes the page's tables from it: one of recipes, for runs that are only
validated on val/, and one of networks, for runs that `--test-dir` evaluated on images that chose nothing. Errors are
those of the last epoch. Without RUNS, it only writes the tables anew. A run with the options and seed of an earlier one
replaces it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev

from benchmarks.saved_runs import read_folder, read_result, replaced, write_result
from fastroute._files import write_text
from fastroute.bench.report import table, with_section

RESULT, PAGE = Path("benchmarks/results/cpu_short_recipes.json"), Path("docs/reproduction.md")
RECIPE = ("lr", "weight_decay", "batch_size", "smoothing")
NETWORK = ("model", "model_kwargs", "gate_norm", "gate_reg_weight")
OPTIONS = (*NETWORK, *RECIPE, "amp", "images", "epochs", "seed", "tested")
"""Options of a run that its result depends on, in the runs that are compared here."""


def read_run(folder: Path, test_dir: Path | None = None) -> dict:
    """Return the options and the last errors of a finished run, in percent.

    Args:
        folder: of the run.
        test_dir: an image folder; its val/ are images to evaluate the last checkpoint on.

    Raises:
        FileNotFoundError: the folder lacks args.yaml, summary.csv or last.ckpt.
        ValueError: the run is not finished.
        CalledProcessError: the evaluation failed.
    """
    options, rows = read_folder(folder)
    if len(rows) != options["epochs"]:
        raise ValueError(f"runs has {folder}; it has {len(rows)} of {options['epochs']} epochs: resume it first")
    images = sum(1 for _ in Path(options["data_dir"], "train").glob("*/*"))
    run = {name: options[name] for name in OPTIONS if name in options} | {"images": images, "tested": bool(test_dir)}
    run["model_kwargs"] = " ".join(options["model_kwargs"] or ())
    run |= {name: round(float(rows[-1][name]), 2) for name in ("train_error", "val_error")}
    if test_dir is not None:
        run["test_error"] = round(evaluate(folder / "last.ckpt", test_dir, options), 2)
    return run


def evaluate(checkpoint: Path, folder: Path, options: dict) -> float:
    """Return the top-1 error of a checkpoint on a folder's val/, in percent, in the run's precision and layout."""
    with tempfile.TemporaryDirectory() as place:
        results = Path(place, "results.json")
        command = ["validate", str(checkpoint), "--data-dir", str(folder), "--results-file", str(results)]
        command += ["--amp", "--amp-dtype", options["amp_dtype"]] * options["amp"]
        if (wish := options["channels_last"]) is not None:
            command.append("--channels-last" if wish else "--no-channels-last")
        subprocess.run([sys.executable, "-m", "fastroute", *command], check=True, stdout=subprocess.DEVNULL)
        return json.loads(results.read_text())[0]["error"]


def recipes_table(runs: Sequence[dict]) -> str:
    """Return a Markdown table of errors on val/: a line for each recipe, a column for each network."""
    networks = list(dict.fromkeys(map(_network, runs)))
    lines = []
    for recipe, same in _grouped(runs, RECIPE):
        errors = {name: [run["val_error"] for run in same if _network(run) == name] for name in networks}
        lines.append([*map(_number, recipe), *(_spread(errors[name]) for name in networks)])
    return table([*_named(RECIPE), *networks], lines, words=0)


def networks_table(runs: Sequence[dict]) -> str:
    """Return a Markdown table of networks with their recipes: errors of all seeds, means and standard deviations."""
    lines = []
    for _, same in _grouped(runs, (*NETWORK, *RECIPE)):
        val, test = ([run[name] for run in same] for name in ("val_error", "test_error"))
        each = ", ".join(f"{error:.2f}" for error in test)
        recipe = [_number(same[0][name]) for name in RECIPE]
        train = _spread([run["train_error"] for run in same])
        lines.append([_network(same[0]), *recipe, train, _spread(val), each, _spread(test)])
    header = ["network", *_named(RECIPE), "training", "val", "others, each seed", "others"]
    return table(header, lines, words=1)


def tables(runs: Sequence[dict]) -> str:
    """Return the tables of all numbers of images and epochs, recipes first."""
    parts = []
    for (tested, images, epochs), same in _grouped(runs, ("tested", "images", "epochs")):
        text = networks_table(same) if tested else recipes_table(same)
        parts.append(f"{images:,} images, {epochs} epochs; error in percent:\n\n{text}")
    return "\n\n".join(parts)


def _grouped(runs: Sequence[dict], names: Sequence[str]) -> list[tuple[tuple, list[dict]]]:
    """Return the values of the options and the runs that have them, sorted by the values; None is least."""

    def key(run: dict) -> tuple:
        return tuple(run.get(name) for name in names)

    runs = sorted(runs, key=lambda run: [(value is not None, value) for value in key(run)])
    return [(values, list(same)) for values, same in groupby(runs, key)]


def _network(run: dict) -> str:
    more = "".join(f" `{value}`" for value in run["model_kwargs"].split())
    more += f" `--gate-norm {run['gate_norm']}`" if run.get("gate_norm") else ""
    more += f" `--gate-reg-weight {run['gate_reg_weight']:g}`" if run.get("gate_reg_weight") else ""
    return f"`{run['model']}`{more}"


def _named(options: Sequence[str]) -> list[str]:
    return [f"`--{name.replace('_', '-')}`" for name in options]


def _number(value: float) -> str:
    return f"{value:g}"


def _spread(errors: Sequence[float]) -> str:
    if len(errors) < 2:
        return f"{errors[0]:.2f}" if errors else ""
    return f"{mean(errors):.2f} ± {stdev(errors):.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of runs, each with args.yaml")
    parser.add_argument("--test-dir", type=Path, help="an image folder whose val/ chose nothing, to evaluate on")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file that keeps the runs")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose marked section is written")
    options = parser.parse_args(arguments)
    try:
        runs = read_result(options.result)
        for folder in options.runs:  # each may take minutes to evaluate
            runs = replaced(runs, [read_run(folder, options.test_dir)], OPTIONS)
            write_result(options.result, [run for _, same in _grouped(runs, OPTIONS) for run in same])
        page = with_section(options.page, "short recipes", options.result, tables(runs))
    except (FileNotFoundError, ValueError, subprocess.CalledProcessError) as error:
        raise SystemExit(str(error)) from None
    write_text(options.page, page)
    print(f"wrote {options.result} and {options.page}")


if __name__ == "__main__":
    main()
