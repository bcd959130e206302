"""What the ledger says of a run can be worked out again from its lines, and its time and energy from the costs."""

from dataclasses import replace

import pytest
from laws_support import FedAvg, FedDST, NoPruning, Random, population, run, spec, way

import fedray
from fedray.costs import Device, FixedLink, LogNormalLink
from fedray.keys import Key
from fedray.sim.spec import EvalSpec
from fedray.wire import Delta, Float16, TopK, Uniform, Wire, stc

PHONE = Device(
    name="phone",
    flops_per_s=1e6,
    memory_bytes=10**9,
    joules_per_flop=1e-9,
    joules_per_byte_up=2e-6,
    joules_per_byte_down=1e-6,
)
SLOW = FixedLink(up_mbps=0.1, down_mbps=0.8, latency_s=0.05)
MIXED = LogNormalLink(up_mbps=0.1, down_mbps=0.8, latency_s=0.05, spread=1.0)
WIRE = Wire(
    down=way(Delta(), *stc(fraction=0.1), feedback=True), up=way(TopK(fraction=0.2), Uniform(bits=8), feedback=True)
)


def entries(ran, direction=None):
    lines = [line for record in ran.records for line in record.transfers]
    return [line for line in lines if direction in (None, line["direction"])]


@pytest.mark.parametrize("pruner", [NoPruning(), FedDST(sparsity=0.5, every=2, until=9)], ids=["dense", "feddst"])
def test_metrics_are_the_sums_of_the_lines(pruner):
    ran = run(spec(pruner, FedAvg(), model="batchnorm_cnn", wire=WIRE, rounds=6), population("batchnorm_cnn"))
    total = {"up": 0, "down": 0}
    dense = {"up": 0, "down": 0}
    for record in ran.records:
        row = record.row
        for way_ in ("up", "down"):
            lines = [line for line in record.transfers if line["direction"] == way_]
            for kind in ("value_bytes", "mask_bytes", "header_bytes"):
                assert row[f"wire/{way_}_{kind}"] == sum(line[kind] for line in lines)
            assert row[f"wire/{way_}_bytes"] == sum(
                row[f"wire/{way_}_{kind}"] for kind in ("value_bytes", "mask_bytes", "header_bytes")
            )
            total[way_] += row[f"wire/{way_}_bytes"]
            once = sum(4 * line["size"] / line.get("payloads", 1) for line in lines)
            dense[way_] += once
            assert row[f"wire/{way_}_ratio"] == pytest.approx(once / row[f"wire/{way_}_bytes"])
            assert row[f"wire/total_{way_}_bytes"] == total[way_]
        assert row["wire/total_ratio"] == pytest.approx(sum(dense.values()) / sum(total.values()))


def test_a_line_names_its_chain_and_counts_what_travelled():
    ran = run(spec(Random(sparsity=0.5), FedAvg(), model="batchnorm_cnn", wire=WIRE), population("batchnorm_cnn"))
    chains = {(line["direction"], line["part"]): set() for line in entries(ran)}
    for line in entries(ran):
        chains[line["direction"], line["part"]].add(line["chain"])
        if line["part"] == "message":
            assert (line["size"], line["params"], line["value_bytes"]) == (0, 0, 0)
            continue
        assert 0 < line["params"] <= line["kept"] <= line["size"]
        assert line["weights"] <= line["params"]
        assert line["ratio"] == pytest.approx(
            4
            * line["size"]
            / line.get("payloads", 1)
            / (line["value_bytes"] + line["mask_bytes"] + line["header_bytes"]),
            abs=1e-4,
        )
    assert chains == {
        ("down", "message"): {""},
        ("up", "message"): {""},
        ("down", "params"): {"float32", "delta+topk:0.1+scaled_sign"},
        ("up", "delta"): {"topk:0.2+int8"},
        ("down", "buffers"): {"float32"},
        ("up", "buffers"): {"float32"},
    }
    for line in entries(ran, "up"):
        if line["part"] == "delta":
            assert line["bits"] == 8
            assert line["value_bytes"] == line["params"] + 4 * 8  # a step for each of the eight tensors


