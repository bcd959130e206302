"""A saved sweep is the cells that its file says, and a file that cannot be meant is refused in a sentence."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedray.errors import ConfigError
from fedray.sweep.plan import Command
from fedray.sweep.saved import Given, Range, bare, expand, merged, override, plain_product, read_saved

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "conf" / "sweep").glob("*.yaml"))


def given(text: str, *values: Any) -> Given:
    return Given(key=text, values=values, texts=tuple(override("x", value)[2:] for value in values))


def cells(text: str, *overrides: Given) -> list[tuple[str, ...]]:
    return list(expand(read_saved("s", yaml.safe_load(text)), overrides).cells)


# -- which cells -----------------------------------------------------------------------------------------------------


def test_blocks_multiply_and_seeds_go_fastest() -> None:
    found = cells("{grid: {a: [1, 2], b: [x, y]}, zip: {c: [3, 4], d: [5, 6]}, seeds: 2}")
    expected = [
        (f"a={a}", f"b={b}", f"c={c}", f"d={c + 2}", f"seed={seed}")
        for a, b, c, seed in itertools.product((1, 2), "xy", (3, 4), (0, 1))
    ]
    assert found == expected


def test_a_row_of_a_zip_sets_only_what_it_names() -> None:
    assert cells("{zip: [{pruner: none}, {pruner: feddst, pruner.sparsity: 0.9}]}") == [
        ("pruner=none",),
        ("pruner=feddst", "pruner.sparsity=0.9"),
    ]


def test_an_override_takes_the_place_of_an_axis_and_several_values_are_a_new_one() -> None:
    text = "{grid: {a: [1, 2], b: [3]}, seeds: 3}"
    assert cells(text, given("a", 9)) == [("a=9", "b=3", f"seed={seed}") for seed in range(3)]
    assert cells(text, given("seed", 7)) == [("a=1", "b=3", "seed=7"), ("a=2", "b=3", "seed=7")]
    assert cells(text, given("seed", 7), given("c", 0), given("e", 4, 5)) == [
        ("c=0", f"a={a}", "b=3", f"e={e}", "seed=7") for a, e in itertools.product((1, 2), (4, 5))
    ]


def test_without_a_file_the_cells_are_the_product_of_the_command() -> None:
    found = expand(plain_product(), [given("a", 1, 2), given("+b", "x"), given("c", 3, 4)]).cells
    assert found == tuple(("+b=x", f"a={a}", f"c={c}") for a, c in itertools.product((1, 2), (3, 4)))


def test_a_key_of_zip_or_random_cannot_be_overridden() -> None:
    with pytest.raises(ConfigError, match=r"sweep s: a is set by its zip block; change conf/sweep/s\.yaml"):
        cells("{zip: {a: [1, 2]}}", given("a", 3))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("{grid: {a: [%s], b: [%s]}, seeds: 11}", "1,100,000 cells (grid has 100,000, seeds has 11)"),
        ("{seeds: 1000000000000}", "1,000,000,000,000 cells (seeds has 1,000,000,000,000)"),
        (
            "{random: {samples: 1000000000, seed: 0, values: {a: [1]}}}",
            "1,000,000,000 cells (random has 1,000,000,000)",
        ),
        ("{zip: {a: [%s]}, grid: {c: [%s]}, seeds: 2}", "202,246 cells (grid has 317, zip has 319, seeds has 2)"),
    ],
)
def test_a_sweep_of_too_many_cells_is_refused_before_they_are_built(text: str, sizes: str) -> None:
    lengths = {"grid": (400, 250), "zip": (319, 317)}
    numbers = tuple(", ".join(map(str, range(n))) for n in lengths.get(text[1:].split(":")[0], ()))
    with pytest.raises(ConfigError) as caught:
        cells(text % numbers)
    assert str(caught.value) == f"sweep s would have {sizes}; it takes at most 100,000: give fewer values"


def test_as_many_cells_as_a_sweep_takes_are_taken() -> None:
    assert len(cells("{seeds: 100000}")) == 100_000
    with pytest.raises(ConfigError, match=r"the sweep would have 100,489 cells \(the command has 100,489\)"):
        expand(plain_product(), [given("a", *range(317)), given("b", *range(317))])


def test_cells_that_are_the_same_are_one() -> None:
    saved = read_saved("s", {"random": {"samples": 50, "seed": 0, "values": {"a": [1, 2]}}})
    found = expand(saved, [])
    assert sorted(found.cells) == [("a=1",), ("a=2",)]
    assert found.repeated == 48


def test_base_gives_way_to_the_command() -> None:
    base = ["+experiment=quickstart", "rounds=20", "name=x"]
    assert merged(base, ["rounds=5", "+experiment=zoo_smoke"]) == ["name=x", "rounds=5", "+experiment=zoo_smoke"]


# -- draws -----------------------------------------------------------------------------------------------------------

DRAWS = "random: {samples: %d, seed: %d, values: {a: {low: 0.001, high: 1.0, log: true}, b: [x, y, z]%s}}"


def test_draws_follow_the_seed_and_more_samples_begin_with_the_same_ones() -> None:
    few, many, other = cells(DRAWS % (5, 0, "")), cells(DRAWS % (20, 0, "")), cells(DRAWS % (20, 1, ""))
    assert many[:5] == few
    assert set(many).isdisjoint(other)


def test_one_more_key_leaves_the_draws_of_the_others() -> None:
    more = cells(DRAWS % (10, 0, ", c: {low: 1, high: 9, integer: true}"))
    assert [cell[:2] for cell in more] == cells(DRAWS % (10, 0, ""))


def test_draws_are_the_same_in_every_process() -> None:
    code = (
        "import sys, yaml\nfrom fedray.sweep.saved import *\n"
        "print(expand(read_saved('s', yaml.safe_load(sys.argv[1])), []).cells)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, DRAWS % (5, 3, "")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    assert printed.stdout.strip() == str(tuple(cells(DRAWS % (5, 3, "")))), printed.stderr


@pytest.mark.parametrize("log", [False, True])
def test_a_range_is_drawn_from_evenly_or_evenly_per_factor_and_reaches_both_ends(log: bool) -> None:
    found = Range(low=0.01, high=100.0, log=log)
    shares = [n / 1000 for n in range(1001)]
    values = [found.draw(share) for share in shares]
    assert values[0] == 0.01
    assert values[-1] == 100.0
    middle = 1.0 if log else 50.005
    assert values[500] == pytest.approx(middle, rel=1e-3)
    assert values == sorted(values)


@pytest.mark.parametrize("log", [False, True])
def test_whole_numbers_of_a_range_all_come_up_and_none_beyond(log: bool) -> None:
    found = Range(low=2, high=9, integer=True, log=log)
    values = [found.draw(n / 10_000) for n in range(10_000)]
    assert set(values) == set(range(2, 10))
    if log:  # as often per factor: [2, 4) and [4, 8) have the same share
        assert sum(v in (2, 3) for v in values) == pytest.approx(sum(v in (4, 5, 6, 7) for v in values), rel=0.01)
    else:
        assert max(map(values.count, range(2, 10))) - min(map(values.count, range(2, 10))) <= 2


def test_a_drawn_number_has_few_digits_and_stays_in_its_range() -> None:
    values = [Range(low=1 / 3, high=1.0).draw(n / 999) for n in range(1000)]
    assert all(1 / 3 <= value <= 1.0 for value in values)
    assert all(len(f"{value:.10g}".lstrip("0.")) <= 4 for value in values[1:])


# -- text ------------------------------------------------------------------------------------------------------------

VALUES = [
    "feddst",
    "a b",
    "it's",
    "ends with \\",
    "comma,comma",
    "1e3",
    "0.5",
    "true",
    "NULL",
    "nan",
    "",
    "${name}",
    "[x]",
    "ä",
    "a=b",
    "'",
    "\\'",
    0.1,
    1e-05,
    -3,
    10**12,
    True,
    None,
    [0.9, 0.95],
    ["a", "b c"],
    {"low": 1, "name": "x y"},
    [],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_hydra_reads_an_override_as_the_value_that_was_written(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (found,) = OverridesParser.create().parse_overrides([override("key", value)])
    assert not found.is_sweep_override()
    assert found.value() == value
    assert type(found.value()) is type(value)


# -- filters ---------------------------------------------------------------------------------------------------------

NAMES = {"pruner": "feddst", "pruner.sparsity": 0.9, "cohort": 5, "norm": None, "shrink": True}


def kept(condition: str) -> bool:
    values = {key: [value, "other"] for key, value in NAMES.items()}
    saved = read_saved("s", {"grid": values, "filters": [condition]})
    wanted = tuple(override(key, value) for key, value in NAMES.items())
    try:
        return wanted in expand(saved, []).cells
    except ConfigError as error:
        if "no cell left" in str(error):
            return False
        raise


@pytest.mark.parametrize(
    "condition",
    [
        "pruner == 'feddst'",
        "pruner != 'none'",
        "not pruner == 'none'",
        "cohort == 5 or cohort == 6",
        "cohort in [4, 5]",
        "cohort not in (1, 2)",
        "pruner in ['feddst'] and not cohort == 7",
        "norm == null",
        "norm == None",
        "shrink",
        "shrink == true",
        "not (pruner == 'rigl' and cohort == 5)",
        "-1 == -1.0",
    ],
)
def test_a_cell_stays_where_the_condition_holds_and_goes_where_it_does_not(condition: str) -> None:
    assert kept(condition)
    assert not kept(f"not ({condition})")


def test_numbers_compare_as_python_does() -> None:
    text = "{grid: {a: [1, 2, 3, 4]}, filters: ['%s']}"
    assert cells(text % "1 < a <= 3") == [("a=2",), ("a=3",)]
    assert cells(text % "a >= 3.5") == [("a=4",)]


def test_what_a_cell_does_not_set_is_equal_to_nothing() -> None:
    text = "{zip: [{p: none}, {p: x, p.s: 0.9}, {p: x, p.s: 0.5}], filters: ['%s']}"
    assert len(cells(text % "p.s > 0.6")) == 1
    assert len(cells(text % "not p.s > 0.6")) == 2
    assert len(cells(text % "p.s != 0.9")) == 2


def test_filters_see_what_the_command_sets() -> None:
    text = "{grid: {a: [1, 2]}, filters: ['not (a == 1 and b == 2)']}"
    assert cells(text, given("b", 2)) == [("b=2", "a=2")]
    assert len(cells(text, given("b", 3))) == 2


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os').system('true')",
        "(lambda: a)()",
        "a.__class__()",
        "a + 1 == 2",
        "[x for x in [1]]",
        "a if b else c",
        "a == f'{b}'",
        "a ** 9 ** 9 == 1",
        "a[0] == 1",
        "a is b",
        "a in b",
        "a in [[1]]",
        "'a'",
        "1",
        "a ==",
        "a = 1",
        "",
        "a\x00",
        "(" * 300 + "a" + ")" * 300,
    ],
)
def test_a_filter_that_is_no_comparison_is_refused_and_never_run(condition: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep s: the filter .* cannot be read; it takes keys"):
        read_saved("s", {"grid": {"a": [1]}, "filters": [condition]})


@pytest.mark.parametrize("condition", ["not " * 900 + "a == 1", "a" + ".a" * 900, "a == " + "- " * 900 + "1"])
def test_a_filter_that_is_too_deep_for_the_stack_is_refused(condition: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep s: the filter .* is nested 90\d deep; at most 50"):
        read_saved("s", {"grid": {"a": [1]}, "filters": [condition]})


def test_a_filter_as_deep_as_one_may_be_is_evaluated() -> None:
    assert cells("{grid: {a: [1, 2]}, filters: ['%s a == 1']}" % ("not " * 46)) == [("a=1",)]


def test_a_filter_about_a_key_that_no_cell_sets_is_refused_with_the_near_one() -> None:
    with pytest.raises(
        ConfigError, match=r"names pruner\.sparsty, which no cell sets; did you mean pruner\.sparsity\?"
    ):
        cells("{grid: {pruner.sparsity: [0.5]}, filters: ['pruner.sparsty < 0.9']}")


def test_text_without_quotes_is_taken_for_a_key_and_refused() -> None:
    with pytest.raises(ConfigError, match=r"names feddst, which no cell sets.*text goes in quotes"):
        cells("{grid: {pruner: [feddst]}, filters: ['pruner == feddst']}")


def test_a_filter_that_compares_text_with_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="compares 'x' with 3; compare numbers with numbers"):
        cells("{grid: {a: [x]}, filters: ['a < 3']}")


def test_filters_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="sweep s has no cell left; its filters drop all 2"):
        cells("{grid: {a: [1, 2]}, filters: ['a > 5']}")


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "holds blocks"),
        ("null", "holds blocks"),
        ("{gird: {a: [1]}}", "gird is no block; did you mean grid"),
        ("{base: [rounds=3]}", "has no cells; it needs one of grid, zip, random and seeds"),
        ("{grid: {}}", "grid is {}; write values by key"),
        ("{grid: {a: 1}}", r"grid\.a is 1; write a list of values"),
        ("{grid: {a: []}}", r"grid\.a is \[\]; write a list of values"),
        ("{grid: {a: [.nan]}}", r"grid\.a holds nan; write finite numbers"),
        ("{grid: {a: [[1, .nan]]}}", r"grid\.a holds nan; write finite numbers"),
        ("{zip: [{a: {b: [.inf]}}]}", r"zip\.a holds inf; write finite numbers"),
        ("{grid: {a: [!!binary eA==]}}", r"grid\.a holds b'x'; write numbers, text"),
        ("{grid: {a: [1], +a: [2]}}", r"grid has a and \+a, which are one key"),
        ("{zip: {a: [1], ++a: [2]}}", r"zip has a and \+\+a, which are one key"),
        ("{zip: [{a: 1, +a: 2}]}", r"zip has a and \+a, which are one key"),
        ("{random: {samples: 1, seed: 0, values: {a: [1], +a: [2]}}}", r"random has a and \+a, which are one key"),
        ("{base: [a=1, +a=2], seeds: 1}", r"base has a and \+a, which are one key"),
        ("{grid: {hydra.launcher.force: [true]}}", r"grid has 'hydra\.launcher\.force'; that belongs on the command"),
        ("{zip: {hydra/launcher: [basic]}}", "zip has 'hydra/launcher'; that belongs on the command line"),
        ("{zip: [{+sweep: x}]}", r"zip has '\+sweep'; that belongs on the command line"),
        ("{random: {samples: 1, seed: 0, values: {sweep: [x]}}}", "random has 'sweep'; that belongs on the command"),
        ("{base: [+hydra.x=1], seeds: 1}", r"base has '\+hydra\.x'; that belongs on the command line"),
        ("{base: [a=1], grid: {a: [2, 3]}}", "a stands in base and in grid; one block sets a key"),
        ("{base: [+a=1], zip: [{b: 1}, {a: 2}]}", "a stands in base and in zip"),
        ("{base: [a=1], random: {samples: 1, seed: 0, values: {a: [2]}}}", "a stands in base and in random"),
        ("{base: [seed=7], seeds: 3}", "seed stands in base and in seeds"),
        ("{grid: {3: [1]}}", "grid names 3; a key is written as on the command line"),
        ("{grid: {'a b': [1]}}", "grid names 'a b'"),
        ("{grid: {seed: [1]}, seeds: 2}", "seed stands in grid and in seeds"),
        ("{grid: {+a: [1]}, zip: {a: [1]}}", "a stands in grid and in zip"),
        ("{zip: {a: [1, 2], b: [1]}}", "must have one length, but a has 2, b has 1"),
        ("{zip: [1]}", "write lists of one length by key, or a list of rows"),
        ("{zip: [{}]}", "write lists of one length by key, or a list of rows"),
        ("{random: {samples: 3, values: {a: [1]}}}", r"random\.seed is not set"),
        ("{random: {samples: 0, seed: 0, values: {a: [1]}}}", r"random\.samples is 0; it must be a whole number"),
        ("{random: {samples: true, seed: 0, values: {a: [1]}}}", r"random\.samples is True"),
        ("{random: {samples: 1, seed: x, values: {a: [1]}}}", r"random\.seed is 'x'"),
        ("{random: {samples: 1, seed: 0, values: {}}}", r"random\.values is {}"),
        ("{random: {n: 1}}", r"random\.n is not a setting"),
        ("{random: {samples: 1, seed: 0, values: {a: {low: 1}}}}", r"a\.high is None; a range needs low and high"),
        ("{random: {samples: 1, seed: 0, values: {a: {low: 2, high: 1}}}}", "low must be below high"),
        ("{random: {samples: 1, seed: 0, values: {a: {low: 0, high: 1, log: true}}}}", "with log it must be above 0"),
        ("{random: {samples: 1, seed: 0, values: {a: {low: 0, high: 1.5, integer: true}}}}", "both must be whole"),
        ("{random: {samples: 1, seed: 0, values: {a: {low: 0, high: .inf}}}}", "both finite"),
        (
            "{random: {samples: 1, seed: 0, values: {a: {low: 1, high: 1%s}}}}" % ("0" * 400),
            r"a\.high is 10{39}\.\.\.; a range needs low and high, both finite and at most 1e\+300",
        ),
        (
            "{random: {samples: 1, seed: 0, values: {a: {low: -1.7e+308, high: 1.0}}}}",
            r"a\.low is -1\.7e\+308; a range",
        ),
        ("{random: {samples: 1, seed: 0, values: {a: {low: 0, hi: 1}}}}", r"a\.hi is not a setting; did you mean high"),
        (
            "{random: {samples: 1, seed: 0, values: {a: {low: 0, high: 1, log: 2}}}}",
            r"a\.log is 2; write true or false",
        ),
        ("{seeds: 0}", "seeds is 0; write how many"),
        ("{seeds: [1, 1]}", r"seeds is \[1, 1\]; write how many"),
        ("{seeds: 1.5}", "seeds is 1.5"),
        ("{seeds: true}", "seeds is True"),
        ("{seeds: [-1]}", r"seeds is \[-1\]"),
        ("{base: rounds=3, seeds: 1}", "base is 'rounds=3'; write a list of overrides"),
        ("{base: [rounds], seeds: 1}", "write a list of overrides"),
        ("{base: [hydra.sweep.dir=x], seeds: 1}", "that belongs on the command line"),
        ("{seeds: 1, filters: a}", "filters is 'a'; write a list of conditions"),
        ("{seeds: 1, filters: [true]}", r"filters is \[True\]"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_saved("s", yaml.safe_load(text))
    assert str(caught.value).startswith("sweep s")
    assert "\n" not in str(caught.value)


# -- with Hydra ------------------------------------------------------------------------------------------------------


def composed(*overrides: str, config_dir: Path | None = None) -> Any:
    from fedray.cli import _composed_sweep

    return _composed_sweep(overrides, None if config_dir is None else str(config_dir))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_cell_of_the_sweeps_that_come_with_fedray_is_one_that_can_run(name: str, tmp_path: Path) -> None:
    from fedray.sweep.plan import planned

    extra = ["pruner=magnitude"] if name == "rates_digits" else ["seed=0"]
    command = composed(f"+sweep={name}", *extra, f"hydra.sweep.dir={tmp_path}")
    found = planned(command.requests, folder=command.folder, code_folder=None)
    assert {(cell.what, cell.why) for cell in found} == {("begin", "")}
    assert len(found) >= 9


def test_the_sweep_of_four_pruners_at_three_sparsities_with_two_seeds_has_24_cells() -> None:
    node = yaml.safe_load((ROOT / "conf" / "sweep" / "pruners_digits.yaml").read_text())
    found = expand(read_saved("pruners_digits", node), []).cells
    assert len(found) == 24
    assert {bare(text.split("=")[0]) for text in found[0]} == {"pruner", "pruner.sparsity", "seed"}


def test_a_saved_sweep_of_ones_own_is_found_beside_config_dir(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text("base: [rounds=3]\ngrid: {trainer.lr: [0.1, 0.2]}\nseeds: [4]\n")
    command = composed("+sweep=mine", "cohort=2", config_dir=tmp_path)
    assert [request.overrides for request in command.requests] == [
        ("rounds=3", "name=mine", "cohort=2", f"trainer.lr={lr}", "seed=4") for lr in (0.1, 0.2)
    ]
    assert [request.config["trainer"]["lr"] for request in command.requests] == [0.1, 0.2]
    assert command.folder == Path.cwd() / "outputs" / "mine" / "sweep"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Command]:
    """What the launcher would get from a command; it runs none of it. Each command has an empty folder to work in."""
    from fedray import cli

    found: list[Command] = []

    def launch(composer: Any, master: Any, overrides: Any, options: Any) -> list[Any]:
        found.append(
            Command(
                requests=[composer.request(master, one) for one in overrides],
                folder=Path(str(master.hydra.sweep.dir)).resolve(),
                dropped=0,
                code_folder=None,
                force=options.force,
            )
        )
        seen.append(list(sys.argv[1:]))
        return []

    seen: list[list[str]] = []

    def command(*arguments: str) -> Command:
        monkeypatch.setattr(sys, "argv", ["fedray"])
        assert cli.main(["-m", *arguments]) == 0
        if any("+sweep=" in text for text in arguments):
            assert seen[-1] == ["-m", *arguments]
        return found[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; this takes it back
    monkeypatch.setattr(cli, "launch_cells", launch)
    (tmp_path / "own" / "sweep").mkdir(parents=True)
    for name, text in SWEEPS.items():
        (tmp_path / "own" / "sweep" / f"{name}.yaml").write_text(text)
    return command


SWEEPS = {
    "i": "{base: [+experiment=quickstart, pruner=gradual], seeds: 1}",
    "j": "{base: ['pruner=gradual', 'rounds=7', 'pruner.finish=${rounds}'], grid: {cohort: ['${rounds}']}}",
    "named": "{base: [name=other], seeds: 2}",
    "names": "{grid: {name: [a, b]}}",
}


def test_an_interpolation_in_a_saved_sweep_or_its_command_is_about_the_cell(
    launched: Callable[..., Command], tmp_path: Path
) -> None:
    own = ("--config-dir", str(tmp_path / "own"))
    (cell,) = launched(*own, "+sweep=i", "rounds=100", "pruner.finish=${rounds}", "cohort='${eval.every}'").requests
    assert cell.config is not None
    assert (cell.config["rounds"], cell.config["pruner"]["finish"], cell.config["cohort"]) == (100, 100, 1)
    (cell,) = launched(*own, "+sweep=j", "seed=${pruner.finish}").requests  # no key of what is composed before the cell
    assert cell.config is not None
    assert (cell.config["pruner"]["finish"], cell.config["cohort"], cell.config["seed"]) == (7, 7, 7)


@pytest.mark.parametrize("text", ["100%", "%7B", "it's", "a b", "\\", "${rounds}"])
def test_an_override_reaches_the_cells_of_a_saved_sweep_as_it_was_given(
    text: str, launched: Callable[..., Command], tmp_path: Path
) -> None:
    written = f"+note={override('note', text).partition('=')[2]}"
    (cell,) = launched("--config-dir", str(tmp_path / "own"), "+sweep=i", written).requests
    assert written in cell.overrides


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["+experiment=quickstart,mnist_cnn"], "outputs/run/sweep"),
        (["+experiment=quickstart", "seed=0,1"], "outputs/quickstart/sweep"),
        (["name=a,b"], "outputs/run/sweep"),
        (["name=a", "seed=0,1", "hydra.launcher.force=true"], "outputs/a/sweep"),
        (["seed=0,1", "rounds=3,4", "hydra.sweep.dir='x/${rounds}/${cohort}'"], "x/20/5"),
        (["+sweep=i"], "outputs/i/sweep"),
        (["+sweep=i", "name=x", "hydra.launcher.force=true"], "outputs/x/sweep"),
        (["+sweep=i", "++name=x"], "outputs/x/sweep"),
        (["+sweep=i", "name=x,y"], "outputs/i/sweep"),
        (["+sweep=named"], "outputs/other/sweep"),
        (["+sweep=named", "name=x"], "outputs/x/sweep"),
        (["+sweep=names"], "outputs/names/sweep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_plan_has_the_cells_the_folder_and_the_force_of_the_run(
    arguments: list[str], folder: str, launched: Callable[..., Command], tmp_path: Path
) -> None:
    run = launched("--config-dir", str(tmp_path / "own"), *arguments)
    plan = composed(*arguments, config_dir=tmp_path / "own")
    assert run.folder == plan.folder == tmp_path / folder
    assert run.force == plan.force == ("hydra.launcher.force=true" in arguments)
    assert [cell.config for cell in run.requests] == [cell.config for cell in plan.requests]
    assert all(cell.error is None for cell in run.requests)


def test_glob_and_range_of_the_command_are_read_as_hydra_reads_them() -> None:
    command = composed("pruner=glob(s*)", "seed=range(2)", "rounds=3")
    names = {request.choices["pruner"] for request in command.requests}
    there = {path.stem for path in (ROOT / "conf" / "pruner").glob("s*.yaml")}
    assert names == there
    assert len(command.requests) == 2 * len(there)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["+sweep=pruners_digits"], "fedray: +sweep=pruners_digits is many runs; python -m fedray -m"),
        (["-m", "+sweep=pruner_digits"], "fedray: sweep=pruner_digits does not exist; did you mean pruners_digits?"),
        (["-m", "+sweep=pruners_digits", "+sweep=x"], "fedray: sweep is given 2 times"),
        (["-m", "+sweep=pruners_digits", "seed=interval(0,1)"], "fedray: seed=interval(0,1) is a range without steps"),
        (
            ["-m", "+sweep=pruners_digits", "seed=range(0,1000000000000)"],
            "fedray: seed=range(0,1000000000000) has more than 100,000 values",
        ),
        (["-m", "+sweep=pruners_digits", "--cfg", "job"], "fedray: --cfg prints one configuration"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_saved_sweep_that_cannot_be_run_so_is_refused_with_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedray.cli import main

    monkeypatch.setattr(sys, "argv", ["fedray"])
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1


def test_whole_numbers_of_python_and_yaml_stay_whole() -> None:
    assert math.isclose(Range(low=1, high=3, integer=True).draw(0.5), 2)
    assert isinstance(Range(low=1, high=3, integer=True).draw(0.5), int)
