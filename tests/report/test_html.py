"""The page of a sweep as a file: what stands in it, and that nothing in a run can change what it does."""

import argparse
import base64
import hashlib
import json
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from many_runs import write_grid, write_one

from fedray.cli import main
from fedray.errors import ConfigError
from fedray.report.html import ASSETS, embedded, report_command, write_page
from fedray.report.html_data import MOST_POINTS, best_of, evenly, spread
from fedray.report.html_figure import still
from fedray.report.results import read_results
from fedray.track.store import read_clients, read_rows

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>'\"&<!--"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"{self.prog}: {message}")


class Reader(HTMLParser):
    """Elements with their attributes and texts, as a browser would see them."""

    def __init__(self):
        super().__init__()
        self.elements, self.texts, self.scripts, self._open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif not (self._open and self._open[-1] == "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    return reader


def charts(path):
    (text,) = [text for attributes, text in read(path).scripts if attributes.get("id") == "data"]
    return json.loads(text)


def rows_of_table(path):
    """The headline table: a list of rows, each a dict of text and a set of what is bold."""
    (table,) = re.findall(r'<table id="table">(.*?)</table>', path.read_text(), re.S)

    def plain(text):
        return re.sub(r"<[^>]+>", "", text).strip()

    head = [plain(cell) for cell in re.findall(r"<th[^>]*>(.*?)</th>", table, re.S)]
    found = []
    for row in re.findall(r"<tr data-group.*?</tr>", table, re.S):
        cells = re.findall(r"<td([^>]*)>(.*?)</td>", row, re.S)
        values = dict(zip(head, (plain(text) for _, text in cells), strict=True))
        bold = {name for name, (attributes, _) in zip(head, cells, strict=True) if "best" in attributes}
        exact = {
            name: float(told[1])
            for name, (attributes, _) in zip(head, cells, strict=True)
            if (told := re.search(r'data-value="([^"]+)"', attributes))
        }
        found.append((values, bold, exact))
    return found


def test_the_table_has_the_mean_and_deviation_over_seeds_of_what_the_runs_recorded(tmp_path):
    write_grid(tmp_path, pruners=("magnitude", "snip"), sparsities=(0.5, 0.9), alphas=(0.3,), rounds=6)
    path, _ = write_page(tmp_path)
    expected = {}
    for run in sorted(tmp_path.glob("run-*")):
        manifest, last = json.loads((run / "manifest.json").read_text()), read_rows(run)[-1]
        key = (manifest["choices"]["pruner"], str(manifest["config"]["pruner"]["sparsity"]))
        expected.setdefault(key, []).append((last["test/accuracy"], last["wire/total_up_bytes"] / 1e6))
    found = {(values["pruner"], values["sparsity"]): (values, exact) for values, _, exact in rows_of_table(path)}
    assert set(found) == set(expected)
    for key, several in expected.items():
        values, exact = found[key]
        accuracies = [accuracy for accuracy, _ in several]
        mean, deviation = statistics.fmean(accuracies), statistics.stdev(accuracies)
        assert values["n"] == "3"
        assert values["test/accuracy"] == f"{mean:.4f} ± {deviation:.4f}"
        assert exact["test/accuracy"] == pytest.approx(mean, rel=1e-12)
        assert exact["MB up"] == pytest.approx(statistics.fmean(mb for _, mb in several), rel=1e-12)


def test_bold_is_the_largest_accuracy_the_smallest_loss_and_the_fewest_bytes(tmp_path):
    write_grid(tmp_path, pruners=("magnitude",), sparsities=(0.5, 0.8, 0.95), alphas=(0.3,), rounds=6)
    rows = rows_of_table(write_page(tmp_path)[0])
    for name, pick in (("test/accuracy", max), ("test/loss", min), ("MB up", min), ("dense / sent", max)):
        best = pick(exact[name] for _, _, exact in rows)
        assert [name in bold for _, bold, _ in rows] == [exact[name] == best for _, _, exact in rows], name
    assert not any({"sparsity at the end", "s", "n"} & bold for _, bold, _ in rows)


def test_nothing_is_best_where_all_are_equal(tmp_path):
    write_one(tmp_path / "a", pruner="magnitude")
    write_one(tmp_path / "b", pruner="snip")
    _, page = write_page(tmp_path)
    (column,) = [column for column in page.columns if column.title == "MB up"]
    assert best_of(column) == set()


def test_no_text_of_a_run_becomes_an_element_or_a_script(tmp_path):
    write_one(tmp_path / "a", pruner=HOSTILE, name=HOSTILE, warnings=[HOSTILE])
    write_one(tmp_path / "b", pruner="snip")
    write_one(tmp_path / "c", pruner="x", status="failed", error=HOSTILE, log=f"{HOSTILE}\n{HOSTILE}")
    hostile_folder = tmp_path / "d <img src=x onerror=alert(1)>"
    write_one(hostile_folder, pruner="y", status="failed", error="it broke")
    path, _ = write_page(tmp_path, title=HOSTILE)
    reader = read(path)
    assert len(reader.scripts) == 3
    assert not [tag for tag, _ in reader.elements if tag in ("img", "iframe", "object", "embed", "link")]
    assert not [attributes for _, attributes in reader.elements if any(name.startswith("on") for name in attributes)]
    for text in (HOSTILE, "d <img src=x onerror=alert(1)>"):
        assert reader.text.count(text) >= 1  # it is shown all the same, as text
    assert charts(path)["methods"] == sorted([HOSTILE, "snip"])


def test_embedded_json_cannot_end_its_element():
    text = embedded({"a": HOSTILE, "b": "\u2028"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": HOSTILE, "b": "\u2028"}


def test_the_page_asks_for_nothing_and_runs_only_the_scripts_it_names(tmp_path):
    write_one(tmp_path / "a")
    reader = read(write_page(tmp_path)[0])
    for tag, attributes in reader.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith("#"), tag
    (policy,) = [
        attributes["content"]
        for tag, attributes in reader.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    running = [text for attributes, text in reader.scripts if attributes.get("type") != "application/json"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running]
    assert rules["script-src"].split() == [f"'sha256-{one}'" for one in hashes]


def test_curves_are_what_each_seed_recorded_round_by_round(tmp_path):
    runs = write_grid(tmp_path, pruners=("magnitude",), sparsities=(0.5,), alphas=(0.3,), rounds=12, every=3)
    (group,) = charts(write_page(tmp_path)[0])["groups"]
    grid, *seeds = group["series"]["test/accuracy"]
    rounds, megabytes, seconds, simulated = group["grids"][grid]
    assert rounds == [3, 6, 9, 12]
    assert simulated is None
    recorded = [{row["round"]: row for row in read_rows(run)} for run in runs]
    for seed, rows in zip(seeds, recorded, strict=True):
        assert seed == [pytest.approx(rows[at]["test/accuracy"], rel=1e-5) for at in rounds]
    for at, mb, second in zip(rounds, megabytes, seconds, strict=True):
        assert mb == pytest.approx(statistics.fmean(rows[at]["wire/total_bytes"] for rows in recorded) / 1e6, rel=1e-5)
        assert second == pytest.approx(statistics.fmean(rows[at]["time/total_s"] for rows in recorded), rel=1e-5)
    assert len(group["grids"][group["series"]["train/loss"][0]][0]) == 12


def test_a_thinned_curve_keeps_its_ends_and_every_value_is_one_that_was_recorded(tmp_path):
    rounds = 3 * MOST_POINTS
    run = write_one(tmp_path / "a", rounds=rounds)
    path, page = write_page(tmp_path)
    rows = {row["round"]: row for row in read_rows(run)}
    (group,) = charts(path)["groups"]
    for metric in ("test/accuracy", "prune/churn"):
        grid, values = group["series"][metric]
        shown = group["grids"][grid][0]
        assert len(shown) == MOST_POINTS
        assert values == [pytest.approx(rows[at][metric], rel=1e-5) for at in shown]
    shown = group["grids"][group["series"]["test/accuracy"][0]][0]
    assert (shown[0], shown[-1]) == (1, rounds)
    assert f"show {MOST_POINTS} of them" in page.thinning
    assert page.thinning in read(path).text


def test_thinning_keeps_the_rounds_in_which_masks_changed(tmp_path):
    run = write_one(tmp_path / "a", rounds=3 * MOST_POINTS)
    (group,) = charts(write_page(tmp_path)[0])["groups"]
    _, values = group["series"]["prune/churn"]
    changed = sum(row["prune/churn"] > 0 for row in read_rows(run))
    assert sum(value > 0 for value in values) == changed > 0


@pytest.mark.parametrize(("count", "points"), [(10, 3), (11, 10), (1000, 7), (17, 16)])
def test_evenly_picks_distinct_rounds_with_both_ends(count, points):
    picked = evenly(list(range(count)), points)
    assert (len(set(picked)), picked[0], picked[-1], picked) == (points, 0, count - 1, sorted(picked))


def test_a_value_that_is_not_finite_is_a_gap_and_not_a_number(tmp_path):
    run = write_one(tmp_path / "a", rounds=3)
    text = (run / "rounds.jsonl").read_text().splitlines()
    row = json.loads(text[1]) | {"test/accuracy": None}
    (run / "rounds.jsonl").write_text("\n".join([text[0], json.dumps(row), text[2]]) + "\n")
    (group,) = charts(write_page(tmp_path)[0])["groups"]
    _, values = group["series"]["test/accuracy"]
    assert [value is None for value in values] == [False, True, False]


def test_clients_are_those_of_the_last_evaluation_all_seeds_together(tmp_path):
    runs = write_grid(tmp_path, pruners=("snip",), sparsities=(0.5,), alphas=(0.3,), rounds=7, every=3, clients=9)
    (group,) = charts(write_page(tmp_path)[0])["groups"]
    values = [row["test/accuracy"] for run in runs for row in read_clients(run) if row["round"] == 7]
    shown = group["clients"]
    assert shown["rounds"] == [7]
    assert sum(shown["counts"]) == len(values) == 27
    assert shown["mean"] == pytest.approx(statistics.fmean(values), rel=1e-5)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    assert (shown["p10"], shown["p90"]) == (pytest.approx(tenths[0], rel=1e-5), pytest.approx(tenths[-1], rel=1e-5))
    low, high = shown["range"]
    width = (high - low) / len(shown["counts"])
    inside = [sum(low + at * width <= value < low + (at + 1) * width for value in values) for at in range(19)]
    assert shown["counts"][:19] == inside


def test_a_torn_line_of_clients_costs_that_line_only(tmp_path):
    run = write_one(tmp_path / "a", rounds=2, clients=5)
    with (run / "clients.jsonl").open("a") as file:
        file.write('{"round": 2, "clie')
    (group,) = charts(write_page(tmp_path)[0])["groups"]
    assert sum(group["clients"]["counts"]) == 5


def test_bytes_by_part_add_up_to_what_the_run_sent(tmp_path):
    runs = write_grid(tmp_path, pruners=("magnitude",), sparsities=(0.8,), alphas=(0.3,), rounds=8)
    (group,) = charts(write_page(tmp_path)[0])["groups"]
    for way in ("up", "down"):
        total = statistics.fmean(read_rows(run)[-1][f"wire/total_{way}_bytes"] for run in runs) / 1e6
        assert sum(group["bytes"][way]) == pytest.approx(total, rel=1e-4)


def test_layers_are_whole_before_there_is_a_mask_and_as_recorded_after(tmp_path):
    run = write_one(tmp_path / "a", rounds=6)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines[:2]:
        line["model/sparsity"] = 0.0
        for name in [name for name in line if "layer" in name]:
            del line[name]
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (group,) = charts(write_page(tmp_path)[0])["groups"]
    layers = group["layers"]
    assert layers["rounds"] == [1, 2, 3, 4, 5, 6]
    for name, runs in zip(layers["names"], layers["values"], strict=True):
        values = [value for value, times in runs for _ in range(times)]
        assert values[:2] == [0, 0]
        assert values[2:] == [pytest.approx(line[f"model/layer_sparsity/{name}"], abs=1e-4) for line in lines[2:]]


def test_what_failed_is_named_with_its_sentence_and_the_end_of_its_log(tmp_path):
    write_one(tmp_path / "good")
    log = "\n".join(f"line {at}" for at in range(200))
    write_one(tmp_path / "bad", pruner="snip", status="failed", error="client 8 sent nan. Lower trainer.lr", log=log)
    write_one(tmp_path / "cut", pruner="rigl", status="interrupted")
    write_one(tmp_path / "torn")
    (tmp_path / "torn" / "manifest.json").write_text("{")
    cells = [
        {
            "id": "0",
            "folder": "never",
            "overrides": ["pruner=oops"],
            "status": "failed",
            "error": "pruner=oops is none",
        },
        {"id": "1", "folder": "good", "overrides": [], "status": "done", "error": None},
    ]
    sweep = {"started": "", "command": "python -m fedray -m pruner=a,b", "cells": cells}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    text = read(write_page(tmp_path)[0]).text
    assert "5 runs: " in text
    for wanted in (
        "bad client 8 sent nan. Lower trainer.lr.", "line 199", "never pruner=oops is none.", "interrupted cut",
        "unreadable torn", "is not valid JSON", "python -m fedray -m pruner=a,b",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "line 100" not in text


def test_the_still_picture_ends_where_its_shortest_seed_ends(tmp_path):
    for seed in (0, 1):
        rows = write_one(tmp_path / str(seed), seed=seed, rounds=20) / "rounds.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:5]))
    _, page = write_page(tmp_path)
    (line,) = still(page.charts)["lines"]
    assert len(line["points"].split(" ")) == 5


def test_a_folder_in_which_nothing_finished_still_makes_a_page_of_what_failed(tmp_path):
    write_one(tmp_path / "bad", status="failed", error="it broke")
    path, page = write_page(tmp_path)
    assert "No run has finished" in read(path).text
    assert [failure.error for failure in page.failures] == ["it broke."]


def test_settings_that_differ_are_counted_and_those_alike_are_listed_apart(tmp_path):
    write_grid(tmp_path, pruners=("magnitude", "snip"), sparsities=(0.5, 0.9), alphas=(0.3,), seeds=(0,), rounds=2)
    _, page = write_page(tmp_path)
    settings = dict(page.settings)
    assert settings["pruner.sparsity"] == [("0.5", 2), ("0.9", 2)]
    assert ("partition.alpha", "0.3") in page.common
    assert "pruner.sparsity" not in dict(page.common)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "-"), ([0.5], "0.5000"), ([0.5, 0.7], "0.6000 ± 0.1414"), ([3, 3], "3.0000"),
        ([12.5, 13.5], "13.00 ± 0.71"), ([1e-5], "0.00001000"), ([-2000.0, -1000.0], "-1,500 ± 707"),
    ],
)  # fmt: skip
def test_numbers_have_the_decimals_that_suit_their_size(values, text):
    assert spread(values) == text


def test_the_command_says_where_the_page_is_and_what_it_holds(tmp_path, capsys):
    write_one(tmp_path / "runs" / "a")
    out = tmp_path / "deep" / "er" / "page.html"
    assert main(["report", str(tmp_path / "runs"), "--out", str(out), "--title", "A title"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 1 run: 1 finished; ")
    assert "<title>A title</title>" in out.read_text()
    assert main(["report", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "runs" / "report.html").is_file()


def test_a_page_in_the_folder_of_the_runs_is_no_run(tmp_path):
    write_one(tmp_path / "a")
    write_page(tmp_path)
    assert len(read_results(tmp_path)) == 1
    assert write_page(tmp_path)[1].counts == {"finished": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "does not exist"]),
        (["empty"], ["empty", "no run"]),
        (["runs", "--out", "runs"], ["--out", "folder"]),
        (["runs", "--out", "page.pdf"], ["page.pdf", ".html"]),
        (["runs", "--title", " "], ["--title", "empty"]),
        (["runs", "--out", "runs/a/manifest.json/x.html"], ["--out", "cannot be written"]),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_one(tmp_path / "runs" / "a")
    with pytest.raises(ConfigError) as refused:
        report_command(arguments, parser=Parser)
    assert all(word in str(refused.value) for word in words)
    assert "\n" not in str(refused.value)


def test_a_missing_template_engine_is_one_sentence_that_names_the_extra(tmp_path, monkeypatch):
    import importlib.util

    write_one(tmp_path / "a")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"jinja2: pip install 'fedray\[report\]'"):
        write_page(tmp_path)


def test_writing_a_page_loads_nothing_heavy(tmp_path):
    write_one(tmp_path / "a")
    code = (
        "import sys; from fedray.cli import main; main(['report', sys.argv[1]]); "
        "print(sorted({'torch', 'ray', 'wandb', 'hydra', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_chart_library_is_the_published_file_with_its_licences():
    library = (ASSETS / "echarts.min.js").read_bytes()
    # SHA-256 of dist/echarts.min.js in the package echarts 6.1.0 of the npm registry.
    assert hashlib.sha256(library).hexdigest() == "b66b25aeb4df84e33199dc21694014d336d222cbd9deb0e5a7c14bd6aa0d0fd0"
    assert {path.name for path in (ASSETS / "licenses").iterdir()} == {
        "LICENSE-echarts",
        "NOTICE-echarts",
        "LICENSE-d3",
    }


def test_a_wheel_carries_what_the_page_is_made_of():
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling: pip install 'fedray[dev]'")
    files = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    made_of = {str(path.relative_to(ROOT)) for path in ASSETS.rglob("*") if path.is_file()}
    assert len(made_of) == 7
    assert made_of <= files
