"""`fedray wandb`: a comparison at W&B, made from run directories. The only module of the room that imports wandb.

W&B draws the curves from the runs that it has; tables and text are computed here from the record.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError, FedrayError, RunError
from fedray.report.results import Group, Result, finite, grouped, labels, read_results
from fedray.report.runs import markdown, sized
from fedray.report.table import HEADLINES, table
from fedray.report.wandb_sync import sync_command
from fedray.track.wandb import NO_GROUP, WandbConfig, destination, sent_of
from fedray.track.wandb_content import labels_of

EXTRA = "fedray wandb report needs wandb-workspaces, which is not installed: pip install 'fedray[report]'"
MEGABYTE = 1e6
PARTS = ("value", "mask", "header")
DIRECTIONS = {"up": "clients to server", "down": "server to clients"}
TITLE_CHARACTERS = 128
"""W&B takes no longer titles."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a report shows, without anything of W&B. metric: the one that is compared; loss: None if none is recorded.

    sparsity: the metric of the sparsity axis. spread: metrics of the clients, mean first. run_ids: at W&B.
    by_group: whether a group of W&B is one setting, so that its curves can be averaged over seeds.
    texts: Markdown.
    """

    title: str
    about: str
    metric: str
    loss: str | None
    sparsity: str
    spread: tuple[str, ...]
    run_ids: tuple[str, ...]
    by_group: bool
    results_text: str
    bytes_text: str
    missing_text: str | None


def wandb_command(arguments: Sequence[str], *, parser: type[argparse.ArgumentParser]) -> None:
    """`fedray wandb sync ...` and `fedray wandb report ...`."""
    commands: dict[str, Callable[..., None]] = {"sync": sync_command, "report": report_command}
    command = parser(
        prog="fedray wandb",
        description="Runs and comparisons at Weights & Biases, made from run directories.",
        epilog="fedray wandb sync --help, fedray wandb report --help",
    )
    command.add_argument(
        "what", choices=tuple(commands), help="sync sends runs, report makes a page that compares them"
    )
    options = command.parse_args(arguments[:1])
    commands[options.what](arguments[1:], parser=parser)


def report_command(arguments: Sequence[str], *, parser: type[argparse.ArgumentParser]) -> None:
    """Make a report at W&B, or write what it would be to a file."""
    command = parser(
        prog="fedray wandb report",
        description="Make a W&B report that compares the runs of a folder; they should be there: fedray wandb sync.",
    )
    command.add_argument("folder", type=Path, help="a folder that holds runs at any depth, as of a sweep")
    command.add_argument("--project", help="the W&B project; without, what the runs were told")
    command.add_argument("--entity", help="the W&B user or team; without, what the runs were told, or your default")
    command.add_argument("--metric", help=f"what is compared; without, the first of {', '.join(HEADLINES)}")
    command.add_argument("--title", help="the title of the report")
    command.add_argument(
        "--dry-run", type=Path, metavar="FILE", help="write the report's specification to a JSON file; needs no account"
    )
    options = command.parse_args(arguments)
    os.environ.setdefault("WANDB_SILENT", "true")
    results = read_results(options.folder)
    where = _destination(results, project=options.project, entity=options.entity)
    compared = compare(options.folder, results, metric=options.metric, title=options.title)
    if options.dry_run is not None:
        text = specification(compared, where)
        try:
            options.dry_run.parent.mkdir(parents=True, exist_ok=True)
            options.dry_run.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--dry-run {options.dry_run} cannot be written ({error}); name a file in a folder of yours"
            ) from error
        print(
            f"{options.dry_run}: the specification of '{compared.title}', {len(compared.run_ids)} runs; "
            "nothing was sent"
        )
        return
    print(save(compared, where))
    unsent = [result.name for result in results if result.run_id in compared.run_ids and not _was_sent(result, where)]
    if unsent:
        more = f" and {len(unsent) - 1} more" if len(unsent) > 1 else ""
        print(f"not known to be at W&B: {unsent[0]}{more}; fedray wandb sync {options.folder} sends what is missing")


# -- what is compared ------------------------------------------------------------------------------------------------


def compare(
    folder: Path, results: Sequence[Result], *, metric: str | None = None, title: str | None = None
) -> Comparison:
    """The content of a report on the finished runs. Raises ConfigError if none has the metric."""
    groups, notes = grouped(results)
    # It refuses what cannot be compared, in words of its own; the notes are ours, of all runs.
    text = table(folder, metric=metric)
    finished = [result for group in groups for result in group.results]
    known = {name for result in finished for name in result.metrics}
    chosen = metric or next(name for name in HEADLINES if name in known)
    main = chosen.rpartition("/")[2]
    spread = tuple(name for end in ("mean", "p10", "p90") if (name := f"client/{_client_metric(main)}_{end}") in known)
    names = [str(result.manifest.get("name", "run")) for result in finished]
    default = f"{' and '.join(dict.fromkeys(names))}, {len(groups)} settings, {len(finished)} runs"
    seeds = max(len(group.results) for group in groups)
    about = (
        f"{len(finished)} finished runs of {len(groups)} settings"
        + (f", up to {seeds} seeds each; mean and deviation are over seeds" if seeds > 1 else "")
        + ". Sparsity is the fraction removed; MB is 1e6 bytes, of encoded payloads as they were sent."
    )
    return Comparison(
        title=(title or default)[:TITLE_CHARACTERS],
        about=about,
        metric=chosen,
        loss=next((name for name in ("test/loss", "test/mse", "train/loss") if name in known and name != chosen), None),
        sparsity=_sparsity(finished),
        spread=spread,
        run_ids=tuple(dict.fromkeys(str(result.run_id) for result in finished)),
        by_group=_groups_are_settings(groups),
        results_text=text,
        bytes_text=_bytes(groups),
        missing_text="\n".join(f"- {note}" for note in notes) or None,
    )


def _client_metric(main: str) -> str:
    """`accuracy` of `test/accuracy` and of `client/accuracy_mean`."""
    return main.rpartition("_")[0] if main.endswith(("_mean", "_p10", "_p90")) else main


def _sparsity(results: Sequence[Result]) -> str:
    """The server's sparsity; the clients' where each prunes for itself and the server never does."""
    of_server = any((result.at("model/sparsity") or 0) > 0 for result in results)
    of_clients = any((result.at("client/sparsity_mean") or 0) > 0 for result in results)
    return "client/sparsity_mean" if of_clients and not of_server else "model/sparsity"


def _groups_are_settings(groups: Sequence[Group]) -> bool:
    """Whether no two settings go by the same group at W&B."""
    names = [{_group_name(result.manifest) for result in group.results} for group in groups]
    return all(len(own) == 1 and NO_GROUP not in own for own in names) and len(set().union(*names)) == len(groups)


def _told(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings under tracker.wandb that a run was given."""
    return (manifest["config"].get("tracker") or {}).get("wandb") or {}


