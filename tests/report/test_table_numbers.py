"""Laws of the numbers in a table: those of pandas and scipy from rounds.jsonl, in every format."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import pandas
import pytest
from pylatexenc.latex2text import LatexNodes2Text
from pylatexenc.latexwalker import LatexEnvironmentNode, LatexWalker
from scipy import stats

from fedray.errors import ConfigError
from fedray.report.paired import difference

PRUNERS = ("feddst", "magnitude", "none")
SPARSITIES = (0.5, 0.8)
SEEDS = (0, 1, 2)


def accuracies(pruner, sparsity, seed):
    """Numbers with as many digits as a float has."""
    at = PRUNERS.index(pruner) * 31 + (sparsity or 0) * 17 + seed * 7
    return [0.9 + math.sin(at + step) / 11 for step in range(4)]


@pytest.fixture
def write(report, tmp_path):
    def make(pruner, sparsity, seed, *, values=None, status="finished", folder=None, bytes_=1000, **config):
        node = {"_target_": "fedray.pruners.Any", "sparsity": sparsity} if sparsity is not None else {}
        values = accuracies(pruner, sparsity, seed) if values is None else values
        rows = [
            {"test/accuracy": value, "test/loss": 1 - value, "wire/total_bytes": bytes_ * at, "time/total_s": 0.5 * at}
            for at, value in enumerate(values, 1)
        ]
        return report.write(
            folder or tmp_path / f"{pruner}-{sparsity}-{seed}", down=[], up=[], rounds=len(rows), rows=rows,
            status=status, config={"seed": seed, "pruner": node, **config}, choices={"pruner": pruner},
        )  # fmt: skip

    return make


MADE: list[Path] = []


@pytest.fixture
def sweep(write, tmp_path_factory):
    """Two pruners by two sparsities, and none; three seeds each. Made once, and only read."""
    if not MADE:
        folder = tmp_path_factory.mktemp("sweep")
        for seed in SEEDS:
            for pruner in PRUNERS[:2]:
                for sparsity in SPARSITIES:
                    write(pruner, sparsity, seed, folder=folder / f"{pruner}-{sparsity}-{seed}")
            write("none", None, seed, folder=folder / f"none-{seed}")
        MADE.append(folder)
    return MADE[0]


def rows_of(folder):
    """All rows of all runs, read without fedray."""
    frames = []
    for manifest in sorted(folder.rglob("manifest.json")):
        facts = json.loads(manifest.read_text())
        lines = (manifest.parent / "rounds.jsonl").read_text().splitlines()
        frame = pandas.DataFrame([json.loads(line) for line in lines])
        frame["pruner"], frame["seed"] = facts["choices"]["pruner"], facts["config"]["seed"]
        frame["sparsity"] = str(facts["config"]["pruner"].get("sparsity", "-"))
        frames.append(frame)
    return pandas.concat(frames)


NUMBERS = ("n", "mean", "std", "pairs", "difference", "low", "high", "target")


def csv_of(text):
    """As Python reads floats: pandas' own reader may be a bit off in the last digit."""
    frame = pandas.DataFrame(list(csv.DictReader(io.StringIO(text)))).rename(columns={"pruner.sparsity": "sparsity"})
    for name in NUMBERS:
        if name in frame:
            frame[name] = [float(value) if value else math.nan for value in frame[name]]
    return frame


@pytest.mark.parametrize(("at", "pick"), [("final", "last"), ("best", "max")])
def test_means_and_deviations_are_those_of_pandas(at, pick, sweep, report):
    found = csv_of(report.table(sweep, "--format", "csv", "--at", at)).set_index(["pruner", "sparsity"])
    per_run = rows_of(sweep).groupby(["pruner", "sparsity", "seed"])["test/accuracy"].agg(pick)
    assert len(found) == 5
    for key, line in found.iterrows():
        values = per_run.loc[key].sort_index()
        # What each run has is the same bits; a mean of pandas is off by a rounding or two itself.
        assert [float(value) for value in line["values"].split()] == values.tolist()
        assert line["n"] == len(SEEDS)
        assert line["mean"] == pytest.approx(values.mean(), rel=4e-16)
        assert line["std"] == pytest.approx(values.std(), rel=1e-13)
        assert line["mean"] == statistics.fmean(values.tolist())
        assert line["std"] == statistics.stdev(values.tolist())


