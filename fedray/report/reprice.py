"""What finished runs cost, would have cost under other conventions, and on other devices and links.

Only recorded counts are read: nothing is trained again, and masks are not coded again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.errors import ConfigError, FedrayError
from fedray.report.conventions import CONVENTIONS, UNITS, Convention
from fedray.report.runs import manifest_of, markdown, sentence, shown, sized
from fedray.report.settings import cell, differing, settings_of, short
from fedray.track.store import ROUNDS_FILE, TRANSFERS_FILE, Row, read_clients, read_rows, read_transfers

if TYPE_CHECKING:
    from fedray.costs import Device, Link

WAYS = ("down", "up")
Pair = tuple[int, int]  # round, client
MAKEUP = (
    "client", "direction", "part", "chain", "size", "kept", "params", "weights", "bits", "value_bytes", "mask_bytes",
    "header_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """What a run recorded of its transfers. Raises ConfigError where that does not suffice."""

    folder: Path

    @cached_property
    def manifest(self) -> Row:
        return manifest_of(self.folder)

    @cached_property
    def finished(self) -> list[Row]:
        """The rows of the finished rounds."""
        return read_rows(self.folder)

    @property
    def rounds(self) -> int:
        return len(self.finished)

    @cached_property
    def rows(self) -> list[Row]:
        """The transfers of the finished rounds."""
        last = self.finished[-1] if self.finished else {"round": 0}
        # The run may be going on: what it adds meanwhile does not count.
        rows = [row for row in read_transfers(self.folder) if row["round"] <= last["round"]]
        if any(name not in row for row in rows for name in MAKEUP):
            raise self._older("its transfers do not say what they were made of")
        sent = round(sum(map(CONVENTIONS["measured"], rows)))
        recorded = last.get("wire/total_bytes", sent)
        if sent != recorded:
            raise ConfigError(
                f"'{self.folder}' is damaged: the transfers in {TRANSFERS_FILE} add up to {sent:,} bytes, and "
                f"{ROUNDS_FILE} has {recorded:,} bytes in all; restore the files from a copy, or run again"
            )
        if not rows:
            raise ConfigError(f"'{self.folder}' has no finished round with a transfer, so there is nothing to price")
        return rows

    @cached_property
    def train_flops(self) -> dict[Pair, float]:
        """FLOPs of the local training by round and client."""
        pairs = {(row["round"], row["client"]) for row in self.rows}
        clients = {pair: row for row in read_clients(self.folder) if (pair := (row["round"], row["client"])) in pairs}
        if missing := pairs - set(clients):
            number, client = min(missing)
            raise ConfigError(
                f"'{self.folder}' is damaged: {len(missing):,} of {len(pairs):,} lines of clients are missing (the "
                f"first of client {client} in round {number}), so what they computed is not known; restore the files "
                "from a copy, run again, or leave the device out with --device none"
            )
        if any("train_flops" not in row for row in clients.values()):
            raise self._older("its clients do not say how much they computed")
        return {pair: clients[pair]["train_flops"] for pair in sorted(pairs)}

    @cached_property
    def pairs(self) -> int:
        """How many times a client took part in the training of a round; being asked besides is no part of it."""
        return len({(row["round"], row["client"]) for row in self.rows if "exchange" not in row})

    @property
    def depends_on_time(self) -> bool:
        """Whether decisions of the run read the simulated time, so that another time would have been another run."""
        return bool(self.manifest.get("depends_on_time", False))

    def by_client(self, convention: Convention) -> dict[Pair, dict[str, float]]:
        """Bytes by round and client, then by direction."""
        if convention.name not in self._priced:
            total: dict[Pair, dict[str, float]] = defaultdict(lambda: dict.fromkeys(WAYS, 0.0))
            for row in self.rows:
                try:
                    total[row["round"], row["client"]][row["direction"]] += convention(row)
                except Exception as error:  # of the user's own
                    raise ConfigError(
                        f"the convention {convention.name} cannot price part {row['part']} of round {row['round']} in "
                        f"'{self.folder}' ({type(error).__name__}: {error}); correct it, or leave it out of --as"
                    ) from error
            self._priced[convention.name] = dict(total)
        return self._priced[convention.name]

    @cached_property
    def _priced(self) -> dict[str, dict[Pair, dict[str, float]]]:
        return {}

    def by_way(self, convention: Convention) -> dict[str, float]:
        """Bytes by direction."""
        found = self.by_client(convention).values()
        return {way: sum(ways[way] for ways in found) for way in WAYS}

    def dense(self, ways: Iterable[str] = WAYS) -> float:
        """Bytes of these directions with every coordinate as float32."""
        bytes_of = self.by_way(CONVENTIONS["dense"])
        return sum(bytes_of[way] for way in ways)

    def _older(self, why: str) -> ConfigError:
        return ConfigError(
            f"'{self.folder}' was recorded by an older version of fedray and cannot be re-priced: {why}; run it again"
        )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The device and the link that times are simulated for, either of which may be None.

    given: whether the command named one; else they are those of the run. names: of the profiles, by group, where
    they are known. failure: why the run's own cannot be made, which costs its times and nothing else.
    """

    device: Device | None
    link: Link | None
    given: bool
    names: Mapping[str, str] = field(default_factory=dict)
    failure: str | None = None

    def __bool__(self) -> bool:
        return self.failure is None and (self.device is not None or self.link is not None)

    def __str__(self) -> str:
        device = "no device" if self.device is None else f"device {self._name('device', self.device)}"
        if self.link is None:
            return f"{device}, no link"
        name, rates = self._name("link", self.link), _rates(self.link)
        return f"{device}, link {name}" + (f" ({rates})" if rates else "")

    def _name(self, group: str, component: Any) -> str:
        return self.names.get(group) or str(getattr(component, "name", type(component).__name__))


