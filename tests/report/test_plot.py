"""Figures: the numbers in them are those of the runs, and whatever is drawn can be read and printed."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import statistics
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pandas
import pytest

from fedray.errors import ConfigError, RunError
from fedray.report.figures import _look, _marker, figure_of, style
from fedray.report.plot import KINDS, Ask, axis_label, front, plot_command
from fedray.report.results import grouped, read_results
from fedray.report.settings import only

PRUNERS = ("feddst", "magnitude", "random", "none")
LAYERS = ("conv1.weight", "fc1.weight")
ROUNDS = 6


@pytest.fixture
def make(report, tmp_path):
    """Write a run with everything that a figure may show."""

    def one(pruner, sparsity, seed, *, folder=None, without=(), rounds=ROUNDS, **config):
        node = {"_target_": "p.P", **({} if sparsity is None else {"sparsity": sparsity})}
        kept = 1 - (sparsity or 0.0)
        rows = []
        for at in range(1, rounds + 1):
            row = {
                "test/accuracy": 1 - kept**0.1 / (at + seed / 3 + len(pruner) / 5),
                "test/loss": 1 / at,
                "model/sparsity": sparsity or 0.0,
                "wire/total_bytes": round(2e6 * kept * at) + 100 * seed,
                "time/total_s": 1.5 * at + seed,
                "prune/churn": 0.1 / at,
                "prune/overlap": 1 - 0.1 / at,
                **{f"model/layer_sparsity/{name}": (sparsity or 0.0) * (1 - at / 20) for name in LAYERS},
            }
            rows.append({name: value for name, value in row.items() if not name.startswith(tuple(without))})
        run = report.write(
            folder or tmp_path / f"{pruner}-{sparsity}-{seed}", down=[], up=[], rounds=rounds, rows=rows,
            config={"seed": seed, "pruner": {} if pruner == "none" else node, **config}, choices={"pruner": pruner},
            run_id=f"{pruner}{sparsity}{seed}",
        )  # fmt: skip
        lines = [json.loads(line) for line in (run / "clients.jsonl").read_text().splitlines()]
        for line in lines:
            if line["round"] % 2 == 0 and "client" not in without:
                line["test/accuracy"] = 0.5 + line["client"] / 10 + line["round"] / 100
        (run / "clients.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return one


@pytest.fixture
def plot(report, tmp_path, capsys):
    """Run the command; the sidecars by kind."""

    def run_it(*arguments, folder=None):
        out = tmp_path / "out"
        plot_command([str(folder or tmp_path), "--out", str(out), *arguments], parser=report.parser)
        return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}

    return run_it


def ask_of(folder, **more):
    return Ask(**{"groups": grouped(read_results(folder))[0], "metric": None, "panels": None, "notes": [], **more})


def drawn(kind, folder, **more):
    """What is drawn, without drawing it."""
    return {"drawn": asdict(KINDS[kind](ask_of(folder, **more)))}


MADE: dict[str, Path] = {}


@pytest.fixture
def sweep(make, tmp_path_factory):
    """Three pruners by two sparsities, and none; two seeds each. Made once, and only read."""
    if "sweep" not in MADE:
        folder = tmp_path_factory.mktemp("sweep")
        for seed in (0, 1):
            for pruner in PRUNERS[:3]:
                for sparsity in (0.5, 0.9):
                    make(pruner, sparsity, seed, folder=folder / f"{pruner}-{sparsity}-{seed}")
            make("none", None, seed, folder=folder / f"none-None-{seed}")
        MADE["sweep"] = folder
    return MADE["sweep"]


@pytest.fixture
def twelve(make, tmp_path_factory):
    """Twelve methods with long names by three sparsities."""
    if "twelve" not in MADE:
        folder = tmp_path_factory.mktemp("twelve")
        for pruner, sparsity in itertools.product(TWELVE, (0.5, 0.8, 0.95)):
            make(pruner, sparsity, 0, rounds=2, folder=folder / f"{pruner}-{sparsity}")
        MADE["twelve"] = folder
    return MADE["twelve"]


TWELVE = [f"method_number_{at:02}" for at in range(12)]


def curves(sidecar):
    return {(one["label"], one["panel"]): one for one in sidecar["drawn"]["curves"]}


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "x", "y", "scale"),
    [
        ("accuracy-rounds", "round", "test/accuracy", 1),
        ("accuracy-mb", "wire/total_bytes", "test/accuracy", 1e6),
        ("accuracy-time", "time/total_s", "test/accuracy", 1),
        ("churn", "round", "prune/churn", 1),
        ("overlap", "round", "prune/overlap", 1),
    ],
)
def test_a_line_is_mean_and_deviation_over_seeds_as_pandas_has_them(kind, x, y, scale, sweep, plot):
    found = curves(drawn(kind, sweep))
    assert len(found) == 7
    for (label, _), curve in found.items():
        pruner, sparsity = (*label.replace("no pruner", "none None").split(" "),)
        runs = [sweep / f"{pruner}-{sparsity}-{seed}" / "rounds.jsonl" for seed in (0, 1)]
        lines = [json.loads(line) for run in runs for line in run.read_text().splitlines()]
        per_round = pandas.DataFrame(lines).set_index("round", drop=False).groupby(level=0)
        assert curve["x"] == pytest.approx((per_round[x].mean() / scale).tolist(), rel=1e-12)
        assert curve["y"] == pytest.approx(per_round[y].mean().tolist(), rel=1e-12)
        assert curve["y_spread"] == pytest.approx(per_round[y].std().tolist(), rel=1e-9, abs=1e-15)
        assert curve["n"] == 2


def test_a_metric_that_falls_can_be_drawn_too(sweep, plot):
    found = plot("--kind", "accuracy-rounds", "--metric", "test/loss", folder=sweep)["accuracy-rounds_test-loss"]
    assert found["drawn"]["y_label"] == "test loss"
    assert next(iter(curves(found).values()))["y"] == [1 / at for at in range(1, ROUNDS + 1)]


def test_sparsities_of_a_method_are_one_line(sweep, plot):
    found = curves(drawn("accuracy-sparsity", sweep))
    assert {label: one["x"] for (label, _), one in found.items()} == {
        "feddst": (0.5, 0.9), "magnitude": (0.5, 0.9), "random": (0.5, 0.9), "no pruner": (0.0,),
    }  # fmt: skip


def test_a_method_with_a_mask_for_each_client_stands_at_their_sparsity(make, tmp_path):
    for name, whole, own in (("lotteryfl", 0.0, 0.75), ("magnitude", 0.5, 0.25), ("none", 0.0, None)):
        path = make(name, None, 0, rounds=1) / "rounds.jsonl"
        row = json.loads(path.read_text()) | {"model/sparsity": whole}
        path.write_text(json.dumps(row if own is None else row | {"client/sparsity_mean": own}) + "\n")
    ask = ask_of(tmp_path)
    found = curves({"drawn": asdict(KINDS["accuracy-sparsity"](ask))})
    assert {label: one["x"] for (label, _), one in found.items()} == {
        "lotteryfl": (0.75,), "magnitude": (0.5,), "no pruner": (0.0,),
    }  # fmt: skip
    assert ask.notes == ["lotteryfl is at the mean sparsity of the clients, because the server has no mask."]


def test_the_front_is_what_nobody_beats(sweep, plot):
    found = drawn("pareto", sweep)["drawn"]
    points = [tuple(point) for one in found["curves"] for point in zip(one["x"], one["y"], strict=True)]
    beaten = {
        p for p in points for q in points
        if q != p and q[0] <= p[0] and q[1] >= p[1]
    }  # fmt: skip
    assert {tuple(point) for point in found["front"]} == set(points) - beaten
    assert len(points) == 7


@pytest.mark.parametrize("rising", [True, False])
def test_a_front_of_any_points_is_what_nobody_beats(rising):
    points = [(x % 7 + 1.0, (x * 5 % 11) / 11) for x in range(40)]
    sign = 1 if rising else -1
    best = {
        p for p in points
        if not any(q != p and q[0] <= p[0] and sign * q[1] >= sign * p[1] for q in points)
    }  # fmt: skip
    assert set(front(points, rising=rising)) == best
    assert front([], rising=rising) == []


def test_layers_are_those_of_the_last_round(sweep, plot):
    found = drawn("layers", sweep)["drawn"]
    assert found["columns"] == ["conv1", "fc1"]
    row = dict(zip(found["labels"], found["cells"], strict=True))["feddst 0.9"]
    assert row == pytest.approx([0.9 * (1 - ROUNDS / 20)] * 2)


def test_clients_are_those_of_the_last_evaluation_of_all_seeds(sweep, plot):
    found = drawn("clients", sweep)["drawn"]
    assert len(found["labels"]) == 7
    assert sorted(found["values"][0]) == pytest.approx([0.5 + ROUNDS / 100] * 2 + [0.6 + ROUNDS / 100] * 2)


def test_simulated_time_is_drawn_where_every_run_has_it(sweep, tmp_path):
    copy = shutil.copytree(sweep, tmp_path / "copy")
    for path in copy.glob("*/rounds.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps({**one, "time/total_simulated_s": 7.0 * one["round"]}) + "\n" for one in lines)
        )
    found = drawn("accuracy-time", copy)
    assert found["drawn"]["x_label"] == "simulated time (s)"
    assert next(iter(curves(found).values()))["x"][0] == 7.0


def test_a_line_ends_where_its_shortest_run_ends_and_says_so(make, plot):
    make("feddst", 0.5, 0)
    make("feddst", 0.5, 1, rounds=4)
    found = plot("--kind", "accuracy-rounds")["accuracy-rounds"]
    assert next(iter(curves(found).values()))["x"] == [1, 2, 3, 4]
    assert "feddst 0.5 is drawn to round 4 of 6, where its shortest run ends." in found["notes"]


def test_the_sidecar_names_every_run_it_was_made_from(sweep, plot):
    found = plot("--kind", "clients,accuracy-mb", folder=sweep)
    assert {one["folder"] for one in found["accuracy-mb"]["made_from"]} == {
        str(path.parent) for path in sweep.glob("*/manifest.json")
    }
    first = found["clients"]["made_from"][0]
    assert first["files"] == ["manifest.json", "rounds.jsonl", "clients.jsonl"]
    assert (first["label"], first["seed"], first["run_id"]) == ("feddst 0.5", 0, "feddst0.50")


NAMED = {  # what each kind says that a run lacks, and the lines in which it lies
    "accuracy-rounds": ("test/accuracy", "rounds.jsonl"),
    "accuracy-mb": ("wire/total_bytes", "rounds.jsonl"),
    "accuracy-sparsity": ("test/accuracy", "rounds.jsonl"),
    "pareto": ("wire/total_bytes", "rounds.jsonl"),
    "churn": ("prune/churn", "rounds.jsonl"),
    "layers": ("sparsity of layers", "rounds.jsonl"),
    "clients": ("test/accuracy of single clients", "clients.jsonl"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_seed_that_is_not_drawn_is_named_and_not_among_what_a_figure_is_made_from(kind, make, tmp_path, plot, capsys):
    for seed in (0, 1):
        make("feddst", 0.5, seed, rounds=2)
    what, file = NAMED[kind]
    path = tmp_path / "feddst-0.5-1" / file
    lost = "model/layer_sparsity/" if what == "sparsity of layers" else what.split(" ")[0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{name: None if name.startswith(lost) else value for name, value in line.items()} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plot("--kind", kind)[kind]
    note = f"feddst-0.5-1 is not drawn: its {what} is not finite or missing."
    assert found["notes"] == [note]
    assert [one["seed"] for one in found["made_from"]] == [0]
    assert [one["n"] for one in found["drawn"].get("curves", [])] in ([], [1])
    assert f"- {note}" in capsys.readouterr().out


def test_a_setting_without_the_metric_is_not_among_what_a_figure_is_made_from(make, plot):
    make("feddst", 0.5, 0)
    make("random", 0.5, 0, without=("prune/",))
    found = plot("--kind", "churn")["churn"]
    assert [one["label"] for one in found["made_from"]] == ["feddst"]
    assert found["notes"] == ["random is not drawn: no prune/churn."]


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "inches", "kinds"),
    [
        ("single", 3.35, ["accuracy-mb", "layers"]),
        pytest.param("single", 3.35, list(KINDS), marks=pytest.mark.full),
        pytest.param("double", 6.9, list(KINDS), marks=pytest.mark.full),
    ],
)
def test_files_are_as_wide_as_a_column_and_their_fonts_are_truetype(width, inches, kinds, sweep, plot, tmp_path):
    plot("--kind", ",".join(kinds), "--width", width, folder=sweep)
    made = sorted((tmp_path / "out").glob("*.pdf"))
    assert [path.stem for path in made] == sorted(kinds)
    for path in made:
        data = path.read_bytes()
        box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", data)
        assert float(box.group(1)) == pytest.approx(72 * inches, abs=0.5)
        text = data + b"".join(_inflated(data))
        assert b"/Type0" in text, "TrueType is embedded as a composite font"
        assert b"/Type3" not in text
        head = path.with_suffix(".png").read_bytes()[16:24]
        assert int.from_bytes(head[:4], "big") == round(inches * 300)


def _inflated(data):
    for found in re.finditer(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL):
        try:
            yield zlib.decompress(found.group(1))
        except zlib.error:
            continue


def test_the_same_runs_give_the_same_files(sweep, plot, tmp_path):
    plot("--kind", "pareto", folder=sweep)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    plot("--kind", "pareto", folder=sweep)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


# -- what can be read ------------------------------------------------------------------------------------------------


def texts_of(figure):
    """The boxes of all words in a figure, in pixels, by their words."""
    figure.canvas.draw()
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if not axes.axison:
            continue
        texts += [axes.title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            # Ticks beyond the ends of an axis have words that are not drawn; only this list is what is.
            ticks = axis._update_ticks()
            texts += [axis.label, *(label for tick in ticks for label in (tick.label1, tick.label2))]
    renderer = figure.canvas.get_renderer()
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts
        if text.get_visible() and text.get_text().strip()
    ]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    ("width", "sparsity"),
    [
        ("single", None),
        pytest.param("double", None, marks=pytest.mark.full),
        pytest.param("single", 0.95, marks=pytest.mark.full),
        pytest.param("double", 0.95, marks=pytest.mark.full),
    ],
)
def test_no_words_of_twelve_methods_overlap_or_are_cut(width, sparsity, kind, twelve):
    ask = ask_of(twelve)
    if sparsity is not None:
        ask = replace(ask, groups=only(ask.groups, [f"sparsity={sparsity}"]))
    with style():
        figure = figure_of(KINDS[kind](ask), width)
        found = texts_of(figure)
    assert sum(name in text for name in TWELVE for text, _ in found) >= 12
    page = figure.bbox
    for text, box in found:
        assert box.x0 >= page.x0 - 1, f"{text!r} is cut"
        assert box.x1 <= page.x1 + 1, f"{text!r} is cut"
        assert box.y0 >= page.y0 - 1, f"{text!r} is cut"
        assert box.y1 <= page.y1 + 1, f"{text!r} is cut"
    for (one, first), (other, second) in itertools.combinations(found, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        # Boxes have a little room above and below their letters.
        assert across < 1 or down < 0.15 * min(first.height, second.height), f"{one!r} lies on {other!r}"


def test_twelve_lines_differ_without_their_colour():
    plain = [(str(_look(at)["linestyle"]), _marker(at)["marker"]) for at in range(12)]
    assert len({marker for _, marker in plain}) == 12
    assert len({(look["color"], str(look["linestyle"])) for look in map(_look, range(24))}) == 24


def test_every_axis_has_its_unit(sweep):
    found = {kind: drawn(kind, sweep)["drawn"]["x_label"] for kind in KINDS}
    assert found == {
        "accuracy-rounds": "round", "accuracy-mb": "transferred (MB)", "accuracy-time": "measured time (s)",
        "accuracy-sparsity": "sparsity (fraction removed)", "pareto": "transferred (MB)", "churn": "round",
        "overlap": "round", "layers": "layer, from input to output", "clients": "client's test accuracy (fraction)",
    }  # fmt: skip
    metrics = ("test/accuracy", "wire/up_bytes", "time/round_s", "test/loss", "prune/churn")
    assert [axis_label(name) for name in metrics] == [
        "test accuracy (fraction)", "wire up (bytes)", "time round (s)", "test loss", "mask churn (fraction)",
    ]  # fmt: skip


def test_more_than_twelve_settings_get_a_panel_for_each_sparsity(make, tmp_path):
    for pruner, sparsity in itertools.product([f"p{at}" for at in range(7)], (0.5, 0.9)):
        make(pruner, sparsity, 0, rounds=1)
    make("none", None, 0, rounds=1)
    found = curves(drawn("accuracy-rounds", tmp_path))
    assert {panel for _, panel in found} == {"sparsity 0.5", "sparsity 0.9"}
    assert {panel for label, panel in found if label == "no pruner"} == {"sparsity 0.5", "sparsity 0.9"}
    assert len({one["look"] for (label, _), one in found.items() if label == "p3"}) == 1, "one look in all panels"


def test_a_setting_can_have_panels(sweep, plot):
    found = curves(plot("--kind", "accuracy-mb", "--panels", "pruner", folder=sweep)["accuracy-mb"])
    assert {panel for _, panel in found} == {f"pruner {name}" for name in PRUNERS}


def test_panels_may_be_of_lists(make, tmp_path):
    for hidden in ([8], [8, 16]):
        make("feddst", 0.5, 0, rounds=1, folder=tmp_path / str(len(hidden)), model={"hidden": hidden})
    found = curves(drawn("accuracy-rounds", tmp_path, panels="hidden"))
    assert set(found) == {("feddst 0.5", "hidden [8]"), ("feddst 0.5", "hidden [8, 16]")}


def test_a_part_of_an_axis_can_be_shown(sweep, plot):
    found = plot("--kind", "accuracy-rounds", "--y", "0.5,1", "--x", "0,5", folder=sweep)["accuracy-rounds"]["drawn"]
    assert (found["y_range"], found["x_range"]) == ([0.5, 1.0], [0.0, 5.0])
    with style():
        axes = figure_of(KINDS["accuracy-rounds"](ask_of(sweep, x_range=(0, 5), y_range=(0.5, 1))), "single").axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 5), (0.5, 1))


@pytest.mark.parametrize("kind", ["accuracy-rounds", "layers", "clients"])
def test_a_dollar_in_a_setting_is_drawn_as_it_is(kind, make, tmp_path, plot):
    for at, name in enumerate(("a$\\foo{$", "$x$")):
        make("feddst", 0.5, 0, rounds=2, folder=tmp_path / str(at), note=name)
    plot("--kind", kind)
    with style():
        words = [text for text, _ in texts_of(figure_of(KINDS[kind](ask_of(tmp_path)), "single"))]
    assert any("a$\\foo{$" in text for text in words)


@pytest.mark.parametrize("kind", ["accuracy-mb", "pareto"])
@pytest.mark.parametrize(("high", "begins"), [(5.0, (0.1, 2.0)), (0.01, (0.001, 0.001))])
def test_a_logarithmic_axis_that_is_asked_for_from_0_begins_where_the_curves_do(kind, high, begins, sweep, recwarn):
    for low in (-1.0, 0.0):
        with style():
            figure = figure_of(KINDS[kind](ask_of(sweep, x_range=(low, high))), "single")
            figure.canvas.draw()
        (axes,) = figure.axes
        assert axes.get_xscale() == "log"
        left, right = axes.get_xlim()
        assert begins[0] <= left <= begins[1]
        assert right == high
    assert [str(one.message) for one in recwarn] == []


def test_a_logarithmic_axis_has_nothing_below_0(sweep, plot, capsys):
    says = "--x is '-2,-1'; the axis is logarithmic, so its upper end must be above 0, as in --x 1,10"
    for kind in ("accuracy-mb", "pareto"):
        with pytest.raises(ConfigError) as refused:
            plot("--kind", kind, "--x=-2,-1", folder=sweep)
        assert str(refused.value) == says
    assert set(plot("--kind", "accuracy-mb,churn", "--x=-2,-1", folder=sweep)) == {"churn"}
    assert f"- accuracy-mb is left out: {says}." in capsys.readouterr().out


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "without", "says"),
    [
        ("accuracy-rounds", ("test/",), "no finished run has a test metric: run with eval.every=1 to record one"),
        ("churn", ("prune/",), "no finished run has prune/churn: a pruner records it"),
        ("overlap", ("prune/",), "no finished run has prune/overlap: pruners record it whose clients send masks"),
        ("layers", ("model/layer",), "no finished run has the sparsity of layers: a pruner records it"),
        ("clients", ("client",), "run with eval.every=1 and eval.clients=all to record it"),
        ("pareto", ("wire/",), "no finished run has both test/accuracy and wire/total_bytes"),
        ("accuracy-mb", ("wire/",), "no finished run has test/accuracy and wire/total_bytes in one round"),
    ],
)
def test_a_kind_that_nobody_recorded_is_refused_with_what_would_record_it(kind, without, says, make, plot):
    make("feddst", 0.5, 0, without=without)
    with pytest.raises(ConfigError) as refused:
        plot("--kind", kind)
    assert says in str(refused.value)


def test_of_several_kinds_what_there_is_is_drawn_and_the_rest_is_named(make, plot, capsys):
    make("feddst", 0.5, 0, without=("prune/",))
    found = plot("--kind", "churn,pareto")
    assert set(found) == {"pareto"}
    said = capsys.readouterr().out
    assert "- churn is left out: no finished run has prune/churn" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kind", "paretto"], "--kind paretto is not a kind; did you mean pareto?"),
        (["--kind", "pareto", "--metric", "test/acuracy"], "did you mean test/accuracy"),
        (["--kind", "churn", "--metric", "test/loss"], "--metric is not for this kind"),
        (["--kind", "layers", "--metric", "test/loss"], "--metric is not for --kind layers"),
        (["--kind", "pareto", "--y", "1"], "--y is '1'; write two numbers with a comma between, as in --y 0.9,1"),
        (["--kind", "pareto", "--y", "1,0"], "the first number must be the smaller one"),
        (["--kind", "pareto", "--x", "nan,1"], "the first number must be the smaller one"),
        (["--kind", "pareto", "--panels", "prunner"], "did you mean pruner"),
        (["--kind", "pareto", "--only", "pruner=snip"], "there are feddst, magnitude, none, random"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(arguments, says, sweep, plot):
    with pytest.raises(ConfigError) as refused:
        plot(*arguments, folder=sweep)
    assert says in str(refused.value)


def test_more_settings_than_looks_are_refused(make, plot):
    for at in range(25):
        make(f"p{at}", 0.5, 0, rounds=1)
    with pytest.raises(ConfigError, match="25 settings are more than the 24 that a figure can tell apart; choose with"):
        plot("--kind", "accuracy-rounds")


def test_a_folder_of_unfinished_runs_is_refused(report, tmp_path, plot):
    report.write(tmp_path / "a", down=[], up=[], rounds=1, status="failed")
    with pytest.raises(ConfigError, match=r"holds no finished run: .* is failed"):
        plot("--kind", "pareto")


@pytest.mark.parametrize("place", ["file", "file/sub", "/proc/zz", "x" * 300])
def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(place, sweep, tmp_path, plot):
    (tmp_path / "file").write_text("")
    out = tmp_path / place
    with pytest.raises(ConfigError) as refused:
        plot("--kind", "churn", "--out", str(out), folder=sweep)
    assert str(refused.value).startswith(f"--out is {str(out)!r}")
    assert "name" in str(refused.value)


def test_a_damaged_file_costs_only_the_kinds_that_read_it(make, plot, capsys):
    (make("feddst", 0.5, 0, rounds=2) / "clients.jsonl").write_text('{"round": 1, "client"\n' * 9)
    found = plot("--kind", "all")
    assert set(found) == set(KINDS) - {"clients"}
    assert "- clients is left out: " in capsys.readouterr().out
    with pytest.raises(RunError):
        plot("--kind", "clients")


def test_a_missing_library_is_one_sentence(sweep, plot, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"fedray plot needs matplotlib: pip install 'fedray\[report\]'"):
        plot("--kind", "pareto", folder=sweep)


def test_one_run_alone_can_be_drawn(make, plot, tmp_path):
    run = make("feddst", 0.5, 3)
    found = plot("--kind", "accuracy-rounds", folder=run)["accuracy-rounds"]
    (curve,) = curves(found).values()
    assert (curve["n"], curve["y_spread"]) == (1, [None] * ROUNDS)
    assert statistics.fmean(curve["y"]) < 1
    assert not any(math.isnan(y) for y in curve["y"])