def test_every_printed_digit_is_that_of_pandas(sweep, report):
    final = rows_of(sweep).groupby(["pruner", "sparsity", "seed"])["test/accuracy"].last()
    (lines,) = report.tables(report.table(sweep))
    for line in lines:
        values = final.loc[line["pruner"], line["sparsity"]]
        assert line["test/accuracy"] == f"{values.mean():.4f} ± {values.std():.4f}"


def test_a_pivot_has_the_numbers_of_the_lines(sweep, report):
    pivot = csv_of(report.table(sweep, "--format", "csv", "--rows", "pruner", "--cols", "sparsity"))
    lines = csv_of(report.table(sweep, "--format", "csv")).set_index(["pruner", "sparsity"])
    assert len(pivot) == 3 * 3
    for _, cell in pivot.iterrows():
        if cell["n"]:
            assert cell["mean"] == lines.loc[(cell["pruner"], cell["sparsity"]), "mean"]
        else:
            assert cell["state"] == "missing"
            assert math.isnan(cell["mean"])
    assert int(pivot["n"].astype(bool).sum()) == 5


def test_a_csv_is_rows_and_nothing_else(sweep, report, capsys):
    text = report.table(sweep, "--format", "csv", "--rows", "pruner", "--cols", "sparsity")
    lengths = {len(row) for row in csv.reader(io.StringIO(text))}
    assert len(lengths) == 1


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_paired_intervals_are_those_of_scipy(confidence, sweep, report):
    final = rows_of(sweep).groupby(["pruner", "sparsity", "seed"])["test/accuracy"].last()
    text = report.table(sweep, "--format", "csv", "--baseline", "pruner=none", "--confidence", confidence)
    for _, line in csv_of(text).iterrows():
        if line["pruner"] == "none":
            assert math.isnan(line["difference"])
            continue
        ours, theirs = final.loc[line["pruner"], line["sparsity"]], final.loc["none", "-"]
        told = stats.ttest_rel(ours, theirs).confidence_interval(confidence)
        assert (line["pairs"], line["low"], line["high"]) == (3, told.low, told.high)
        assert line["difference"] == statistics.fmean((ours - theirs).tolist())
        # The other road to the same interval.
        apart = (ours - theirs).to_numpy()
        low, high = stats.t.interval(confidence, len(apart) - 1, loc=apart.mean(), scale=stats.sem(apart))
        assert (line["low"], line["high"]) == pytest.approx((low, high), rel=1e-9)


def test_pairs_are_made_by_seed_and_only_of_seeds_that_both_have(write, report, tmp_path):
    for seed, value in ((0, 0.5), (1, 0.6), (5, 0.1)):
        write("none", None, seed, values=[value])
    for seed, value in ((1, 0.9), (0, 0.7), (7, 0.2)):
        write("feddst", 0.5, seed, values=[value])
    line = csv_of(report.table(tmp_path, "--format", "csv", "--baseline", "pruner=none")).iloc[0]
    assert (line["n"], line["pairs"]) == (3, 2)
    assert line["difference"] == pytest.approx((0.2 + 0.3) / 2)


def test_one_pair_has_a_difference_and_no_interval(write, report, tmp_path):
    write("none", None, 0, values=[0.5])
    write("feddst", 0.5, 0, values=[0.75])
    (lines,) = report.tables(report.table(tmp_path, "--baseline", "pruner=none"))
    assert [line["difference to pruner=none"] for line in lines] == ["+0.2500 (n=1)", "baseline"]


def test_differences_that_are_all_the_same_have_an_interval_of_no_width():
    found = difference([0.5, 0.75, 1.0], [0.25, 0.5, 0.75], 0.95)
    assert (found.mean, found.low, found.high, found.pairs) == (0.25, 0.25, 0.25, 3)