def _rates(link: Any) -> str:
    """`6 up, 13 down Mbit/s, spread 0.7`; empty for a link that has no such fields."""
    try:
        spread = f", spread {link.spread:g}" if hasattr(link, "spread") else ""
        return f"{link.up_mbps:g} up, {link.down_mbps:g} down Mbit/s{spread}"
    except (AttributeError, TypeError, ValueError):
        return ""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Simulated seconds of a run: the sum over rounds of the slowest client's; and joules of all clients."""

    seconds: float
    joules: float


def time_of(traffic: Traffic, convention: Convention, setting: Setting) -> Time:
    """The run's time and energy if its transfers had had the sizes of a convention."""
    # Both import torch, which prices alone do not need.
    from fedray.costs import round_seconds, simulate
    from fedray.keys import Key

    key = Key.of(traffic.manifest["config"]["seed"])
    bytes_of = traffic.by_client(convention)
    flops = traffic.train_flops if setting.device is not None else {}
    rounds = defaultdict(list)
    for (number, client), ways in bytes_of.items():
        rounds[number].append(
            simulate(
                setting.device,
                setting.link,
                key=key,
                client=client,
                train_flops=flops[number, client] if setting.device is not None else 0.0,
                down_bytes=ways["down"],
                up_bytes=ways["up"],
            )
        )
    return Time(
        seconds=sum(round_seconds(clients) for clients in rounds.values()),
        joules=sum(client.joules for clients in rounds.values() for client in clients),
    )


# -- tables ----------------------------------------------------------------------------------------------------------


def report(
    folders: Sequence[Path], under: Sequence[Path], conventions: Sequence[Convention], setting_of: SettingOf
) -> str:
    """Markdown: three tables for one run, one line a run for several.

    folders: run directories. under: the folders that were asked for. setting_of: see `SettingOf`.
    """
    if len(folders) == 1:
        try:
            return _one(Traffic(folders[0]), conventions, setting_of)
        except (FedrayError, OSError) as error:
            # Nothing ran, so whatever is wrong with the files is wrong with what was asked for.
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    return _several(folders, under, conventions, setting_of)


SettingOf = Callable[[Mapping[str, Any]], Setting]
"""From a run's manifest to the device and link that its times are for."""