def _group_name(manifest: Mapping[str, Any]) -> str:
    told = _told(manifest).get("group")
    return labels_of(manifest).group if told is None else str(told)


def _bytes(groups: Sequence[Group]) -> str:
    """A table of megabytes by direction and part over the whole run, the mean over seeds."""
    header = ["setting", *(f"{way} {part} MB" for way in DIRECTIONS for part in PARTS), "total MB"]
    lines = []
    for label, group in zip(labels(groups), groups, strict=True):
        sums = []
        for way in DIRECTIONS:
            for part in PARTS:
                key = f"wire/{way}_{part}_bytes"
                sums.append(statistics.fmean(_total(result, key) for result in group.results))
        lines.append([label, *(sized(value / MEGABYTE) for value in (*sums, sum(sums)))])
    return markdown(header, lines)


def _total(result: Result, key: str) -> float:
    return sum(finite(row.get(key)) or 0.0 for row in result.rows)


# -- at W&B ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Where:
    """entity: None is the user's default."""

    project: str
    entity: str | None


def _destination(results: Sequence[Result], *, project: str | None, entity: str | None) -> _Where:
    """Where the runs were told to go, unless it is said. Raises ConfigError if they were told several projects."""
    told = [_told(result.manifest) for result in results if result.manifest and result.status == "finished"]
    found = {}
    for name, said in (("project", project), ("entity", entity)):
        values = sorted({str(one[name]) for one in told if one.get(name) is not None})
        if said is None and len(values) > 1:
            raise ConfigError(
                f"the runs were told {len(values)} values of tracker.wandb.{name}, {', '.join(values[:3])}; "
                f"give --{name}"
            )
        found[name] = said if said is not None else values[0] if values else None
    checked = WandbConfig(project=found["project"] or WandbConfig.project)
    return _Where(project=checked.project, entity=found["entity"])