def test_a_baseline_is_what_is_like_it_in_everything_else(write, report, tmp_path):
    """Each sparsity has its own magnitude, each alpha its own everything."""
    for alpha in (0.1, 0.3):
        for sparsity in SPARSITIES:
            for pruner, base in (("feddst", 0.5), ("magnitude", 0.25)):
                value = base + alpha + sparsity / 8
                folder = tmp_path / f"{pruner}-{sparsity}-{alpha}"
                partition = {"_target_": "d.Dirichlet", "alpha": alpha}
                write(pruner, sparsity, 0, values=[value], folder=folder, partition=partition)
    (lines,) = report.tables(report.table(tmp_path, "--baseline", "pruner=magnitude"))
    found = {
        (line["pruner"], line["sparsity"], line["alpha"]): line["difference to pruner=magnitude"] for line in lines
    }
    assert len(found) == 8
    assert {value for key, value in found.items() if key[0] == "feddst"} == {"+0.2500 (n=1)"}
    assert {value for key, value in found.items() if key[0] == "magnitude"} == {"baseline"}


def test_what_has_no_one_baseline_is_named(sweep, report):
    text = report.table(sweep, "--baseline", "pruner=magnitude")
    (lines,) = report.tables(text)
    assert next(line for line in lines if line["pruner"] == "none")["difference to pruner=magnitude"] == "-"
    assert "- no pruner has no one baseline: 2 have pruner=magnitude and differ in pruner.sparsity; add one" in text


def test_what_is_unlike_every_baseline_is_named(write, report, tmp_path):
    write("none", None, 0, rounds=10)
    write("feddst", 0.5, 0, rounds=20)
    text = report.table(tmp_path, "--baseline", "pruner=none")
    assert "has no baseline: none with pruner=none is like it in rounds." in text


def test_a_pivot_has_a_second_table_of_differences(sweep, report):
    first, second = report.tables(
        report.table(sweep, "--rows", "pruner", "--cols", "sparsity", "--baseline", "pruner=none")
    )
    assert list(first[0]) == list(second[0])
    assert {row["pruner \\ sparsity"]: row["-"] for row in second}["none"] == "baseline"
    assert second[0]["0.5"].endswith("(n=3)")


# -- the best --------------------------------------------------------------------------------------------------------


