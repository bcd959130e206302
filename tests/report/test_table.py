"""`fedray table`: settings that differ, seeds folded into mean and deviation."""

import statistics

import pytest

from fedray.errors import ConfigError


@pytest.fixture
def cell(report, tmp_path):
    """Write a run: pruner, sparsity, seed and its accuracies by round."""
    count = 0

    def write(pruner="Magnitude", sparsity=0.5, seed=0, accuracy=(0.1, 0.5), status="finished", rows=None, **config):
        nonlocal count
        count += 1
        node = {"_target_": f"fedray.pruners.{pruner}"}
        if pruner != "NoPruning":
            node |= {"sparsity": sparsity, "every": 1 if pruner == "Magnitude" else 10}
        rows = rows or [
            {"test/accuracy": value, "model/sparsity": sparsity, "wire/total_up_bytes": 1e6 * at,
             "wire/total_down_bytes": 2e6 * at}
            for at, value in enumerate(accuracy, 1)
        ]  # fmt: skip
        settings = {
            "name": f"run{count}", "seed": seed, "rounds": 2, "model": {"_target_": "m.MLP", "hidden": [8]},
            "pruner": node, "correction": {}, "runtime": {"slots": count}, "tracker": {"progress": "none"},
            "data": {"_target_": "d.digits", "path": f"/data/{count}"}, "checkpoint": {"every": count}, **config,
        }  # fmt: skip
        return report.write(
            tmp_path / f"{count:02}", down=[], up=[], rounds=len(rows), rows=rows, status=status, config=settings,
        )  # fmt: skip

    return write


def test_seeds_fold_into_mean_and_deviation_of_the_sample(cell, report, tmp_path):
    for seed, value in enumerate((0.6, 0.7, 0.9)):
        cell(sparsity=0.8, seed=seed, accuracy=(0.1, value))
    cell(sparsity=0.5, accuracy=(0.9, 0.25))
    (rows,) = report.tables(report.table(tmp_path))
    assert rows == [
        {"sparsity": "0.5", "seeds": "1", "test/accuracy": "0.2500 ± -", "sparsity at the end": "0.5000",
         "MB up": "2.00", "MB down": "4.00"},
        {"sparsity": "0.8", "seeds": "3", "test/accuracy": f"0.7333 ± {statistics.stdev([0.6, 0.7, 0.9]):.4f}",
         "sparsity at the end": "0.8000", "MB up": "2.00", "MB down": "4.00"},
    ]  # fmt: skip


def test_another_pruner_is_one_difference_and_not_one_for_each_of_its_settings(cell, report, tmp_path):
    cell("NoPruning", 0.0)
    for pruner in ("Magnitude", "FedDST"):
        for sparsity in (0.5, 0.8):
            cell(pruner, sparsity)
    (rows,) = report.tables(report.table(tmp_path))
    assert [(row["pruner"], row["sparsity"]) for row in rows] == [
        ("FedDST", "0.5"), ("FedDST", "0.8"), ("Magnitude", "0.5"), ("Magnitude", "0.8"), ("NoPruning", "-"),
    ]  # fmt: skip
    assert "every" not in rows[0]


def test_a_choice_of_a_group_is_one_column_and_what_differs_within_it_another(report, tmp_path):
    """Wires are chains of different stages: their names tell them apart, not a column for every stage."""
    wires = {
        "float32": {"up": {"chain": {"float32": {"_target_": "w.Float32"}}, "feedback": False}},
        "topk": {"up": {"chain": {"topk": {"_target_": "w.TopK", "fraction": 0.1}}, "feedback": True}},
        "sign": {"up": {"chain": {"sign": {"_target_": "w.ScaledSign", "level": "tensor"}}, "feedback": True}},
    }
    without = {"up": {**wires["topk"]["up"], "feedback": False}}
    for count, (name, wire) in enumerate([*wires.items(), ("topk", without)]):
        report.write(
            tmp_path / f"{count}", down=[], up=[], rounds=1, rows=[{"test/accuracy": 0.5}],
            config={"wire": wire, "trainer": {"lr": 0.1}}, choices={"wire": name, "trainer": "sgd", "runtime": "ray"},
        )  # fmt: skip
    (rows,) = report.tables(report.table(tmp_path))
    assert [list(row.items())[:2] for row in rows] == [
        [("wire", "float32"), ("feedback", "False")],
        [("wire", "sign"), ("feedback", "True")],
        [("wire", "topk"), ("feedback", "False")],
        [("wire", "topk"), ("feedback", "True")],
    ]


