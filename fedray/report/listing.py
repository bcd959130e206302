"""`fedray runs`: every run of a folder on a line, whatever became of it."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fedray.errors import ConfigError
from fedray.report.results import Result, finite, read_results
from fedray.report.runs import markdown, sentence, sized
from fedray.report.settings import ABSENT, cell, closest, differing, only, short
from fedray.report.table import HEADLINES, MEGABYTE

_WIDTH = 60
"""Letters of an error in a line; the whole sentence is below the table."""


def runs_command(arguments: Sequence[str], *, parser: type[argparse.ArgumentParser]) -> None:
    """Print the runs of a folder."""
    command = parser(prog="fedray runs", description="Every run of a folder on a line, whatever became of it.")
    command.add_argument("folder", type=Path, help="a folder that holds runs at any depth")
    command.add_argument("--metric", help="a metric of rounds.jsonl, test/accuracy if there is one; its last value")
    command.add_argument("--only", metavar="KEY=VALUE", action="append", default=[], help="only such runs; KEY=A|B too")
    command.add_argument("--status", metavar="S,...", help="only such runs, as in failed,interrupted")
    command.add_argument("--format", choices=("md", "csv", "json"), default="md")
    options = command.parse_args(arguments)
    results = only(read_results(options.folder), options.only)
    if options.status is not None:
        results = with_status(results, options.status)
    print(listing(results, metric=options.metric, form=options.format))


def with_status(results: Sequence[Result], text: str) -> list[Result]:
    """The runs of some statuses, with commas between. Raises ConfigError where none has them."""
    wanted = [status.strip() for status in text.split(",")]
    found = [result for result in results if result.status in wanted]
    if not found:
        there = ", ".join(dict.fromkeys(result.status for result in results))
        raise ConfigError(f"--status {text} is that of none of these runs; there are {there}")
    return found


def listing(results: Sequence[Result], *, metric: str | None = None, form: Literal["md", "csv", "json"] = "md") -> str:
    """The runs as text. metric: None for the first of HEADLINES that a run has. Raises ConfigError.

    Markdown is rounded; csv and json have full precision, bytes, seconds and whole errors.
    """
    known = {name for result in results for name in result.metrics}
    if metric is None:
        metric = next((name for name in HEADLINES if name in known), HEADLINES[0])
    elif metric not in known:
        raise ConfigError(f"--metric {metric} is in no run; {closest(metric, sorted(known))}")
    # Of a cell that never ran only its overrides are known: they do not make the rest of the settings differ.
    keys = differing([result.settings for result in results if result.manifest])
    if not keys:
        keys = list(dict.fromkeys(key for result in results if not result.manifest for key in result.settings))
    lines = [_facts(result, metric) for result in results]
    if form == "json":
        return json.dumps(
            [{**line, "settings": dict(result.settings)} for line, result in zip(lines, results, strict=True)], indent=2
        )
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*keys, *lines[0]])
        for line, result in zip(lines, results, strict=True):
            settings = [cell(result.settings, key) for key in keys]
            writer.writerow([*settings, *("" if value is None else value for value in line.values())])
        return out.getvalue().rstrip("\n")
    return _markdown(results, lines, keys, metric)


def _facts(result: Result, metric: str) -> dict[str, Any]:
    """What is known of a run; bytes, seconds and fractions."""
    rounds = result.manifest.get("rounds")
    last = result.rows[-1] if result.rows else {}
    return {
        "run": result.name,
        "folder": str(result.folder),
        "run_id": result.run_id,
        "status": result.status,
        "seed": result.seed,
        "rounds_done": last.get("round", 0),
        "rounds": rounds if isinstance(rounds, int) else None,
        metric: result.at(metric),
        "model/sparsity": finite(last.get("model/sparsity")),
        "wire/total_bytes": finite(last.get("wire/total_bytes")),
        "time/total_s": finite(last.get("time/total_s")),
        "started": result.started or None,
        "ended": result.manifest.get("ended"),
        "error": result.error,
    }


def _markdown(results: Sequence[Result], lines: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str) -> str:
    names = short(keys)

    def number(value: float | None, text: str) -> str:
        return ABSENT if value is None else text.format(value)

    table = []
    for result, line in zip(results, lines, strict=True):
        bytes_, rounds = line["wire/total_bytes"], line["rounds"]
        error = " ".join((line["error"] or "").split())
        table.append(
            [
                line["run"],
                line["status"],
                *(cell(result.settings, key) for key in keys),
                ABSENT if line["seed"] is None else str(line["seed"]),
                f"{line['rounds_done']}" if rounds is None else f"{line['rounds_done']}/{rounds}",
                number(line[metric], "{:.4f}" if abs(line[metric] or 0.0) < 10 else "{:,.2f}"),
                number(line["model/sparsity"], "{:.4f}"),
                ABSENT if bytes_ is None else sized(bytes_ / MEGABYTE),
                number(line["time/total_s"], "{:,.1f}"),
                error if len(error) <= _WIDTH else f"{error[: _WIDTH - 1]}…",
            ]
        )
    header = ["run", "status", *(names[key] for key in keys), "seed", "rounds", metric, "sparsity", "MB", "seconds"]
    told = any(line["error"] for line in lines)
    if not told:
        table = [line[:-1] for line in table]
    statuses = [result.status for result in results]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    said = [f"{len(results)} run{'s' if len(results) > 1 else ''}: {counts}."]
    said.append("MB = 1e6 bytes, both ways; seconds are those of the run, without its start.")
    said += [f"- {line['run']}: {sentence(line['error'])}" for line in lines if len(line["error"] or "") > _WIDTH]
    return "\n".join([markdown([*header, *(["error"] if told else [])], table, text=2 + len(keys)), "", *said])