@pytest.mark.parametrize("link", [None, SLOW, MIXED], ids=["no link", "one link", "many links"])
@pytest.mark.parametrize("hardware", [None, PHONE], ids=["no device", "phone"])
def test_simulated_time_and_energy_follow_from_the_lines(hardware, link):
    evaluation = EvalSpec(every=2, clients="all", batch_size=16)
    given = spec(Random(sparsity=0.5), FedAvg(), wire=WIRE, hardware=hardware, link=link, evaluation=evaluation)
    ran = run(given, population())
    if hardware is None and link is None:
        assert not any("simulated" in name for row in ran.rows for name in row)
        return
    seconds = joules = 0.0
    for record in ran.records:
        slowest, energy = 0.0, 0.0
        for client in record.clients:
            if "train_flops" not in client:
                continue  # evaluated, but not of the cohort
            sent = {
                way_: sum(
                    line[kind]
                    for line in record.transfers
                    for kind in ("value_bytes", "mask_bytes", "header_bytes")
                    if (line["client"], line["direction"]) == (client["client"], way_)
                )
                for way_ in ("up", "down")
            }
            time, spent = 0.0, 0.0
            if hardware is not None:
                time += client["train_flops"] / 1e6
                spent = client["train_flops"] * 1e-9 + sent["up"] * 2e-6 + sent["down"] * 1e-6
            if link is not None:
                own = link.of(client["client"], Key.of(0))
                time += 0.1 + 8 * sent["up"] / (own.up_mbps * 1e6) + 8 * sent["down"] / (own.down_mbps * 1e6)
            assert client["time/simulated_s"] == pytest.approx(time)
            assert client["energy/simulated_j"] == pytest.approx(spent)
            slowest, energy = max(slowest, time), energy + spent
        seconds, joules = seconds + slowest, joules + energy
        assert record.row["time/simulated_s"] == pytest.approx(slowest)
        assert record.row["time/total_simulated_s"] == pytest.approx(seconds)
        assert record.row["energy/total_simulated_j"] == pytest.approx(joules)
    assert seconds > 0
    # What is imagined decides nothing.
    assert ran.digests == run(replace(given, hardware=None, link=None), population()).digests


def test_clients_of_many_links_differ_and_keep_their_own():
    links = [MIXED.of(client, Key.of(0)).up_mbps for client in range(50)]
    assert len(set(links)) == 50
    assert links == [MIXED.of(client, Key.of(0)).up_mbps for client in range(50)]
    assert links != [MIXED.of(client, Key.of(1)).up_mbps for client in range(50)]


def test_memory_falls_with_sparsity_and_activations_stay():
    rows = [run(spec(p, FedAvg(), rounds=1), population()).rows[0] for p in (NoPruning(), Random(sparsity=0.8))]
    dense, sparse = rows
    assert sparse["model/weight_bytes"] < 0.5 * dense["model/weight_bytes"]
    assert sparse["model/activation_bytes"] == dense["model/activation_bytes"] > 0
    assert dense["model/weight_bytes"] == 4 * (6 * 8 + 8 + 8 * 3 + 3)
    # Weights, gradients and activations; plain SGD keeps nothing.
    assert dense["model/peak_bytes"] == 2 * dense["model/weight_bytes"] + dense["model/activation_bytes"]


SPARSE = [
    "runtime=inline", "model.hidden=[200,200]", "num_clients=10", "cohort=5", "rounds=4", "eval.every=0",
    "pruner=random", "pruner.sparsity=0.95", "tracker.progress=none", "tracker.wandb.mode=disabled",
]  # fmt: skip


def test_sparse_at_95_per_cent_and_8_bits_both_ways_is_under_5_per_cent_of_dense(tmp_path):
    ran = fedray.run([*SPARSE, "wire=int8"], folder=tmp_path / "run")
    num_params = 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10
    dense = 4 * num_params * 5 * 4 * 2
    assert ran.final["wire/total_bytes"] < 0.05 * dense
    assert ran.final["wire/total_ratio"] == pytest.approx(dense / ran.final["wire/total_bytes"])


FORMULAS = {
    "float16": ((Float16(),), 1.0, 2, 0),
    "topk": ((TopK(fraction=0.1),), 0.1, 4, 0),
    "topk, int8": ((TopK(fraction=0.1), Uniform(bits=8)), 0.1, 1, 4),
}


@pytest.mark.parametrize("chain", FORMULAS)
def test_bytes_of_a_chain_are_those_of_its_formula(chain):
    stages, fraction, width, scale = FORMULAS[chain]
    ran = run(spec(model="lenet", wire=Wire(up=way(*stages, feedback=True))), population("lenet"))
    sizes = ran.servers[0].params.layout.sizes
    sent = sum(max(1, round(fraction * size)) for size in sizes)
    deltas = [line for line in entries(ran, "up") if line["part"] == "delta"]
    assert len(deltas) == 4 * 4
    for line in deltas:
        assert (line["size"], line["params"]) == (sum(sizes), sent)
        assert line["value_bytes"] == width * sent + scale * len(sizes)
