import dataclasses
import json
import re
from pathlib import Path

import pytest

from fastroute.bench import Result, Row, report
from fastroute.bench.plots import draw

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_result_comes_back_as_it_was_saved(tmp_path, make_result):
    make_result().save(tmp_path / "folder" / "a.json")
    loaded = Result.load(tmp_path / "folder" / "a.json")
    assert loaded.commit == "0123abc" and loaded.rows[1].ms == make_result().rows[1].ms
    assert [row.id for row in loaded.rows] == [row.id for row in make_result().rows]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"x": 1}]}', json.dumps({"rows": []})])
def test_other_files_are_no_results(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json; it must be a file that `fastroute bench` wrote"):
        Result.load(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Result.load(tmp_path / "b.json")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        Result.load(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": [1]}, "a row's labels are [1]; they must be names and values"),
        ({"ms": {"fastroute": 0}}, "they must be milliseconds above 0"),
        ({"ms": {"fastroute": None}}, "they must be milliseconds above 0"),
        ({"ms": {"eager": 1.0}}, "has no time of 'fastroute'"),
        ({"cold_ms": []}, "they must be milliseconds above 0"),
    ],
)
def test_rows_of_results_are_checked(changes, message, tmp_path, make_result):
    make_result().save(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text())
    values["rows"][1] |= changes
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(message)):
        Result.load(tmp_path / "a.json")


def test_tables_have_ratios_bandwidth_memory_and_means(make_result):
    rows = make_result().rows
    rows[1].ms["fastroute"] = 4.0
    text = report.tables(rows)
    starts = ("operator", "cross_connect", "geometric mean", "least")
    header, first, means, least = (cells(text, start) for start in starts)
    row = dict(zip(header, first, strict=True))
    assert row["ms"] == "1.000" and row["GB/s"] == "8.0" and row["share of copy"] == "0.50"
    assert row["× eager"] == "6.00" and row["× compile"] == "2.00" and row["saved MiB"] == "1.0"
    assert row["eager's saved MiB"] == "2.0" and row["shape"] == "2x4x8x8"
    assert dict(zip(header, means, strict=True))["× eager"] == "3.00"  # of 6 and 1.5
    assert dict(zip(header, least, strict=True))["× eager"] == "1.50"
    assert cells(text, "resnet20_cc2")[-3:] == ["30.000", "1.50", "0.2500"]


def test_steps_are_compared_compiled_with_compiled(make_result):
    row = make_result().rows[0]
    rows = [dataclasses.replace(row, ms=row.ms | {"compile": 3.0, "fastroute compiled": ms}) for ms in (1.5, 6.0)]
    header, means, least = (cells(report.tables(rows), start) for start in ("operator", "geometric mean", "least"))
    assert dict(zip(header, means, strict=True))["compiled × compile"] == "1.00"
    assert dict(zip(header, least, strict=True))["compiled × compile"] == "0.50"
    assert "compiled × compile" not in report.tables([row])


def test_comparison_takes_the_machines_drift_out(make_result):
    old = make_result(ours=2.0, eager=12.0, copy=1.0)
    new = make_result(ours=0.5, eager=6.0, copy=0.5)  # 4 times as fast; eager and the copy twice, compile as before
    text = report.compare(old, new)
    _, before, now, faster, drift, net = cells(text, "cross_connect")
    assert (before, now, faster, drift, net) == ("2.000", "0.500", "4.00", "1.59", "2.52")
    assert "differ" not in text
    new.machine["processor"], new.versions["torch"] = "Another", "2.12"
    text = report.compare(old, new)
    assert "The results differ in:\nprocessor: A Processor before, Another now\ntorch: 2.11 before, 2.12 now\n" in text
    new.rows.pop()
    assert "1 cases are in only one of the results" in report.compare(old, new)
    new.rows.clear()
    with pytest.raises(ValueError, match="no case in common"):
        report.compare(old, new)


def test_the_machines_drift_is_that_of_other_code():
    def row(size, suite="overhead", **ms):
        return Row(suite, {"shape": size}, ms)

    old = Result({}, {}, None, {"rounds": 3, "failures": []}, [row(8, fastroute=2.0, kernel=2.0, eager=3.0)])
    new = Result({}, {}, None, {"rounds": 5, "failures": ["x"]}, [row(8, fastroute=1.0, kernel=1.0, eager=3.0)])
    for result in (old, new):
        result.rows += [row(8, "operators", fastroute=1.0), row(9, fastroute=1.0, **{"no routing": 1.0})]
    text = report.compare(old, new)
    assert cells(text, "8")[3:] == ["2.00", "1.00", "2.00"]  # the kernel is ours, too
    assert "The results differ in:\nrounds: 3 before, 5 now\n\noverhead" in text
    assert text.count("overhead\n") == 1 and cells(text, "geometric mean")[-1] == "1.41"  # of cases in any order