def test_no_two_lines_look_alike(cell, report, tmp_path):
    cell()
    cell(new_setting=3)  # an older run does not have it at all
    (rows,) = report.tables(report.table(tmp_path))
    assert sorted(row["new_setting"] for row in rows) == ["-", "3"]


def test_short_names_are_only_for_settings_of_one_name(cell, report, tmp_path):
    cell(sparsity=0.5, strategy={"_target_": "s.S", "sparsity": 1})
    cell(sparsity=0.8, strategy={"_target_": "s.S", "sparsity": 2})
    (rows,) = report.tables(report.table(tmp_path))
    assert {"pruner.sparsity", "strategy.sparsity"} <= set(rows[0])


def test_numbers_are_ordered_by_size(cell, report, tmp_path):
    for size in (10, 9, 100):
        cell(cohort=size)
    (rows,) = report.tables(report.table(tmp_path))
    assert [row["cohort"] for row in rows] == ["9", "10", "100"]


def test_the_last_value_of_a_metric_counts(cell, report, tmp_path):
    cell(rows=[{"test/accuracy": 0.3, "train/loss": 2.0}, {"train/loss": 1.5}])
    assert report.tables(report.table(tmp_path))[0][0]["test/accuracy"].startswith("0.3000")
    assert report.tables(report.table(tmp_path, "--metric", "train/loss"))[0][0]["train/loss"].startswith("1.5000")


def test_the_ratio_is_shown_where_it_was_recorded(cell, report, tmp_path):
    cell(rows=[{"test/accuracy": 0.3, "wire/total_ratio": 7.25}])
    assert report.tables(report.table(tmp_path))[0][0]["dense / sent"] == "7.25"


def test_what_is_left_out_is_named(cell, report, tmp_path):
    cell(sparsity=0.5)
    cell(sparsity=0.5, seed=1, status="failed")
    cell(sparsity=0.5, seed=2, status="running")
    cell(sparsity=0.5, seed=3, rows=[{"train/loss": 1.0}])
    cell(sparsity=0.5, seed=4, accuracy=(0.5, float("nan")))
    text = report.table(tmp_path)
    assert report.tables(text)[0][0]["seeds"] == "1"
    assert "02 is left out: failed" in text
    assert "03 is left out: running" in text
    assert "04 is left out: it has no test/accuracy" in text
    assert "05 is left out: its last test/accuracy is not finite" in text


def test_a_seed_that_was_run_twice_counts_once(cell, report, tmp_path):
    first, second = cell(accuracy=(0.1, 0.2)), cell(accuracy=(0.1, 0.8))
    for run, started in ((first, "2026-01-02T00:00:00+00:00"), (second, "2026-01-01T00:00:00+00:00")):
        path = run / "manifest.json"
        path.write_text(path.read_text().replace('"started": "', f'"started": "{started}", "was": "'))
    text = report.table(tmp_path)
    assert report.tables(text)[0][0]["test/accuracy"].startswith("0.2000")
    assert "02 is left out: 01 repeats it with the same seed" in text


def test_a_change_of_the_data_is_another_group(report, tmp_path):
    for seed, digest in enumerate(("aa", "bb")):
        report.write(
            tmp_path / digest, down=[], up=[], rounds=1, rows=[{"test/accuracy": 0.5}],
            config={"seed": seed}, data={"digest": digest},
        )  # fmt: skip
    (rows,) = report.tables(report.table(tmp_path))
    assert [(row["digest"], row["seeds"]) for row in rows] == [("aa", "1"), ("bb", "1")]


