"""`fedray reprice`: what a run recorded, under every convention, device and link, with sizes known from elsewhere."""

import json
import math

import pytest

from fedray.costs import Device, FixedLink, LogNormalLink
from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.report.conventions import CONVENTIONS
from fedray.report.runs import sized
from fedray.track.store import read_clients

PHONE = Device(
    name="phone", flops_per_s=1e9, memory_bytes=10**9, joules_per_flop=1e-9, joules_per_byte_up=3e-6,
    joules_per_byte_down=1e-6,
)  # fmt: skip


def by(rows, key="convention"):
    return {row[key]: row for row in rows}


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(report, tmp_path):
    """2 clients x 3 rounds. Down 1000 float32 coordinates, a fifth kept; up int8, and a dense part beside it."""
    part, frame = report.part, report.frame
    return report.write(
        tmp_path / "run",
        down=[frame(mask_bytes=125), part("params", 1000, 200, weights=180)],
        up=[
            frame(mask_bytes=1),
            part("params", 1000, 200, bits=8, params=50, weights=40, chain="topk:0.25+int8", mask_bytes=60,
                 header_bytes=5),
            part("buffers", 10, 10),
        ],
        flops=lambda _, client: 1e9 * (client + 1),
    )  # fmt: skip


def test_parts_add_up_to_what_was_recorded(small, report):
    parts, _ = report.tables(report.reprice(small))
    found = {(row["way"], row["part"]): row for row in parts}
    assert set(found) == {("down", "message"), ("down", "params"), ("up", "message"), ("up", "params"),
                          ("up", "buffers"), ("both", "all")}  # fmt: skip
    up = found["up", "params"]
    assert (up["chain"], up["payloads"], up["parameters"]) == ("topk:0.25+int8", "6", "300")
    assert (up["value bytes"], up["mask bytes"], up["header bytes"], up["bytes"]) == ("300", "360", "30", "690")
    assert up["dense / this"] == f"{24_000 / 690:.2f}"
    total = found["both", "all"]
    # Six of each: 149 + 800 down, 25 + 115 + 40 up.
    assert (total["payloads"], total["parameters"], total["bytes"]) == ("12", "1,560", f"{6 * 1129:,}")
    assert total["dense / this"] == f"{6 * (4000 + 4000 + 40) / (6 * 1129):.2f}"
    assert up["share"] == f"{100 * 690 / (6 * 1129):.1f} %"
    assert total["share"] == "100.0 %"


def test_every_convention_stands_side_by_side(small, report):
    _, prices = report.tables(report.reprice(small))
    found = by(prices)
    bytes_of = {name: found[name]["bytes both ways"] for name in found}
    assert bytes_of["measured"] == "6,774"
    assert bytes_of["dense"] == f"{6 * 8040:,}"
    assert bytes_of["values"] == f"{6 * (800 + 50 + 40):,}"
    assert bytes_of["bitmap"] == f"{6 * (125 + 800 + 125 + 50 + 40):,}"
    assert bytes_of["coo32"] == f"{6 * (1600 + 250 + 40):,}"
    assert bytes_of["lotteryfl"] == f"{6 * 4 * (40 + 10):,}"
    assert found["bitmap"]["dense / this"] == f"{8040 / 1140:.2f}"
    assert found["lotteryfl"]["dense / this"] == f"{4040 / 200:.2f}"  # it counts uploads alone
    assert found["bitmap"]["bytes per client-round"] == "1,140"
    assert next(iter(found)) == "measured"


def test_the_conventions_that_are_named_are_the_ones_that_are_shown(small, report):
    _, prices = report.tables(report.reprice(small, "--as", "bitmap,dense"))
    assert [row["convention"] for row in prices] == ["bitmap", "dense"]
    with pytest.raises(ConfigError, match="did you mean bitmap"):
        report.reprice(small, "--as", "bitmaps")