def test_speed_section_is_written_between_its_marks(tmp_path, make_result):
    page, result = tmp_path / "docs" / "page.md", tmp_path / "results" / "a.json"
    make_result().save(result)
    page.parent.mkdir()
    page.write_text("above\n<!-- speed: old.json -->\nold\n<!-- end of speed -->\nbelow\n")
    text = report.rewrite_page(page, result)
    assert text.startswith("above\n<!-- speed: ../results/a.json -->\n")
    assert text.endswith("<!-- end of speed -->\nbelow\n")
    assert "old" not in text and "2 threads of A Processor (AVX2, torch 2.11)" in text
    assert cells(text, "float32, contiguous") == ["float32, contiguous", "6.0", "2.00", "0.50"]
    assert "is 2.00 times as fast as `torch.compile` and 6.0 times as fast as eager.\n" in text
    page.write_text(text)
    assert report.page_result(page).samefile(result) and report.rewrite_page(page, result) == text

    for wrong, times in (("nothing marked", 0), (text * 2, 2)):
        page.write_text(wrong)
        with pytest.raises(ValueError, match=f"<!-- speed: RESULT --> .* once, but has them {times} times"):
            report.rewrite_page(page, result)
    with pytest.raises(ValueError, match=r"no forward\+backward of cross_connect"):
        report.speed_section(Result({}, {}, None, {}), "a.json")


def test_sections_of_results_without_the_compiled_peer(make_result):
    result = make_result()
    del result.rows[0].ms["compile"], result.rows[1].ms["compile"]
    text = report.speed_section(result, "a.json")
    assert cells(text, "float32, contiguous") == ["float32, contiguous", "6.0", "", "0.50"]
    assert "The least of the 2 cases is 6.0 times as fast as eager." in text

    result.rows[2].ms["fastroute compiled"] = 20.0
    text = report.steps_section(result, "a.json")
    assert cells(text, "`resnet20_cc2`, 2")[1:5] == ["float32, contiguous", "20.000", "1.50", ""]
    assert "- eager, step: 1.50" in text and "- compiled" not in text


def test_cold_calls_are_shown_beside_those_in_a_row(make_result):
    result = make_result()
    for row in result.rows[:2]:
        row.cold_ms.update(fastroute=2.0, eager=8.0, compile=3.0, copy=1.5)
    header, first, means = (cells(report.tables(result.rows), s) for s in ("operator", "cross_connect", "geometric"))
    assert dict(zip(header, first, strict=True))["cold × compile"] == "1.50"
    assert dict(zip(header, means, strict=True))["cold × eager"] == "4.00"
    text = report.speed_section(result, "a.json")
    assert cells(text, "float32, contiguous")[1:] == ["6.0", "2.00", "0.50", "4.0", "1.50", "0.75"]
    assert "6.0 times as fast as eager,\ncold 1.50 times as fast as `torch.compile` and 4.0 times as" in text


def test_steps_section():
    def row(direction, network="resnet20_cc2", **ms):
        labels = {"network": network, "dtype": "float32", "layout": "contiguous", "batch": 64, "direction": direction}
        return Row("networks", labels, ms)

    machine = {"threads": 2, "processor": "A Processor", "capability": "AVX2"}
    result = Result(machine, {"torch": "2.11"}, None, {})
    with pytest.raises(ValueError, match="no step of a network"):
        report.steps_section(result, "a.json")
    step = {"fastroute": 10.0, "eager": 12.0, "compile": 9.0, "fastroute compiled": 6.0}
    result.rows += [row("forward+backward+optimiser", **step), row("forward", **{**step, "compile": 12.0})]
    result.rows += [row("forward", "base_cnn_cc2", **{**step, "eager": 5.0}), row("forward", "resnet20", fastroute=1.0)]
    text = report.steps_section(result, "a.json")
    assert "On 2 threads of A Processor (AVX2, torch 2.11), [all rows](a.json)." in text
    assert cells(text, "`resnet20_cc2`, 64")[1:] == [
        "float32, contiguous",
        "6.000",
        "1.20",
        "1.50",
        "6.000",
        "1.20",
        "2.00",
    ]
    assert cells(text, "`base_cnn_cc2`, 64")[2:] == ["", "", "", "6.000", "0.50", "1.50"]
    assert "- compiled, forward: 1.73, the least 1.50\n" in text and "- eager, forward: 0.77, the least 0.50\n" in text


def test_steps_of_a_gpu_have_no_threads(make_result):
    result = make_result()
    result.rows[2].ms["fastroute compiled"] = 20.0
    del result.machine["threads"]
    assert report.steps_section(result, "a.json").startswith("On A Processor (AVX2, torch 2.11), ")


@pytest.mark.parametrize("topic", report.SECTIONS)
def test_the_documentation_agrees_with_its_result(topic):
    assert report.rewrite_page(PAGE, report.page_result(PAGE, topic), topic) == PAGE.read_text()


def test_figures_are_drawn_where_there_are_figures(tmp_path, make_result):
    result = make_result()
    paths = draw(result, tmp_path, "a")
    assert [path.name for path in paths] == ["a_share_of_copy.svg", "a_steps.svg", "a_memory.svg"]
    assert "share of the copy" in paths[0].read_text() and "eager: cross_connect, float32" in paths[2].read_text()
    first = paths[0].read_bytes()
    assert draw(result, tmp_path, "a")[0].read_bytes() == first
    result.rows = result.rows[2:]
    assert [path.name for path in draw(result, tmp_path, "b")] == ["b_steps.svg"]
    result.rows[0].labels["network"] = "resnet18_cc2"  # with two paths alone, no figure by number of paths
    assert draw(result, tmp_path, "c") == []


def test_figures_without_a_peer_that_was_left_out(tmp_path, make_result):
    result = make_result()
    for row in result.rows[:2]:
        row.saved_bytes["compile"] = 2**20
    del result.rows[1].ms["compile"], result.rows[1].saved_bytes["compile"]
    assert "compile: cross_connect" in draw(result, tmp_path, "a")[2].read_text()