def test_rows_and_columns_are_two_settings(cell, report, tmp_path):
    cell("NoPruning", 0.0, accuracy=(0.9, 0.95))
    for pruner, base in (("Magnitude", 0.5), ("FedDST", 0.6)):
        for sparsity in (0.9, 0.5):
            for seed in (0, 1):
                cell(pruner, sparsity, seed, accuracy=(0, base + sparsity / 10 + seed / 50))
    (rows,) = report.tables(report.table(tmp_path, "--rows", "pruner", "--cols", "sparsity"))
    found = {row["pruner \\ sparsity"]: row for row in rows}
    assert list(found["FedDST"])[1:] == ["-", "0.5", "0.9"]
    assert found["FedDST"]["0.9"] == "0.7000 ± 0.0141"
    assert found["Magnitude"]["0.5"].startswith("0.5600")
    assert found["NoPruning"]["-"] == "0.9500 ± - (n=1)"
    assert found["NoPruning"]["0.5"] == "-"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "pruner"], "given together"),
        (["--rows", "prunner", "--cols", "sparsity"], "did you mean pruner"),
        (["--rows", "pruner", "--cols", "sparsty"], "did you mean pruner.sparsity"),
        (["--rows", "pruner", "--cols", "rounds"], "2 settings, which differ in pruner.sparsity"),
        (["--metric", "test/acuracy"], "did you mean test/accuracy"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_in_a_sentence(arguments, says, cell, report, tmp_path):
    cell(sparsity=0.5)
    cell(sparsity=0.8)
    with pytest.raises(ConfigError, match=says):
        report.table(tmp_path, *arguments)


def test_a_folder_without_finished_runs_is_refused(cell, report, tmp_path):
    with pytest.raises(ConfigError, match="holds no run directory"):
        report.table(tmp_path)
    cell(status="failed")
    with pytest.raises(ConfigError, match="no finished run"):
        report.table(tmp_path)


def test_a_run_that_cannot_be_read_is_left_out_and_alone_refused(cell, report, tmp_path):
    good, bad = cell(), cell()
    (bad / "manifest.json").write_text("{")
    text = report.table(tmp_path)
    assert report.tables(text)[0][0]["seeds"] == "1"
    assert "- 02 is left out: " in text
    assert "is not valid JSON" in text
    (good / "rounds.jsonl").write_text("x\n" + (good / "rounds.jsonl").read_text())
    with pytest.raises(ConfigError, match="holds no run that can be read: Line 1"):
        report.table(tmp_path)


def test_a_folder_of_unfinished_runs_says_how_to_go_on(cell, report, tmp_path):
    cell(status="interrupted")
    cell(status="running")
    with pytest.raises(
        ConfigError, match=r"no finished run: '.*01' is interrupted, '.*02' is running; go on with fedray resume .*01$"
    ):
        report.table(tmp_path)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((1_234_567,), "1,234,567 ± -"),
        ((1_234_567, 1_234_569), "1,234,568 ± 1"),
        ((3, 3), "3 ± 0"),
        ((0.5,), "0.5000 ± -"),
        ((1.0,), "1.0000 ± -"),
        ((12.5, 12.5), "12.50 ± 0.00"),
        ((1.5e9,), "1,500,000,000 ± -"),
        ((0.0000123,), "0.00001230 ± -"),
    ],
)
def test_decimals_suit_the_metric(values, shown, cell, report, tmp_path):
    for seed, value in enumerate(values):
        cell(seed=seed, rows=[{"wire/total_bytes": value}])
    (row,) = report.tables(report.table(tmp_path, "--metric", "wire/total_bytes"))[0]
    assert row["wire/total_bytes"] == shown


def test_megabytes_have_a_deviation_where_seeds_differ(cell, report, tmp_path):
    for seed, sent in enumerate((1.0e6, 2.0e6)):
        row = {"test/accuracy": 0.5, "wire/total_up_bytes": sent, "wire/total_down_bytes": 51_200}
        cell(seed=seed, rows=[row])
    (row,) = report.tables(report.table(tmp_path))[0]
    assert (row["MB up"], row["MB down"]) == ("1.50 ± 0.707", "0.0512")


def test_many_names_are_cut_short(cell, report, tmp_path):
    cell(rows=[{"test/accuracy": 0.5, **{f"model/layer_sparsity/{n}": 0.1 for n in range(20)}}])
    with pytest.raises(ConfigError, match=r"there are test/accuracy, (\S+, ){6}\S+ and 13 more$"):
        report.table(tmp_path, "--metric", "zzz")
    with pytest.raises(ConfigError, match=r"there are (\S+, ){7}\S+ and \d more$"):
        report.table(tmp_path, "--rows", "zzz", "--cols", "seed")


def test_seeds_can_be_columns(cell, report, tmp_path):
    for sparsity in (0.5, 0.8):
        for seed in (0, 1):
            cell(sparsity=sparsity, seed=seed, accuracy=(sparsity + seed / 10,))
    (rows,) = report.tables(report.table(tmp_path, "--rows", "sparsity", "--cols", "seed"))
    assert rows[1] == {"sparsity \\ seed": "0.8", "0": "0.8000 ± -", "1": "0.9000 ± -"}


def test_runs_of_an_older_version_beside_newer_ones_are_named(report, tmp_path):
    for name, more in (("old", {}), ("new", {"choices": {"wire": "float32"}})):
        report.write(
            tmp_path / name, down=[], up=[], rounds=1, rows=[{"test/accuracy": 0.5}],
            config={"wire": {"up": {"chain": 1}}}, **more,
        )  # fmt: skip
    text = report.table(tmp_path)
    assert len(report.tables(text)[0]) == 2
    assert "- old was recorded by an older version of fedray" in text
    (tmp_path / "new" / "manifest.json").write_text((tmp_path / "old" / "manifest.json").read_text())
    assert "older version" not in report.table(tmp_path)
