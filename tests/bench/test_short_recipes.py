import json

import pytest
import yaml

from benchmarks import short_recipes

PAGE = "# Title\n\n<!-- short recipes: r.json -->\nold\n<!-- end of short recipes -->\n\nmore\n"
NETWORKS = {
    "one": {"model": "resnet20"},
    "wide": {"model": "resnet20", "model_kwargs": ["widen=1.42"]},
    "centred": {"model": "resnet20_cc2", "gate_norm": "center", "gate_reg_weight": 0.01},
}


def write_run(folder, network, errors, epochs=2, **options):
    options = {"model_kwargs": None, "gate_norm": None, "gate_reg_weight": 0.0} | NETWORKS[network] | options
    recipe = {"lr": 0.4, "weight_decay": 5e-4, "batch_size": 128, "smoothing": 0.0, "seed": 0}
    data = folder.parent / "images"
    for place in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (data / "train" / place).parent.mkdir(parents=True, exist_ok=True)
        (data / "train" / place).touch()
    folder.mkdir()
    others = {"epochs": epochs, "data_dir": str(data), "amp": True, "amp_dtype": "bfloat16", "channels_last": True}
    (folder / "args.yaml").write_text(yaml.safe_dump(recipe | others | options))
    rows = "".join(f"{epoch},{error / 2},{error}\n" for epoch, error in enumerate(errors, 1))
    (folder / "summary.csv").write_text("epoch,train_error,val_error\n" + rows)
    return str(folder)


def cells(page):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]


def test_recipes_are_lines_and_networks_columns(tmp_path):
    page, result = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text(PAGE)
    places = ["--page", str(page), "--result", str(result)]
    folders = [
        write_run(tmp_path / "a", "one", [50, 30.126]),
        write_run(tmp_path / "b", "wide", [50, 20]),
        write_run(tmp_path / "c", "one", [50, 28], smoothing=0.1),
        write_run(tmp_path / "d", "one", [50, 32.126], seed=1),
        write_run(tmp_path / "e", "centred", [60, 50, 10], epochs=3, lr=0.2),
    ]
    short_recipes.main([*folders, *places])
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- short recipes: r.json -->\n\n3 images, 2 epochs; error in percent:\n\n")
    assert text.endswith("<!-- end of short recipes -->\n\nmore\n") and "3 images, 3 epochs" in text
    recipe = ["`--lr`", "`--weight-decay`", "`--batch-size`", "`--smoothing`"]
    lines = [line for line in cells(text) if "---" not in line[0]]
    assert lines == [
        [*recipe, "`resnet20`", "`resnet20` `widen=1.42`"],
        ["0.4", "0.0005", "128", "0", "31.13 ± 1.41", "20.00"],
        ["0.4", "0.0005", "128", "0.1", "28.00", ""],
        [*recipe, "`resnet20_cc2` `--gate-norm center` `--gate-reg-weight 0.01`"],
        ["0.2", "0.0005", "128", "0", "10.00"],
    ]
    # A run of the same options replaces the earlier one.
    short_recipes.main([write_run(tmp_path / "f", "wide", [50, 25]), *places])
    assert "25.00" in page.read_text() and "20.00" not in page.read_text()
    assert len(json.loads(result.read_text())) == 5


def test_networks_are_lines_where_runs_are_evaluated_on_other_images(tmp_path, monkeypatch):
    def run(command, check, stdout):
        assert command[2:6] == ["fastroute", "validate", command[4], "--data-dir"] and command[6] == "others"
        assert command[-4:] == ["--amp", "--amp-dtype", "bfloat16", "--channels-last"]
        error = {"a": 10.0, "b": 12.0, "c": 8.0}[command[4].split("/")[-2]]
        with open(command[8], "w") as file:
            json.dump([{"error": error}], file)

    monkeypatch.setattr(short_recipes.subprocess, "run", run)
    page, result = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text(PAGE)
    folders = [
        write_run(tmp_path / "a", "one", [50, 20]),
        write_run(tmp_path / "b", "one", [50, 22], seed=1),
        write_run(tmp_path / "c", "centred", [50, 16], lr=0.2),
    ]
    short_recipes.main([*folders, "--test-dir", "others", "--page", str(page), "--result", str(result)])
    assert [line for line in cells(page.read_text()) if "`resnet" in line[0]] == [
        ["`resnet20`", "0.4", "0.0005", "128", "0", "10.50 ± 0.71", "21.00 ± 1.41", "10.00, 12.00", "11.00 ± 1.41"],
        [
            "`resnet20_cc2` `--gate-norm center` `--gate-reg-weight 0.01`",
            *["0.2", "0.0005", "128", "0", "8.00", "16.00", "8.00", "8.00"],
        ],
    ]


def test_unfinished_runs_are_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    places = ["--page", str(page), "--result", str(tmp_path / "r.json")]
    runs = [write_run(tmp_path / "a", "one", [50, 20]), write_run(tmp_path / "b", "one", [50], seed=1)]
    with pytest.raises(SystemExit, match="it has 1 of 2 epochs: resume it first"):
        short_recipes.main([*runs, *places])
    assert len(json.loads((tmp_path / "r.json").read_text())) == 1  # the run before it is kept
    with pytest.raises(SystemExit, match=r"args\.yaml"):
        short_recipes.main([str(tmp_path), *places])
    assert page.read_text() == PAGE