def test_a_recorded_lotteryfl_run_costs_what_the_paper_says(report, tmp_path):
    # LotteryFL, table of MNIST, FedAvg with 5 clients in 400 rounds: 165.94 "MB". 90 biases are not counted.
    run = report.write(
        tmp_path, clients=5, rounds=400, down=[report.part("params", 21_840, 21_840)],
        up=[report.frame(), report.part("params", 21_840, 21_840, weights=21_750)],
    )  # fmt: skip
    (row,) = report.tables(report.reprice(run, "--as", "lotteryfl"))[1]
    assert row["both ways"] == row["up"] == "165.94 MiB"
    assert row["bytes both ways"] == "174,000,000"


@pytest.mark.parametrize(("sparsity", "megabytes"), [(0.5, "138.34 MB"), (0.7, "86.26 MB"), (0.8, "60.22 MB")])
def test_recorded_runs_give_the_sizes_of_fedrts(sparsity, megabytes, report, tmp_path):
    kept = round((1 - sparsity) * 32_551_250)
    message = [report.frame(), report.part("params", 32_551_250, kept)]
    run = report.write(tmp_path, clients=3, rounds=2, down=message, up=message)
    (row,) = report.tables(report.reprice(run, "--as", "bitmap"))[1]
    assert row["per client-round"] == megabytes


def test_a_download_that_catches_up_is_several_payloads_and_one_dense_model(report, tmp_path):
    late = [report.frame(), report.part("params", 3000, 600, payloads=3)]
    late[0]["payloads"] = 3
    run = report.write(tmp_path, clients=1, rounds=1, down=late, up=[])
    parts, prices = report.tables(report.reprice(run, "--as", "dense,bitmap"))
    assert {row["payloads"] for row in parts} == {"3"}
    assert by(prices)["dense"]["bytes both ways"] == "4,000"
    assert by(prices)["bitmap"]["bytes both ways"] == f"{3 * 125 + 2400:,}"


# -- time ------------------------------------------------------------------------------------------------------------


def test_a_round_waits_for_the_slowest_client_under_the_bytes_of_each_convention(small, report):
    report.profiles["device", "phone"] = PHONE
    times = report.tables(report.reprice(small, "--device", "phone", "--link", "up=0.008,down=0.08,latency=0.5"))[2]
    found = by(times, "bytes as")
    # Up 1000 bytes/s, down 10,000 bytes/s; the slow client computes for 2 s.
    for name, down, up in (("measured", 949, 180), ("dense", 4000, 4040), ("lotteryfl", 0, 200)):
        seconds = 2 + (0.5 + down / 10_000 if down else 0) + 0.5 + up / 1000
        assert found[name]["seconds"] == f"{3 * seconds:.2f}"
        assert found[name]["seconds a round"] == f"{seconds:.3f}"
        joules = 3 * (1 + 2) + 6 * (down * 1e-6 + up * 3e-6)
        assert found[name]["joules"] == f"{joules:.2f}"


def test_a_run_is_timed_on_its_own_device_and_link_unless_others_are_named(small, report, tmp_path):
    part = report.part("params", 1000, 1000)
    run = report.write(
        tmp_path / "own", down=[part], up=[part], clients=1, rounds=2, flops=3e9,
        config={"device": {"_target_": "mine.Device"}, "link": {"_target_": "mine.Link"}},
    )  # fmt: skip
    report.nodes["mine.Device"], report.nodes["mine.Link"] = PHONE, FixedLink(up_mbps=0.032, down_mbps=0.032)

    def seconds(*arguments):
        return report.tables(report.reprice(run, "--as", "measured", *arguments))[2][0]["seconds"]

    assert seconds() == f"{2 * (3 + 1 + 1):.2f}"
    assert seconds("--device", "none") == f"{2 * (1 + 1):.2f}"
    assert seconds("--link", "none") == f"{2 * 3:.2f}"
    assert seconds("--link", "up=0.016,down=0.032") == f"{2 * (3 + 1 + 2):.2f}"
    assert len(report.tables(report.reprice(run, "--device", "none", "--link", "none"))) == 2
    assert len(report.tables(report.reprice(small))) == 2  # neither in the run nor in the command