def bold(text):
    """By row and column of the first table: what stands between stars."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.split("\n\n")[0].splitlines()]
    return {
        (line[0].strip("| "), column) for line in lines[2:] for column, cell in zip(lines[0], line, strict=True)
        if cell.strip("| ").startswith("**")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "winners"),
    [
        ([], {("a", "0.5"), ("b", "0.8")}),
        (["--bold", "row"], {("a", "0.5"), ("b", "0.8")}),
        (["--bold", "none"], set()),
        (["--metric", "test/loss"], {("b", "0.5"), ("a", "0.8")}),
    ],
)
def test_the_best_of_a_column_is_bold_and_of_a_loss_the_least(extra, winners, write, report, tmp_path):
    for pruner, first, second in (("a", 0.75, 0.25), ("b", 0.5, 0.625)):
        for sparsity, value in ((0.5, first), (0.8, second)):
            run = write("none", sparsity, 0, values=[value], folder=tmp_path / f"{pruner}{sparsity}")
            path = run / "manifest.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "choices": {"pruner": pruner}}))
            rows = run / "rounds.jsonl"
            rows.write_text(json.dumps({"round": 1, "test/accuracy": value, "test/loss": value}) + "\n")
    assert bold(report.table(tmp_path, "--rows", "pruner", "--cols", "sparsity", *extra)) == winners


def test_equal_ones_are_all_bold_and_one_alone_is_not(write, report, tmp_path):
    write("feddst", 0.5, 0, values=[0.5])
    assert bold(report.table(tmp_path)) == set()
    write("magnitude", 0.5, 0, values=[0.5])
    write("none", None, 0, values=[0.25])
    assert {row for row, _ in bold(report.table(tmp_path))} == {"feddst", "magnitude"}


# -- what is not there -----------------------------------------------------------------------------------------------


def test_cells_without_a_number_say_why(write, report, tmp_path):
    write("feddst", 0.5, 0)
    write("feddst", 0.8, 0, status="failed")
    write("magnitude", 0.8, 0, status="running")
    write("none", None, 0, status="interrupted")
    text = report.table(tmp_path, "--rows", "pruner", "--cols", "sparsity")
    found = {line["pruner \\ sparsity"]: line for line in report.tables(text)[0]}
    assert found["feddst"]["0.8"] == "failed"
    assert found["magnitude"] == {"pruner \\ sparsity": "magnitude", "-": "-", "0.5": "-", "0.8": "running"}
    assert found["none"]["-"] == "interrupted"
    assert "- is a cell without a run." in text
    for name, status in (("feddst-0.8-0", "failed"), ("magnitude-0.8-0", "running"), ("none-None-0", "interrupted")):
        assert f"- {name} is left out: {status}." in text
    states = csv_of(report.table(tmp_path, "--rows", "pruner", "--cols", "sparsity", "--format", "csv"))
    assert sorted(filter(None, states["state"])) == ["failed", "interrupted", *["missing"] * 5, "running"]


def test_a_cell_that_failed_before_it_was_a_run_is_in_the_table(write, report, tmp_path):
    write("feddst", 0.5, 0)
    cell = {
        "folder": "x",
        "status": "failed",
        "error": "no memory",
        "overrides": ["pruner=snip", "pruner.sparsity=0.5"],
    }
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [cell]}))
    text = report.table(tmp_path, "--rows", "pruner", "--cols", "pruner.sparsity")
    assert {line["pruner \\ pruner.sparsity"]: line["0.5"] for line in report.tables(text)[0]}["snip"] == "failed"
    assert "- x is left out: failed: no memory." in text


def test_a_cell_with_fewer_seeds_says_how_many(write, report, tmp_path):
    for seed in SEEDS:
        write("feddst", 0.5, seed)
        write("magnitude", 0.5, seed)
    write("magnitude", 0.8, 0)
    write("magnitude", 0.8, 1)
    found = report.tables(report.table(tmp_path, "--rows", "pruner", "--cols", "sparsity"))[0]
    assert found[1]["0.8"].endswith("(n=2)")
    assert "n=" not in found[0]["0.5"]


# -- targets ---------------------------------------------------------------------------------------------------------


def test_what_a_target_costs_is_counted_in_rounds_megabytes_and_seconds(write, report, tmp_path):
    for seed, values in enumerate(([0.5, 0.9, 0.95], [0.95, 0.2, 0.3], [0.1, 0.2, 0.3])):
        write("feddst", 0.5, seed, values=values, bytes_=2_000_000)
    text = report.table(tmp_path, "--at", "target", "--target", "0.9")
    (line,) = report.tables(text)[0]
    assert line["rounds to test/accuracy 0.9"] == "1.5000 ± 0.7071"
    assert line["seeds"] == "2"
    assert "feddst-0.5-2 does not reach its target and is not in a mean." in text
    (line,) = report.tables(report.table(tmp_path, "--at", "target", "--target", "0.9", "--cost", "bytes"))[0]
    assert line["MB to test/accuracy 0.9"].startswith("3.0000")
    exact = csv_of(report.table(tmp_path, "--at", "target", "--target", "0.9", "--cost", "bytes", "--format", "csv"))
    assert (exact["mean"][0], exact["target"][0], exact["cost"][0]) == (3_000_000, 0.9, "bytes")
    seconds = csv_of(
        report.table(tmp_path, "--at", "target", "--target", "0.9", "--cost", "seconds", "--format", "csv")
    )
    assert seconds["values"][0] == "1.0 0.5"


def test_who_never_reaches_a_target_is_in_the_table_and_never_the_best(write, report, tmp_path):
    write("feddst", 0.5, 0, values=[0.9])
    write("feddst", 0.5, 1, values=[0.1])
    for seed in (0, 1):
        write("magnitude", 0.5, seed, values=[0.1, 0.9])
        write("none", None, seed, values=[0.1, 0.2, 0.9])
    write("magnitude", 0.8, 0, values=[0.1])
    text = report.table(tmp_path, "--at", "target", "--target", "0.9")
    (lines,) = report.tables(text)
    found = {(line["pruner"], line["sparsity"]): line["rounds to test/accuracy 0.9"] for line in lines}
    assert found["magnitude", "0.8"] == "never"
    assert found["feddst", "0.5"] == "1 ± -"
    assert {row for row, _ in bold(text)} == {"magnitude"}, "one seed of feddst is faster and the other never arrives"


def test_a_run_has_its_own_target(write, report, tmp_path):
    write("feddst", 0.5, 0, values=[0.5, 0.9], stop={"metric": "test/accuracy", "targets": [0.9]})
    assert report.tables(report.table(tmp_path, "--at", "target"))[0][0]["rounds to test/accuracy target"] == "2 ± -"


# -- LaTeX -----------------------------------------------------------------------------------------------------------

HOSTILE = r"a_b%c&d#e{f}g$h^i~j\k<l>m|n\"[o]*p"


def cells_of(text):
    """The rows of each tabular, as a parser of LaTeX prints them."""
    found = []
    nodes, _, _ = LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
    for node in nodes:
        if isinstance(node, LatexEnvironmentNode) and node.environmentname == "tabular":
            inside = text[node.pos : node.pos + node.len]
            body = inside.split(r"\toprule")[1].split(r"\bottomrule")[0].replace(r"\midrule", "")
            rows = [row for row in body.split("\\\\\n") if row.strip()]
            to_text = LatexNodes2Text(math_mode="text")
            found.append([[to_text.latex_to_text(cell).strip() for cell in row.split(" & ")] for row in rows])
    return found


def test_a_tabular_holds_what_the_markdown_holds(sweep, report):
    arguments = ("--rows", "pruner", "--cols", "sparsity", "--baseline", "pruner=none")
    first, second = cells_of(report.table(sweep, *arguments, "--format", "latex"))
    told = report.tables(report.table(sweep, *arguments))
    for tabular, table in zip((first, second), told, strict=True):
        header, *rows = tabular
        assert [name.replace("\\ ", "\\") for name in header] == [name.replace("\\ ", "\\") for name in table[0]]
        assert rows == [list(row.values()) for row in table]


def test_whatever_a_setting_is_called_latex_prints_it(write, report, tmp_path):
    write("feddst", 0.5, 0, model={"kind": HOSTILE})
    write("feddst", 0.5, 1, model={"kind": "[8, 16]"})
    text = report.table(tmp_path, "--format", "latex")
    # The parser knows no names of single letters, and draws a circumflex and two quotes in a finer way.
    plain = text
    for name, letter in (("backslash", "/"), ("less", "<"), ("greater", ">"), ("bar", "!")):
        plain = plain.replace(f"\\text{name}{{}}", letter)
    ((_, *rows),) = cells_of(plain)
    wanted = HOSTILE.translate({ord("\\"): "/", ord("|"): "!", ord('"'): "”", ord("^"): "\u02c6"})
    assert {row[0] for row in rows} == {wanted, "[8, 16]"}
    starts = [line[0] for line in text.splitlines()]
    assert not {"[", "*"} & set(starts), "after a line break or a rule a bracket would be its length"
    body = text.split(r"\midrule")[1]
    unescaped = [at for at, letter in enumerate(body) if letter in "%#_" and body[at - 1] != "\\"]
    assert unescaped == []
    assert body.count(" & ") == 2 * (len(rows[0]) - 1)


def test_the_best_is_bold_in_latex_too(sweep, report):
    text = report.table(sweep, "--rows", "pruner", "--cols", "sparsity", "--format", "latex")
    assert text.count(r"\textbf{") == 2
    assert r" $\pm$ " in text


@pytest.mark.full
@pytest.mark.parametrize("engine", ["pdflatex", "tectonic"])
def test_a_table_compiles(engine, write, sweep, report, tmp_path):
    if shutil.which(engine) is None:
        pytest.skip(f"{engine} is not installed")
    write("feddst", 0.5, 9, model={"kind": HOSTILE})
    write("feddst", 0.5, 10, model={"kind": "[8, 16] * é"})
    write("none", None, 9)
    parts = [
        report.table(sweep, "--format", "latex"),
        report.table(
            tmp_path, "--rows", "pruner,kind", "--cols", "sparsity", "--baseline", "pruner=none", "--format", "latex"
        ),
    ]
    document = "\n\n".join(parts)
    source = tmp_path / "paper.tex"
    source.write_text(
        "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n\\tiny\n"
        + document
        + "\n\\end{document}\n"
    )
    command = [engine, "-interaction=nonstopmode", "-halt-on-error"] if engine == "pdflatex" else [engine]
    done = subprocess.run([*command, source.name], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 1000


# -- files, choices, refusals ----------------------------------------------------------------------------------------


def test_several_keys_make_rows_and_columns(write, report, tmp_path):
    for pruner in ("feddst", "magnitude"):
        for sparsity in SPARSITIES:
            for cohort in (5, 10):
                folder = tmp_path / f"{pruner}{sparsity}{cohort}"
                write(pruner, sparsity, 0, cohort=cohort, values=[sparsity / cohort], folder=folder)
    (lines,) = report.tables(report.table(tmp_path, "--rows", "pruner,cohort", "--cols", "sparsity", "--bold", "none"))
    assert lines[1] == {"pruner": "feddst", "cohort \\ sparsity": "10", "0.5": "0.0500 ± -", "0.8": "0.0800 ± -"}
    (lines,) = report.tables(report.table(tmp_path, "--rows", "pruner", "--cols", "sparsity,cohort"))
    assert list(lines[0]) == ["pruner \\ sparsity,cohort", "0.5, 5", "0.5, 10", "0.8, 5", "0.8, 10"]


def test_only_some_runs_can_be_chosen(sweep, report):
    (lines,) = report.tables(report.table(sweep, "--only", "pruner=feddst|none"))
    assert {line["pruner"] for line in lines} == {"feddst", "none"}
    (lines,) = report.tables(report.table(sweep, "--only", "pruner=feddst", "--only", "sparsity=0.50"))
    assert len(lines) == 1
    (lines,) = report.tables(report.table(sweep, "--only", "seed=0|2"))
    assert {line["seeds"] for line in lines} == {"2"}


@pytest.mark.parametrize(("name", "holds"), [("t.md", "| pruner"), ("t.csv", "pruner,"), ("t.tex", r"\toprule")])
def test_a_file_is_written_in_the_format_of_its_name(name, holds, sweep, report, tmp_path):
    assert f"table: {tmp_path / name}" in report.table(sweep, "--out", tmp_path / name)
    assert holds in (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "0.9"], "--target 0.9 goes with --at target"),
        (["--at", "target", "--target", "nan"], "--target is nan; write a number"),
        (["--cost", "bytes"], "--cost bytes goes with --at target"),
        (["--at", "target"], "has no stop.targets; give one, as in --target 0.9"),
        (["--baseline", "none"], "--baseline has 'none'; write KEY=VALUE"),
        (["--baseline", "prunner=none"], "--baseline prunner is not a setting of these runs; did you mean pruner"),
        (["--baseline", "pruner=nonne"], "--baseline pruner=nonne is in no finished run; did you mean none"),
        (["--confidence", "95"], "--confidence is 95; it must be between 0 and 1"),
        (["--confidence", "nan"], "--confidence is nan; it must be between 0 and 1"),
        (["--only", "pruner"], "--only is 'pruner'; write KEY=VALUE"),
        (["--only", "pruner=snip"], "--only pruner=snip is in none of these runs; there are feddst, magnitude, none"),
        (["--rows", "pruner", "--cols", "pruner"], "name a setting twice"),
        (["--rows", "pruner,", "--cols", "sparsity"], "--rows  is not a setting"),
        (["--out", "/nowhere/at/all.md"], "the folder /nowhere/at does not exist, so make it first"),
        (["--out", "/tmp/table.xlsx"], "its name must end in .md, .csv, .tex, or give --format"),
        (["--out", "/tmp"], "it is a folder, so name a file in it"),
        (["--metric", "test/acuracy", "--at", "best"], "did you mean test/accuracy"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(arguments, says, sweep, report):
    with pytest.raises(ConfigError) as refused:
        report.table(sweep, *arguments)
    assert says in str(refused.value)


def test_failed_runs_alone_are_named_with_their_sentence(write, report, tmp_path):
    run = write("feddst", 0.5, 0, status="failed") / "manifest.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "error": "client 3 ran out of memory."}))
    with pytest.raises(ConfigError, match=r"is failed: client 3 ran out of memory; go on with fedray resume"):
        report.table(tmp_path)


def test_a_baseline_of_another_sparsity_is_none(write, report, tmp_path):
    """The one baseline that is there is not like every run."""
    for sparsity in SPARSITIES:
        write("feddst", sparsity, 0)
    write("magnitude", SPARSITIES[0], 0)
    text = report.table(tmp_path, "--baseline", "pruner=magnitude")
    lines = [line for line in report.tables(text)[0] if line["pruner"] == "feddst"]
    found = {line["sparsity"]: line["difference to pruner=magnitude"] for line in lines}
    assert found[str(SPARSITIES[0])].endswith("(n=1)")
    assert [found[str(sparsity)] for sparsity in SPARSITIES[1:]] == ["-"] * len(SPARSITIES[1:])
    assert f"none with pruner=magnitude has its sparsity, {SPARSITIES[1]}." in text
    # Whoever names a sparsity means that one.
    named = f"pruner=magnitude,pruner.sparsity={SPARSITIES[0]}"
    for line in report.tables(report.table(tmp_path, "--baseline", named))[0]:
        assert line[f"difference to {named}"].endswith("(n=1)") or line["pruner"] == "magnitude"


def test_a_component_that_was_exchanged_is_another_setting(write, report, tmp_path):
    write("feddst", 0.5, 0)
    run = write("feddst", 0.5, 1)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["pruner"]["_target_"] = "mine.Other"
    (run / "manifest.json").write_text(json.dumps(manifest))
    (lines,) = report.tables(report.table(tmp_path))
    assert [line["seeds"] for line in lines] == ["1", "1"]


def test_a_target_that_nobody_reaches_is_a_table_all_the_same(write, report, tmp_path):
    write("feddst", 0.5, 0)
    write("magnitude", 0.5, 0)
    for form in ("md", "csv", "latex"):
        text = report.table(
            tmp_path, "--rows", "pruner", "--cols", "sparsity", "--at", "target", "--target", "2", "--format", form
        )
        assert "never" in text


def test_a_run_that_diverged_is_in_the_table_and_its_other_seeds_win_nothing(write, report, tmp_path):
    for seed in (0, 1):
        write("feddst", 0.5, seed, values=[0.5])
        write("snip", 0.5, seed, values=[0.5, math.nan])
    write("magnitude", 0.5, 0, values=[0.9])
    write("magnitude", 0.5, 1, values=[math.nan])
    write("none", None, 0, values=[0.2])
    write("none", None, 1, values=[0.2])
    text = report.table(tmp_path, "--rows", "pruner", "--cols", "sparsity")
    found = {line["pruner \\ sparsity"]: line["0.5"] for line in report.tables(text)[0]}
    assert found["snip"] == "not finite"
    assert found["magnitude"] == "0.9000 ± - (n=1)"
    assert "**" not in found["feddst"] + found["magnitude"]
    assert "- magnitude-0.5-1 is left out: its last test/accuracy is not finite." in text
    assert "n=2 where no other n is given" in text


def test_only_keeps_what_cannot_be_judged(write, report, tmp_path):
    write("feddst", 0.5, 0)
    write("magnitude", 0.5, 0)
    (write("feddst", 0.5, 1) / "manifest.json").write_text("{")
    cell = {"folder": "x", "status": "failed", "error": "no memory", "overrides": ["seed=3"]}
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [cell]}))
    text = report.table(tmp_path, "--only", "pruner=feddst")
    assert "magnitude" not in text
    assert "- feddst-0.5-1 is left out: " in text
    assert "- x is left out: failed: no memory." in text


def test_a_table_that_cannot_be_written_is_refused_in_a_sentence(sweep, report, tmp_path):
    (tmp_path / "x.md").mkdir()
    with pytest.raises(ConfigError, match=r"--out .*x\.md"):
        report.table(sweep, "--out", str(tmp_path / "x.md"))
    with pytest.raises(ConfigError, match=r"--out '/proc/x\.md' cannot be written .*; name a file that can be"):
        report.table(sweep, "--out", "/proc/x.md")