def _one(run: Traffic, conventions: Sequence[Convention], setting_of: SettingOf) -> str:
    setting = setting_of(run.manifest)
    if setting.failure and setting.given:
        raise ConfigError(
            f"{setting.failure}; say where its code is with --config-dir, or give both --device and --link"
        )
    if run.depends_on_time and setting.given:
        raise ConfigError(
            f"'{run.folder}' cannot be re-priced in time: its own decisions read the simulated time, so with another "
            "--device or --link it would have been another run; leave them out to re-price its bytes alone"
        )
    status = run.manifest["status"]
    lines = [
        f"# {run.folder}",
        "",
        f"{run.rounds} rounds, {status}; clients took part {run.pairs:,} times. MB = 1e6 bytes, MiB = 2^20 bytes.",
        "",
        "## As measured, by direction and part",
        "",
        _parts(run),
        "",
        "## Under each convention",
        "",
        _prices(run, conventions),
    ]
    if setting:
        timed = list(conventions)
        if run.depends_on_time:
            timed = [CONVENTIONS["measured"]]
        lines += ["", f"## Simulated time: {setting}", "", _times(run, timed, setting)]
        if run.depends_on_time:
            lines += [
                "",
                "Only the measured bytes have a time: this run's own decisions read it, so with other bytes it would "
                "have been another run.",
            ]
    elif setting.failure:
        lines += ["", f"no simulated time: {setting.failure}"]
    return "\n".join(lines)


def _parts(run: Traffic) -> str:
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in run.rows:
        groups[row["direction"], row["part"], row["chain"]].append(row)
    measured, dense = CONVENTIONS["measured"], CONVENTIONS["dense"]
    all_bytes = sum(map(measured, run.rows)) or 1.0

    def line(way: str, part: str, chain: str, payloads: int, rows: Sequence[Row]) -> list[str]:
        sent, whole = sum(map(measured, rows)), sum(map(dense, rows))
        kinds = [sum(row[kind] for row in rows) for kind in ("value_bytes", "mask_bytes", "header_bytes")]
        return [
            way, part, chain, f"{payloads:,}", f"{sum(row['params'] for row in rows):,}",
            *(f"{kind:,}" for kind in kinds), f"{sent:,.0f}", _ratio(whole, sent), f"{100 * sent / all_bytes:.1f} %",
        ]  # fmt: skip

    lines = [line(way, part, chain, _payloads(rows), rows) for (way, part, chain), rows in sorted(groups.items())]
    lines.append(line("both", "all", "", _payloads(run.rows), run.rows))
    header = [
        "way", "part", "chain", "payloads", "parameters", "value bytes", "mask bytes", "header bytes", "bytes",
        "dense / this", "share",
    ]  # fmt: skip
    return markdown(header, lines, text=3)


def _payloads(rows: Iterable[Row]) -> int:
    """How many payloads these rows are of; each payload has a row for every part."""
    several = {(row["round"], row["client"], row["direction"]): row.get("payloads", 1) for row in rows}
    return sum(several.values())


def _prices(run: Traffic, conventions: Sequence[Convention]) -> str:
    return markdown(PRICE_HEADER, [[convention.name, *_amounts(run, convention)] for convention in conventions])


PRICE_HEADER = [
    "convention", "up", "down", "both ways", "bytes both ways", "per client-round", "bytes per client-round",
    "dense / this",
]  # fmt: skip


def _amounts(run: Traffic, convention: Convention) -> list[str]:
    """Cells: up, down, both ways, its bytes, both ways for one client in one round, its bytes, and against dense."""
    ways = run.by_way(convention)
    total = sum(ways.values())
    return [
        *(_amount(ways[way], convention) for way in ("up", "down")),
        _amount(total, convention),
        f"{total:,.0f}",
        _amount(total / run.pairs, convention),
        f"{total / run.pairs:,.0f}",
        _ratio(run.dense(convention.ways), total),
    ]


def _times(run: Traffic, conventions: Sequence[Convention], setting: Setting) -> str:
    times = [(convention.name, time_of(run, convention, setting)) for convention in conventions]
    return markdown(
        ["bytes as", "seconds", "seconds a round", "joules"],
        [[name, *_durations(time, run, setting)] for name, time in times],
    )


def _durations(time: Time, run: Traffic, setting: Setting) -> list[str]:
    joules = "-" if setting.device is None else sized(time.joules)
    each = time.seconds / run.rounds
    return [sized(time.seconds), f"{each:,.3f}" if each >= 1 or each == 0 else sized(each), joules]


MOST_SETTINGS = 3
"""Devices and links of runs that are written out below their table."""