def test_a_clients_drawn_link_is_the_one_of_the_runs_seed(report, tmp_path):
    link = LogNormalLink(up_mbps=1, down_mbps=1, spread=1.0)
    report.profiles["link", "mixed"] = link
    part = report.part("params", 31_250, 31_250)  # 1e6 bits: one second at the median

    def seconds(seed):
        run = report.write(tmp_path / str(seed), down=[], up=[part], clients=4, rounds=2, config={"seed": seed})
        return report.tables(report.reprice(run, "--as", "dense", "--link", "mixed"))[2][0]["seconds"]

    slowest = max(math.exp(-Key.of(5).fold("link", client).numpy().standard_normal()) for client in range(4))
    assert seconds(5) == f"{2 * slowest:.2f}"
    assert seconds(6) != seconds(5 + 2)


@pytest.mark.parametrize(
    ("link", "says"),
    [
        ("up=10", "needs up and down"),
        ("up=10,down=x", "'x' must be a number"),
        ("up=10,down=5,delay=1", "'delay=1'; write up=10"),
        ("up=10,up=5,down=1", "'up=5'"),
        ("up=-1,down=5", "up is -1.0; it must be above 0"),
        ("up=0,down=1", "'up=0,down=1': up is 0.0; it must be above 0 and finite; write up=10,down=50"),
        ("up=1,down=1,latency=-1", "latency is -1.0; it must be at least 0"),
        ("up=1,down=1,spread=9", "spread is 9.0; it must be from 0 to 5"),
        ("moon", "link=moon does not exist"),
    ],
)
def test_a_link_that_cannot_be_is_refused_in_a_sentence(link, says, small, report):
    with pytest.raises(ConfigError, match=says):
        report.reprice(small, "--link", link)


def test_a_run_whose_decisions_read_the_time_has_no_other_time(report, tmp_path):
    report.profiles["device", "phone"] = report.nodes["mine.Device"] = PHONE
    part = report.part("params", 1000, 500)
    run = report.write(
        tmp_path / "timed", down=[part], up=[part], flops=1e9, depends_on_time=True,
        config={"device": {"_target_": "mine.Device"}},
    )  # fmt: skip
    for flag, value in (("--device", "phone"), ("--link", "up=1,down=1"), ("--device", "none")):
        with pytest.raises(ConfigError, match="cannot be re-priced in time"):
            report.reprice(run, flag, value)
    _, prices, times = report.tables(text := report.reprice(run))
    assert len(prices) > 5
    assert [row["bytes as"] for row in times] == ["measured"]
    assert "would have been another run" in text
    # Among others it is listed without a time.
    report.write(tmp_path / "other", down=[part], up=[part], flops=1e9)
    (rows,) = report.tables(text := report.reprice(tmp_path, "--as", "dense", "--device", "phone"))
    assert by(rows, "run")["timed"]["seconds (dense)"] == "-"
    assert by(rows, "run")["other"]["seconds (dense)"] == "3.00"
    assert "timed has no other time" in text


# -- the user's own code ---------------------------------------------------------------------------------------------

MINE = """
from fedray.report.conventions import convention

@convention()
def by_halves(row):
    "Mine."
    return row["params"] / 2
"""


@pytest.fixture
def code(tmp_path):
    """A folder of the user's code with a convention, which is forgotten again."""
    folder, known = tmp_path / "code", set(CONVENTIONS)
    folder.mkdir()
    (folder / "conventions.py").write_text(MINE)
    yield folder
    for name in set(CONVENTIONS) - known:
        del CONVENTIONS[name]


