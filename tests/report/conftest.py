"""Run directories made by hand, and the cells of a Markdown table."""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedray.errors import ConfigError
from fedray.report.commands import reprice_command, table_command
from fedray.track.store import Store

# Helpers beside the tests are imported by their own names.
sys.path.insert(0, str(Path(__file__).parent))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"{self.prog}: {message}")


def part(
    name, size, kept, *, bits=32, params=None, weights=None, chain="float32", mask_bytes=0, header_bytes=0, **more
):
    """One part in one payload; without more, all of the support travels."""
    params = kept if params is None else params
    return {
        "part": name,
        "chain": chain,
        "size": size,
        "kept": kept,
        "params": params,
        "weights": params if weights is None else weights,
        "bits": bits,
        "value_bytes": params * bits // 8,
        "mask_bytes": mask_bytes,
        "header_bytes": header_bytes,
        **more,
    }


def frame(mask_bytes=0, header_bytes=24):
    return part("message", 0, 0, bits=0, chain="", mask_bytes=mask_bytes, header_bytes=header_bytes, mask_coder="none")


def write_run(folder, *, down, up, clients=2, rounds=3, flops=0.0, status="finished", config=None, rows=None, **facts):
    """A run in which every client downloads the parts `down` and uploads the parts `up` in every round.

    flops: of a client's training, or a function of (round, client). rows: of rounds.jsonl, without "round".
    """
    config = {"seed": 0, "name": "run", **(config or {})}
    with Store.create(folder, config_yaml="", manifest={"config": config, **facts}) as store:
        for number in range(1, rounds + 1):
            record, transfers = [], []
            for client in range(clients):
                computed = flops(number, client) if callable(flops) else flops
                record.append({"round": number, "client": client, "train_flops": computed, "seconds": 1.0})
                for way, parts in (("down", down), ("up", up)):
                    parts = parts(number, client) if callable(parts) else parts
                    transfers += [{"round": number, "client": client, "direction": way, **one} for one in parts]
            row = {"digest": "ab"} if rows is None else rows[number - 1]
            store.write({"round": number, **row}, record, transfers)
        if status != "running":
            store.finish(status)
    return folder


def tables(text):
    """Every Markdown table in a text: a list of rows, each a dict by column, without the stars of what is bold."""
    found, header = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip().strip("*") for cell in line.strip("|").split(" | ")]
        if header is None:
            header = cells
            found.append([])
        elif not set("".join(cells)) <= set("-:"):
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found


@pytest.fixture
def report(capsys):
    """The commands and what they print, with profiles and recorded nodes that a test may name."""
    profiles, nodes, used = {}, {}, []

    def profile(group, name, config_dir):
        if name == "none":
            return None
        if (group, name) not in profiles:
            raise ConfigError(f"{group}={name} does not exist; choose one of none")
        return profiles[group, name]

    def make(node, group):
        if node["_target_"] not in nodes:
            raise ConfigError(f"{group}._target_ is {node['_target_']!r}; it cannot be imported")
        return nodes[node["_target_"]]

    def reprice(*arguments):
        reprice_command([str(a) for a in arguments], parser=Parser, profile=profile, make=make, use_code=used.append)
        return capsys.readouterr().out

    def table(*arguments):
        table_command([str(a) for a in arguments], parser=Parser)
        return capsys.readouterr().out

    return SimpleNamespace(
        reprice=reprice, table=table, profiles=profiles, nodes=nodes, used=used,
        write=write_run, part=part, frame=frame, tables=tables, parser=Parser,
    )  # fmt: skip