def _was_sent(result: Result, where: _Where) -> bool:
    config = WandbConfig(mode="online", project=where.project, entity=where.entity)
    return destination(config) in sent_of(result.folder)


def specification(compared: Comparison, where: _Where) -> str:
    """The report's specification as JSON text, without an account; its run set has no project yet."""
    report = _report(compared, project=where.project, entity=where.entity or "", with_project=False)
    # The library has no public way to a specification that does not save it.
    spec = json.loads(report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps(spec, indent=2, ensure_ascii=False) + "\n"


def save(compared: Comparison, where: _Where) -> str:
    """Save the report at W&B; returns its address. Raises ConfigError and RunError."""
    _workspaces()
    import wandb

    try:
        entity = where.entity or wandb.Api().default_entity
        report = _report(compared, project=where.project, entity=str(entity), with_project=True)
        return str(report.save().url)
    except wandb.errors.UsageError as error:
        raise ConfigError(
            "fedray wandb report needs an API key and none is configured: run `wandb login`, or write the "
            "specification with --dry-run FILE"
        ) from error
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise ConfigError(
            f"project {where.project!r} is not at W&B; send the runs first, with fedray wandb sync, or give --project"
        ) from error
    except FedrayError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise RunError(
            f"W&B did not take the report ({type(error).__name__}: {text}); repeat the command later"
        ) from error


def _workspaces() -> Any:
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError as error:
        raise ConfigError(EXTRA) from error
    return reports


def _report(compared: Comparison, *, project: str, entity: str, with_project: bool) -> Any:
    """The report as the library's objects. with_project: its run set names the project, which W&B is asked for."""
    wr = _workspaces()

    def runs() -> Any:  # each grid has a run set of its own
        return wr.Runset(
            name="runs",
            entity=entity if with_project else "",
            project=project if with_project else "",
            filters=f"Metric('ID') in {list(compared.run_ids)!r}",
            groupby=["group"] if compared.by_group else [],
        )

    def lines(title: str, metrics: Sequence[str], unit: str, **more: Any) -> Any:
        over_seeds = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"} if compared.by_group else {}
        axis = {"x": "round", "title_x": "round", **more}
        return wr.LinePlot(title=title, y=list(metrics), title_y=unit, **over_seeds, **axis)

    def grid(*panels: Any) -> Any:
        for number, panel in enumerate(panels):  # two in a row of 24 columns
            panel.layout = wr.Layout(x=12 * (number % 2), y=8 * (number // 2), w=12, h=8)
        return wr.PanelGrid(runsets=[runs()], panels=list(panels))

    name = compared.metric.rpartition("/")[2]
    sent = {"x": "wire/total_bytes", "title_x": "sent so far, both ways (bytes; 1M is 1 MB)"}
    by_round = [lines(f"{name} by round", [compared.metric], compared.metric)]
    if compared.loss is not None:
        by_round.append(lines(f"{compared.loss.rpartition('/')[2]} by round", [compared.loss], compared.loss))
    blocks = [
        wr.P(text=compared.about),
        wr.H2(text="Results"),
        wr.MarkdownBlock(text=compared.results_text),
        wr.H2(text="By round"),
        grid(*by_round),
        wr.H2(text="Against megabytes and sparsity"),
        grid(
            lines(f"{name} against bytes sent", [compared.metric], compared.metric, **sent),
            wr.ScatterPlot(
                title=f"{name} against sparsity, at the end",
                x=wr.SummaryMetric(compared.sparsity),
                y=wr.SummaryMetric(compared.metric),
            ),
        ),
        wr.H2(text="Bytes by direction and part"),
        wr.MarkdownBlock(text=compared.bytes_text),
        grid(
            *(
                lines(f"{words}, bytes in a round", [f"wire/{way}_{part}_bytes" for part in PARTS], "bytes")
                for way, words in DIRECTIONS.items()
            )
        ),
    ]
    if compared.spread:
        blocks += [
            wr.H2(text="Spread over clients"),
            grid(lines("clients: mean, 10th and 90th percentile", compared.spread, name)),
        ]
    comparer = wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=0, w=24, h=12))
    blocks += [wr.H2(text="What differs"), wr.PanelGrid(runsets=[runs()], panels=[comparer])]
    if compared.missing_text is not None:
        blocks += [wr.H2(text="Left out"), wr.MarkdownBlock(text=compared.missing_text)]
    return wr.Report(
        project=project, entity=entity, title=compared.title, description=compared.about, blocks=blocks, width="fluid"
    )