@pytest.fixture
def owned(report, tmp_path, code):
    """A run with a device and a link of the user's own."""
    part = report.part("params", 1000, 1000)
    return report.write(
        tmp_path / "runs" / "own", down=[part], up=[part], clients=1, rounds=2, flops=3e9, code_folder=str(code),
        choices={"device": "mine", "link": "slow", "wire": "float32"},
        config={"device": {"_target_": "mine.Device"}, "link": {"_target_": "mine.Link"}},
    )  # fmt: skip


def test_a_runs_own_code_is_made_importable_and_its_conventions_count(owned, report, code, tmp_path):
    report.nodes["mine.Device"], report.nodes["mine.Link"] = PHONE, FixedLink(up_mbps=0.032, down_mbps=0.032)
    _, prices, times = report.tables(text := report.reprice(owned, "--as", "by_halves,measured"))
    assert by(prices)["by_halves"]["bytes both ways"] == "2,000"
    assert len(times) == 2
    assert set(report.used) == {str(code)}
    assert "## Simulated time: device mine, link slow (0.032 up, 0.032 down Mbit/s)" in text
    # Where the code moved, the folder of the command counts and that of the manifest does not.
    report.used.clear()
    (tmp_path / "moved").mkdir()
    report.reprice(owned, "--config-dir", tmp_path / "moved")
    assert set(report.used) == {str(tmp_path / "moved")}


def test_conventions_of_a_named_folder_count_without_a_run_too(report, code):
    (row,) = report.tables(report.reprice("--params", 10, "--as", "by_halves", "--config-dir", code))[0]
    assert row["bytes"] == "10"


def test_conventions_that_cannot_be_imported_or_priced_are_told(owned, report, code):
    report.nodes["mine.Device"] = report.nodes["mine.Link"] = None
    (code / "conventions.py").write_text("import no_such_thing")
    assert "conventions.py' cannot be imported (ModuleNotFoundError" in report.reprice(owned, "--as", "dense")
    with pytest.raises(ConfigError, match=r"by_halves is not a convention.*cannot be imported \(Module"):
        report.reprice(owned, "--as", "by_halves")
    with pytest.raises(ConfigError, match="cannot be imported"):
        report.reprice(owned, "--config-dir", code)
    (code / "conventions.py").write_text(MINE.replace("by_halves", "measured"))
    assert "measured is a convention of fedray's own" in report.reprice(owned, "--as", "dense")
    (code / "conventions.py").write_text(MINE.replace('"params"', '"parms"'))
    with pytest.raises(ConfigError, match=r"by_halves cannot price part params of round 1 .*KeyError: 'parms'"):
        report.reprice(owned, "--as", "by_halves")


def test_a_device_that_cannot_be_made_costs_the_times_and_nothing_else(owned, small, report, tmp_path):
    report.nodes["mine.Link"] = FixedLink(up_mbps=1, down_mbps=1)
    assert len(report.tables(text := report.reprice(owned))) == 2
    assert "no simulated time: device._target_ is 'mine.Device'; it cannot be imported" in text
    (rows,) = report.tables(text := report.reprice(owned, small, "--as", "dense"))
    assert len(rows) == 2
    assert "has no simulated time: device._target_" in text
    with pytest.raises(ConfigError, match=r"device._target_ .* cannot be imported; say where its code is"):
        report.reprice(owned, "--link", "up=1,down=1")
    assert "device none" not in (text := report.reprice(owned, "--device", "none", "--link", "up=1,down=2"))
    assert "## Simulated time: no device, link up=1,down=2 (1 up, 2 down Mbit/s)" in text


# -- several runs, and none ------------------------------------------------------------------------------------------