def _several(
    folders: Sequence[Path], under: Sequence[Path], conventions: Sequence[Convention], setting_of: SettingOf
) -> str:
    """With one convention its amounts, with more the total of each; times under the first."""
    first = conventions[0]
    priced: list[tuple[Traffic, str, list[str]]] = []
    timed: dict[str, None] = {}
    notes, left_out = [], []
    for folder in folders:
        run, name = Traffic(folder), shown(folder, under)
        try:
            cells = [str(run.rounds), *_totals(run, conventions)]
            setting = setting_of(run.manifest)
            times = ["-", "-", "-"]
            if setting and run.depends_on_time and (setting.given or first.name != "measured"):
                notes.append(f"{name} has no other time: its own decisions read the simulated time.")
            elif setting:
                times = _durations(time_of(run, first, setting), run, setting)
                timed[str(setting)] = None
            elif setting.failure:
                notes.append(f"{name} has no simulated time: {sentence(setting.failure)}")
        except (FedrayError, OSError) as error:
            left_out.append(str(error))
            notes.append(f"Left out: {sentence(error)}")
            continue
        if run.manifest["status"] != "finished":
            notes.append(f"{name} is {run.manifest['status']}: its {run.rounds} rounds count.")
        priced.append((run, name, cells + times))
    if not priced:
        raise ConfigError(f"none of the {len(folders)} runs can be priced: {left_out[0]}")
    # Rounds have a column of their own: those that were finished.
    told = [{**settings_of(run.manifest), "seed": run.manifest["config"]["seed"]} for run, _, _ in priced]
    for settings in told:
        settings.pop("rounds", None)
    keys = differing(told)
    names = short(keys)
    header = ["run", *(names[key] for key in keys), "rounds"]
    if len(conventions) == 1:
        header += PRICE_HEADER[1:]
    else:
        header += [f"{convention.name} {convention.unit}" for convention in conventions]
    lines = [
        [name, *(cell(settings, key) for key in keys), *cells]
        for (_, name, cells), settings in zip(priced, told, strict=True)
    ]
    if timed:
        header += [f"seconds ({first.name})", "seconds a round", "joules"]
    else:
        lines = [line[:-3] for line in lines]
    text = [
        markdown(header, lines, text=1 + len(keys)),
        "",
        "MB = 1e6 bytes, MiB = 2^20 bytes; both ways together where no way is named.",
        *([f"Simulated time: {'; '.join(timed)}."] if 0 < len(timed) <= MOST_SETTINGS else []),
    ]
    return "\n".join(text + ([""] + [f"- {note}" for note in notes] if notes else []))


def _totals(run: Traffic, conventions: Sequence[Convention]) -> list[str]:
    if len(conventions) == 1:
        return _amounts(run, conventions[0])
    totals = [(sum(run.by_way(convention).values()), convention) for convention in conventions]
    return [sized(total / UNITS[convention.unit]) for total, convention in totals]


# -- without a run ---------------------------------------------------------------------------------------------------


def what_if(
    *,
    params: int,
    sparsities: Sequence[float],
    bits: float,
    clients: int,
    rounds: int,
    conventions: Sequence[Convention],
) -> str:
    """A Markdown table of messages that nobody sent: `params` coordinates, one part, the same message both ways.

    clients, rounds: how many clients take part in a round, and how many rounds there are.
    """
    pairs = clients * rounds
    lines = []
    for sparsity in sparsities:
        kept = round((1 - sparsity) * params)
        message = {"chain": "", "size": params, "kept": kept, "params": kept, "weights": kept, "bits": bits}
        for convention in conventions:
            up, down = (convention({**message, "direction": way}) for way in ("up", "down"))
            whole = sum(CONVENTIONS["dense"]({**message, "direction": way}) for way in convention.ways)
            cells = [f"{sparsity:g}", convention.name, f"{kept:,}"]
            for times in (1, pairs):
                cells += [_amount(times * amount, convention) for amount in (up, down, up + down)]
                cells.append(f"{times * (up + down):,.0f}")
            lines.append([*cells, _ratio(whole, up + down)])
    header = [
        "sparsity", "convention", "kept", "up", "down", "both ways", "bytes", "all up", "all down", "all both ways",
        "all bytes", "dense / this",
    ]  # fmt: skip
    return "\n".join(
        [
            f"{params:,} coordinates of {bits:g} bits. First one client in one round, then all: {clients:,} clients x "
            f"{rounds:,} rounds.",
            "MB = 1e6 bytes, MiB = 2^20 bytes.",
            "",
            markdown(header, lines, text=2),
        ]
    )


def _amount(num_bytes: float, convention: Convention) -> str:
    return f"{sized(num_bytes / UNITS[convention.unit])} {convention.unit}"


def _ratio(dense: float, sent: float) -> str:
    return f"{dense / sent:,.2f}" if dense and sent else "-"