def test_several_runs_have_a_line_each(small, report, tmp_path):
    part = report.part("params", 1000, 500)
    report.write(tmp_path / "sweep" / "10", down=[part], up=[part], rounds=5)
    report.write(tmp_path / "sweep" / "9" / "deep", down=[part], up=[part], rounds=2, status="interrupted")
    report.write(tmp_path / "sweep" / "11", down=[part], up=[part], rounds=0)
    text = report.reprice(tmp_path / "sweep", "--as", "bitmap")
    (rows,) = report.tables(text)
    assert [row["run"] for row in rows] == ["9/deep", "10"]
    assert rows[1]["bytes both ways"] == f"{2 * 5 * 2 * 2125:,}"
    assert rows[1]["rounds"] == "5"
    assert "9/deep is interrupted: its 2 rounds count" in text
    assert "11' has no finished round" in text
    (rows,) = report.tables(report.reprice(tmp_path / "sweep", small))
    assert len(rows) == 3
    assert rows[2]["measured MB"] == "0.00677"
    assert {"bitmap MB", "lotteryfl MiB"} <= set(rows[0])


def test_what_lies_in_a_run_belongs_to_it(small, report):
    report.write(small / "checkpoints" / "copy", down=[report.part("params", 9, 9)], up=[])
    assert len(report.tables(report.reprice(small))) == 2


def test_runs_of_older_versions_are_refused_in_a_sentence(small, report, tmp_path):
    path = small / "transfers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["weights"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"older version of fedray and cannot be re-priced.*transfers"):
        report.reprice(small)
    report.write(tmp_path / "newer", down=[report.part("params", 9, 9)], up=[])
    text = report.reprice(tmp_path)
    assert [row["run"] for row in report.tables(text)[0]] == ["newer"]
    assert "Left out" in text
    assert "older version" in text


def test_transfers_that_do_not_add_up_to_the_recorded_total_are_refused(report, tmp_path):
    part = report.part("params", 1000, 500)
    rows = [{"wire/total_bytes": 8000 * number} for number in (1, 2, 3)]
    run = report.write(tmp_path / "a", down=[part], up=[part], rows=rows)
    assert report.reprice(run)
    path = run / "transfers.jsonl"
    whole = path.read_text()
    for lines in (whole.splitlines()[:-1], []):
        path.write_text("".join(f"{line}\n" for line in lines))
        total = f"add up to {2000 * len(lines):,} bytes, and rounds.jsonl has 24,000 bytes"
        with pytest.raises(ConfigError, match=f"{total} in all; restore the files from a copy, or run again"):
            report.reprice(run)
    # A run that goes on adds to its files while they are read: a round that is not finished does not count.
    path.write_text(whole + json.dumps({"round": 4, "client": 0, "direction": "up", **part}) + "\n")
    assert report.reprice(run)


def test_a_device_needs_every_line_of_a_client(small, report):
    report.profiles["device", "phone"] = PHONE
    path = small / "clients.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:-2]))
    report.reprice(small, "--link", "up=1,down=1")
    with pytest.raises(ConfigError, match=r"2 of 6 lines of clients are missing.*client 0 in round 3.*restore"):
        report.reprice(small, "--device", "phone")


def test_a_run_that_cannot_be_read_is_left_out_and_alone_refused(report, tmp_path):
    part = report.part("params", 1000, 500)
    good, torn, empty, broken = (
        report.write(tmp_path / name, down=[part], up=[part], flops=1.0) for name in ("1", "2", "3", "4")
    )
    (torn / "manifest.json").write_text("{")
    (empty / "manifest.json").write_text("{}")
    (broken / "transfers.jsonl").write_text("x\n" + (broken / "transfers.jsonl").read_text())
    (rows,) = report.tables(text := report.reprice(tmp_path, "--as", "dense"))
    assert [row["run"] for row in rows] == ["1"]
    assert "manifest.json' is not valid JSON" in text
    assert "manifest.json' does not say what ran" in text
    assert "Line 1 of" in text
    for run in (torn, empty, broken):
        with pytest.raises(ConfigError, match=r"restore it from a copy|repair or remove the line"):
            report.reprice(run)
    for run in (good, broken):
        (run / "manifest.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"none of the 4 runs can be priced: .*manifest.json' holds list"):
        report.reprice(tmp_path)


def test_several_runs_show_what_differs_between_them(report, tmp_path):
    report.profiles["device", "phone"] = PHONE
    part = report.part("params", 1000, 500)
    for number, (sparsity, seed) in enumerate([(0.5, 0), (0.5, 1), (0.8, 0)]):
        report.write(
            tmp_path / str(number), down=[part], up=[part], flops=1.0,
            config={"seed": seed, "rounds": number, "pruner": {"_target_": "p.Magnitude", "sparsity": sparsity}},
        )  # fmt: skip
    (rows,) = report.tables(text := report.reprice(tmp_path, "--as", "dense", "--device", "phone"))
    assert [list(row.items())[1:4] for row in rows] == [
        [("sparsity", sparsity), ("seed", seed), ("rounds", "3")]
        for sparsity, seed in (("0.5", "0"), ("0.5", "1"), ("0.8", "0"))
    ]
    assert "Simulated time: device phone, no link." in text


def test_small_amounts_keep_three_digits(report):
    for params, shown in ((12_800, "0.0512 MB"), (308, "0.00123 MB"), (1, "0.00000400 MB"), (300_000, "1.20 MB")):
        (row,) = report.tables(report.reprice("--params", params, "--as", "dense"))[0]
        assert row["up"] == shown
    (row,) = report.tables(report.reprice("--params", 1000, "--as", "lotteryfl"))[0]
    assert row["down"] == "0.00 MiB"


def test_a_device_needs_the_flops_of_clients_and_a_link_does_not(small, report):
    report.profiles["device", "phone"] = PHONE
    path = small / "clients.jsonl"
    path.write_text(path.read_text().replace('"train_flops"', '"other"'))
    report.reprice(small, "--link", "up=1,down=1")
    with pytest.raises(ConfigError, match=r"older version.*computed"):
        report.reprice(small, "--device", "phone")


def test_a_folder_without_runs_is_refused(report, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="holds no run directory"):
            report.reprice(folder)
    with pytest.raises(ConfigError, match="folder of a run"):
        report.reprice()
    report.write(tmp_path / "empty", down=[], up=[], rounds=0)
    with pytest.raises(ConfigError, match="no finished round"):
        report.reprice(tmp_path / "empty")


def test_a_what_if_gives_the_sizes_of_fedrts(report):
    arguments = ("--params", 32_551_250, "--sparsity", "0.5,0.7,0.8", "--as", "bitmap")
    (rows,) = report.tables(report.reprice(*arguments))
    assert [row["both ways"] for row in rows] == ["138.34 MB", "86.26 MB", "60.22 MB"]
    assert rows[0]["bytes"] == "138,342,814"  # both ways round up to a byte: 4,068,907 x 2 of bitmap
    (rows,) = report.tables(report.reprice("--params", 32_551_250, "--as", "dense"))
    assert rows[0]["both ways"] == "260.41 MB"
    (rows,) = report.tables(report.reprice("--params", 1000, "--bits", 8, "--as", "values", "--clients", 2))
    assert (rows[0]["bytes"], rows[0]["all bytes"]) == ("2,000", "4,000")


def test_a_what_if_gives_the_size_of_lotteryfl(report):
    arguments = ("--params", 21_750, "--clients", 5, "--rounds", 400, "--as", "lotteryfl")
    (row,) = report.tables(report.reprice(*arguments))[0]
    assert row["all both ways"] == row["all up"] == "165.94 MiB"
    assert row["all bytes"] == "174,000,000"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--params", 10, "--as", "measured"], "reads recorded bytes"),
        (["--params", 0], "--params is 0; it must be from 1 to"),
        *(
            (["--params", 10, "--bits", bits], f"--bits is {bits}; it must be from 1 to 64")
            for bits in ("nan", "inf", "0", "-1")
        ),
        (["--params", 10**13], "--params is 10000000000000; it must be from 1 to 1,000,000,000,000"),
        (["--params", 10, "--clients", -1], "--clients is -1; it must be from 1"),
        (["--params", 10, "--rounds", 0], "--rounds is 0; it must be from 1"),
        (["--params", 10, "--as", ""], "--as '' has an empty name; write names with commas"),
        (["--params", 10, "--as", "values,"], "--as 'values,' has an empty name; write names with commas"),
        (["--params", 10, "--config-dir", "nowhere"], "--config-dir is 'nowhere'; it must be the folder"),
        (["--params", 10, "--sparsity", "1"], "from 0 to below 1"),
        (["--params", 10, "--sparsity", "half"], "write numbers"),
        (["--params", 10, "folder"], "without a run"),
        (["--params", 10, "--device", "phone"], "without a run"),
        (["folder", "--sparsity", "0.5"], "give --params too"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_a_what_if_that_makes_no_sense_is_refused_in_a_sentence(arguments, says, report):
    with pytest.raises(ConfigError, match=says):
        report.reprice(*arguments)


# -- a real run ------------------------------------------------------------------------------------------------------


def test_measured_prices_are_the_drivers_own_totals(report, tmp_path, capsys):
    import fedray
    from fedray.cli import main

    overrides = [
        "runtime=inline", "rounds=3", "num_clients=6", "cohort=3", "model.hidden=[8]", "pruner=magnitude",
        "device=phone", "link=lte_mixed", "tracker.progress=none", "tracker.wandb.mode=disabled",
    ]  # fmt: skip
    run = fedray.run(overrides, folder=tmp_path)
    last = run.rows[-1]
    capsys.readouterr()
    assert main(["reprice", str(tmp_path)]) == 0
    parts, prices, times = report.tables(capsys.readouterr().out)
    measured = by(prices)["measured"]
    assert measured["bytes both ways"] == parts[-1]["bytes"] == f"{last['wire/total_bytes']:,}"
    assert measured["dense / this"] == f"{last['wire/total_ratio']:.2f}"
    time = by(times, "bytes as")["measured"]
    assert time["seconds"] == sized(last["time/total_simulated_s"])
    assert time["joules"] == sized(last["energy/total_simulated_j"])
    assert main(["table", str(tmp_path)]) == 0
    (row,) = report.tables(capsys.readouterr().out)[0]
    assert row["MB up"] == sized(last["wire/total_up_bytes"] / 1e6)


@pytest.mark.parametrize(
    ("pruner", "who"),
    [(["pruner=snip", "pruner.sparsity=0.5"], 6), (["pruner=prunefl", "pruner.initial_client=0"], 4)],
)
def test_a_client_that_is_only_asked_counts_in_time_and_bytes_and_not_as_one_that_took_part(
    pruner, who, report, tmp_path, capsys
):
    import fedray
    from fedray.cli import main

    # In round 1 of seed 1 client 0 does not train, and is asked all the same.
    overrides = [
        "runtime=inline", "rounds=1", "seed=1", "num_clients=6", "cohort=3", "model.hidden=[8]", *pruner,
        "device=phone", "link=lte_mixed", "tracker.progress=none", "tracker.wandb.mode=disabled",
    ]  # fmt: skip
    run = fedray.run(overrides, folder=tmp_path)
    (last,) = run.rows
    clients = [row for row in read_clients(tmp_path) if "train_flops" in row]
    trained = [row["client"] for row in clients if "num_steps" in row]
    assert 0 not in trained
    assert len(trained) == 3
    assert len(clients) == who
    assert sum(row["train_flops"] for row in clients) == pytest.approx(last["model/train_flops"], rel=1e-12)
    assert max(row["time/simulated_s"] for row in clients) == last["time/simulated_s"]
    capsys.readouterr()
    assert main(["reprice", str(tmp_path), "--as", "measured"]) == 0
    said = capsys.readouterr().out
    assert "clients took part 3 times" in said
    times = report.tables(said)[-1]
    assert by(times, "bytes as")["measured"]["seconds"] == sized(last["time/total_simulated_s"])
